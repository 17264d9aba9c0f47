"""Text encoders by hand, Phi of the paper: BERT / MiniLM with mean pooling, and CLIP's text tower.

DR-IRL v3 names CLIP's text tower, a later version "a text encoder"; both kinds load here from a local folder.
"""

import functools
import hashlib
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from chat import load_tokenizer
from data import UserError, normalise, pad
from files import fitting, inside, number, read_json
from model import load_tensors


def split_sentences(text: str) -> list[str]:
    """Sub-sentences: cut at line ends, at #### and after . ! ? ; pieces without a letter or digit are dropped."""
    pieces = re.split(r"\n+|#{2,}|(?<=[.!?;])\s+", text)
    return [p.strip() for p in pieces if re.search(r"\w", p)]


def similarity(response: Tensor, demonstration: Tensor) -> Tensor:
    """W = mean_k max_l cos(S_k, S~_l): how well the demonstration covers the response (DR-IRL v3, data-level hardness).

    response (K, D) and demonstration (L, D): embeddings of sub-sentences, any length. Returns a scalar in [-1, 1];
    a response or demonstration without sentences has similarity 0.
    """
    if response.ndim != 2 or demonstration.ndim != 2 or response.shape[1] != demonstration.shape[1]:
        raise ValueError(
            f"want (K, D) and (L, D), got {tuple(response.shape)} and {tuple(demonstration.shape)}"
        )
    if len(response) == 0 or len(demonstration) == 0:
        return response.new_zeros(())
    cos = F.normalize(response, dim=1) @ F.normalize(demonstration, dim=1).T  # (K, L)
    return cos.max(dim=1).values.mean()


def similarities(encoder, texts: list[list[str]], demonstrations: list[str]) -> Tensor:
    """W (P, G) of each prompt's responses to its demonstration; every distinct sub-sentence is embedded once."""
    split = {t: split_sentences(t) for group, d in zip(texts, demonstrations) for t in (*group, d)}
    sentences = sorted({s for parts in split.values() for s in parts})
    index, vectors = {s: i for i, s in enumerate(sentences)}, encoder.embed(sentences)
    at = {t: vectors[[index[s] for s in parts]] for t, parts in split.items()}
    return torch.stack(
        [
            torch.stack([similarity(at[t], at[d]) for t in group])
            for group, d in zip(texts, demonstrations)
        ]
    )


class Layer(nn.Module):
    """One encoder layer. BERT normalises after each residual sum, CLIP before each branch."""

    def __init__(self, width: int, inner: int, heads: int, eps: float, act: str, pre_norm: bool):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.heads, self.pre_norm = heads, pre_norm
        self.act = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}[act]

    def attend(self, x, mask):
        B, T, D = x.shape
        q, k, v = (
            f(x).view(B, T, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        return self.o(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, D)
        )

    def feed(self, x):
        return self.down(self.act(self.up(x)))

    def forward(self, x, mask):
        if self.pre_norm:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.feed(x))


# What they are called in a folder: a layer's modules, and all else.
BERT_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
CLIP_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "norm1": "layer_norm1",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "norm2": "layer_norm2",
}
BERT = {
    "layers": "encoder.layer",
    "norm": "embeddings.LayerNorm",
    "words": "embeddings.word_embeddings.weight",
    "positions": "embeddings.position_embeddings.weight",
}
CLIP = {
    "layers": "encoder.layers",
    "norm": "final_layer_norm",
    "words": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
}


