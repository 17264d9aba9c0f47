"""Text encoders by hand, Phi of the paper, and the similarity W of responses and demonstrations.

The paper's version 3 on arXiv names CLIP's text tower, a later one "a text encoder": both CLIP's
and BERT / MiniLM are here, read from a folder by support/encoders.py.
"""

import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support.chat import load_tokenizer
from support.encoders import WordEncoder, read_encoder
from support.hf import fitting
from support.judge import without_thought


def split_sentences(text: str) -> list[str]:
    """Sub-sentences: cut at line ends, at #### and after . ! ? ; those without a word go."""
    pieces = re.split(r"\n+|#{2,}|(?<=[.!?;])\s+", text)
    return [p.strip() for p in pieces if re.search(r"\w", p)]


def similarity(response: Tensor, demonstration: Tensor) -> Tensor:
    """W = mean_k max_l cos(S_k, S~_l), a scalar in [-1, 1] (DR-IRL v3; hardness: 1 - W).

    response (K, D) and demonstration (L, D): embeddings of sub-sentences, of any norm. If either
    has no sentence, W is 0.
    """
    shapes = tuple(response.shape), tuple(demonstration.shape)
    if response.ndim != 2 or demonstration.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"want (K, D) and (L, D), got {shapes[0]} and {shapes[1]}")
    if len(response) == 0 or len(demonstration) == 0:
        return response.new_zeros(())
    cos = F.normalize(response, dim=1) @ F.normalize(demonstration, dim=1).T  # (K, L)
    return cos.max(dim=1).values.mean()


def similarities(encoder, texts: list[list[str]], demonstrations: list[str]) -> Tensor:
    """W (P, G) of each prompt's responses to its demonstration; a sentence is embedded once."""
    every = [t for group in texts for t in group] + demonstrations
    split = {t: split_sentences(without_thought(t)) for t in every}
    sentences = sorted({s for parts in split.values() for s in parts})
    index, vectors = {s: i for i, s in enumerate(sentences)}, encoder.embed(sentences)
    of = {t: vectors[[index[s] for s in parts]] for t, parts in split.items()}
    rows = [[similarity(of[t], of[d]) for t in group] for group, d in zip(texts, demonstrations)]
    return torch.stack([torch.stack(row) for row in rows])


class Layer(nn.Module):
    """One encoder layer. BERT normalises after each residual sum, CLIP before each branch."""

    def __init__(self, width: int, inner: int, heads: int, eps: float, act: str, pre_norm: bool):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.heads, self.act, self.pre_norm = heads, act, pre_norm

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = (f(x).view(B, T, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(B, T, D))

    def feed(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(F.gelu(y) if self.act == "gelu" else y * torch.sigmoid(1.702 * y))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.feed(x))


class Encoder(nn.Module):
    """Texts in, unit vectors out. BERT: the tokens' mean or the first. CLIP: the end-of-text's."""

    def __init__(self, c: dict, projected: int, tokenizer: Tokenizer):
        """c: as read_encoder returns it. projected: width of CLIP's projection, 0: none."""
        super().__init__()
        D, heads, eps = c["hidden_size"], c["num_attention_heads"], c["layer_norm_eps"]
        self.clip, self.tokenizer = c["model_type"] != "bert", tokenizer
        self.eos, self.limit = c["eos_token_id"], c["max_position_embeddings"]
        self.first = c["pooling"] == "cls"
        shape = (D, c["intermediate_size"], heads, eps, c["hidden_act"], self.clip)
        self.layers = nn.ModuleList(Layer(*shape) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.LayerNorm(D, eps)
        self.words = nn.Parameter(torch.empty(c["vocab_size"], D))
        self.positions = nn.Parameter(torch.empty(self.limit, D))
        self.segment = nn.Parameter(torch.empty(1, D))
        self.projection = nn.Parameter(torch.empty(projected, D)) if projected else None

    def pool(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids (B, T), padded on the right -> embeddings (B, D), not yet of unit length."""
        at = torch.arange(ids.shape[1], device=ids.device)
        real = at < lengths[:, None]  # (B, T)
        x = self.words[ids] + (self.positions[: len(at)] + self.segment)
        causal = (at <= at[:, None])[None, None]  # pads lie to the right
        x, mask = (x, causal) if self.clip else (self.norm(x), real[:, None, None])
        for layer in self.layers:
            x = layer(x, mask)
        if self.first:
            return x[:, 0]
        if not self.clip:
            return (x * real[..., None]).sum(1) / lengths[:, None]  # mean over real tokens
        # old configs say eos 2 and mean the largest id
        end = ids.argmax(1) if self.eos == 2 else (ids == self.eos).int().argmax(1)
        x = self.norm(x)[torch.arange(len(x), device=x.device), end]
        return x if self.projection is None else x @ self.projection.T

    @torch.no_grad()
    def embed(self, texts: list[str], batch: int = 64) -> Tensor:
        """(N, D) unit vectors, batched by length."""
        rows = [self.tokenizer.encode(t).ids for t in texts]
        rows = [r if len(r) <= self.limit else r[: self.limit - 1] + r[-1:] for r in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = []
        for i in range(0, len(order), batch):
            ids = [torch.tensor(rows[j], device=self.words.device) for j in order[i : i + batch]]
            lengths = torch.tensor([len(x) for x in ids], device=self.words.device)
            out.append(self.pool(pad_sequence(ids, batch_first=True), lengths))
        back = torch.tensor(order).argsort()  # from the order of lengths to that of the texts
        return F.normalize(torch.cat(out)[back], dim=1) if out else self.words[:0]


def load_encoder(folder: str | Path, device="cpu"):
    """A BERT or CLIP folder with config.json, weights and tokenizer.json; "words": WordEncoder."""
    if str(folder) == "words":
        return WordEncoder()
    c, state = read_encoder(Path(folder))
    tokenizer = load_tokenizer(Path(folder), c["vocab_size"])
    with torch.device("meta"):  # only shapes, until the tensors are known to fit
        model = Encoder(c, len(state.get("projection", ())), tokenizer)
    wanted = model.state_dict()
    state = {name: x for name, x in state.items() if name in wanted}
    model.load_state_dict(fitting(wanted, state, folder), assign=True)
    return model.float().requires_grad_(False).eval().to(device)