class Encoder(nn.Module):
    """Texts in, unit vectors out. Build it with load_encoder."""

    def __init__(self, c: dict, tensors: dict[str, Tensor], tokenizer: Tokenizer, where: Path):
        super().__init__()
        self.clip, act, eps = (
            c["model_type"] != "bert",
            c.get("hidden_act"),
            number(c, "layer_norm_eps", where, 0.0, 1.0),
        )
        if act not in ("gelu", "quick_gelu"):
            raise UserError(
                f"{where}: unsupported activation {act!r} in the text encoder: want gelu or quick_gelu"
            )
        width, inner, heads, layers, words, self.limit = (
            number(c, name, where, 1, high)
            for name, high in (
                ("hidden_size", 10**6),
                ("intermediate_size", 10**7),
                ("num_attention_heads", 10**4),
                ("num_hidden_layers", 1000),
                ("vocab_size", 10**7),
                ("max_position_embeddings", 10**6),
            )
        )
        if width % heads:
            raise UserError(
                f"{where}: hidden_size {width} must be a multiple of num_attention_heads {heads}"
            )
        self.tokenizer, self.eos = tokenizer, number(c, "eos_token_id", where, 0, 10**7, 2)
        with torch.device("meta"):  # only shapes, until the tensors are known to fit
            self.layers = nn.ModuleList(
                Layer(width, inner, heads, eps, act, pre_norm=self.clip) for _ in range(layers)
            )
            self.norm = nn.LayerNorm(width, eps)
            self.words, self.positions, self.segment = (
                nn.Parameter(torch.empty(n, width)) for n in (words, self.limit, 1)
            )
        theirs, names = (CLIP, CLIP_NAMES) if self.clip else (BERT, BERT_NAMES)
        state = {
            f"layers.{i}.{ours}.{part}": tensors[f"{theirs['layers']}.{i}.{name}.{part}"]
            for i in range(len(self.layers))
            for ours, name in names.items()
            for part in ("weight", "bias")
        }
        state |= {
            f"norm.{part}": tensors[f"{theirs['norm']}.{part}"] for part in ("weight", "bias")
        }
        state |= {name: tensors[theirs[name]] for name in ("words", "positions")}
        # every text is of BERT's first segment
        state["segment"] = (
            torch.zeros(1, width)
            if self.clip
            else torch.atleast_2d(tensors["embeddings.token_type_embeddings.weight"])[:1]
        )
        self.projection = None
        if "text_projection.weight" in tensors:
            state["projection"] = tensors["text_projection.weight"]
            self.projection = nn.Parameter(
                torch.empty(state["projection"].shape[:1] + (width,), device="meta")
            )
        self.load_state_dict(fitting(self.state_dict(), state, where), assign=True)
        self.float().requires_grad_(False).eval()

    def pool(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids (B, T) padded on the right -> embeddings (B, D), not yet of unit length."""
        T = ids.shape[1]
        at = torch.arange(T, device=ids.device)
        real = at < lengths[:, None]  # (B, T)
        x = self.words[ids] + (self.positions[:T] + self.segment)
        if self.clip:
            mask = (at <= at[:, None])[None, None]  # causal; pads lie to the right
            for layer in self.layers:
                x = layer(x, mask)
            x = self.norm(x)
            end = (
                ids.argmax(1) if self.eos == 2 else (ids == self.eos).int().argmax(1)
            )  # old configs say 2 and mean the largest id
            x = x[torch.arange(len(x), device=x.device), end]
            return x if self.projection is None else x @ self.projection.T
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, real[:, None, None])
        return (x * real[..., None]).sum(1) / lengths[:, None]  # mean over real tokens

    @torch.no_grad()
    def embed(self, texts: list[str], batch: int = 64) -> Tensor:
        """(N, D) unit vectors, batched by length."""
        rows = [self.tokenizer.encode(t).ids for t in texts]
        rows = [r if len(r) <= self.limit else r[: self.limit - 1] + r[-1:] for r in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = [None] * len(rows)
        for i in range(0, len(order), batch):
            part = order[i : i + batch]
            vectors = F.normalize(
                self.pool(*pad([rows[j] for j in part], self.words.device)), dim=1
            )
            for j, v in zip(part, vectors):
                out[j] = v
        return torch.stack(out) if out else self.words.new_zeros(0, self.words.shape[1])


class WordEncoder:
    """A text encoder that needs no weights, for `train.sh tiny`: every word has a random unit vector, a text is their sum."""

    def __init__(self, width: int = 256):
        self.width = width

    @functools.lru_cache(maxsize=100_000)
    def word(self, w: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(w.encode()).digest()[:7], "little")
        return F.normalize(
            torch.randn(self.width, generator=torch.Generator().manual_seed(seed)), dim=0
        )

    def embed(self, texts: list[str]) -> Tensor:
        sums = [
            sum((self.word(w) for w in normalise(t).split()), torch.zeros(self.width))
            for t in texts
        ]
        return F.normalize(torch.stack(sums), dim=1) if sums else torch.zeros(0, self.width)


def load_encoder(folder: str | Path, device="cpu"):
    """A BERT or CLIP folder (config.json, model.safetensors, tokenizer.json); the word "words" gives the WordEncoder."""
    if str(folder) == "words":
        return WordEncoder()
    folder = Path(folder)
    where = inside(folder, "config.json")
    if not where.exists() or not (folder / "tokenizer.json").exists():
        raise UserError(
            f"{folder} is no text-encoder folder: it needs config.json and tokenizer.json"
        )
    c = read_json(where)
    kind = c.get("model_type")
    if kind not in ("bert", "clip", "clip_text_model"):
        raise UserError(
            f"{where}: unsupported text encoder {kind!r}: want bert, clip or clip_text_model"
        )
    if kind == "clip":  # the text half of a whole CLIP
        text = c.get("text_config") or {}
        if not isinstance(text, dict):
            raise UserError(f"{where}: text_config: want an object")
        c = {
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 77,
            "vocab_size": 49408,
            **text,
            "model_type": "clip",
        }
    tokenizer = load_tokenizer(folder, number(c, "vocab_size", where, 1, 10**7))
    tensors = {
        k.removeprefix("bert.").removeprefix("text_model."): v
        for k, v in load_tensors(folder).items()
        if not k.startswith("vision_model.")
    }
    try:
        return Encoder(c, tensors, tokenizer, where).to(device)
    except KeyError as e:
        raise UserError(f"{folder}: the text encoder lacks {e.args[0]!r}") from None
