"""The decoder transformer by hand: Llama, Qwen2 and Qwen3 families, from and to Hugging Face folders.

Letters used everywhere: P prompts, G samples per prompt, B = rows of completions (P*G), L prompt tokens,
T completion tokens, V vocabulary, D width, H query heads, K key/value heads, E width of one head.

Two decisions shape this file:
1. Tokens are packed. A block sees one flat list of real tokens, x (N, D), whatever prompts and completions they belong
   to; only attention needs to know, and it is handed in as a function `attend`. There are three: whole sequences
   (Transformer.forward), prompts that run once and the G completions that look back at each (Batch), one new token
   a row against a cache (generate). No padding reaches the matrix products.
2. Any range of blocks can run: the policy trains only its top blocks, and the reward models share a frozen trunk with
   the reference policy.
"""
import copy
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import kernels
from data import UserError, completion_mask, pad


# ------------------------------------------------------------------------------------------------ configuration

@dataclass(frozen=True)
class Config:
    """The numbers of a config.json that shape the network; `raw` is the whole file, written back on save."""
    model_type: str
    vocab_size: int
    hidden_size: int             # D
    intermediate_size: int       # width inside the SwiGLU
    layers: int
    heads: int                   # H
    kv_heads: int                # K; H / K query heads share one key/value head
    head_dim: int                # E; not always D / H
    eps: float                   # of RMSNorm
    rope_theta: float
    rope_scaling: dict | None    # None, or llama3's four numbers
    tied: bool                   # the head is the embedding matrix
    qkv_bias: bool
    out_bias: bool               # bias on attention's output projection
    mlp_bias: bool
    qk_norm: bool                # Qwen3: RMSNorm on each head's q and k
    raw: dict = field(repr=False, hash=False, compare=False, default_factory=dict)

    @staticmethod
    def from_dict(raw: dict) -> "Config":
        """Reads a Hugging Face config; raises UserError for what this file does not implement."""
        kind = raw.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3"):
            raise UserError(f"unsupported architecture {kind!r}: model_type must be llama, qwen2 or qwen3")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 / 4 spell it so
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        lost = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"} - rope.keys() if rope_type == "llama3" else ()
        if lost:
            raise UserError(f"config.json: llama3 rope scaling lacks {', '.join(sorted(lost))}")
        if rope_type not in ("default", "llama3"):
            raise UserError(f"unsupported rope scaling {rope_type!r}: plain and llama3 are implemented")
        if raw.get("use_sliding_window"):
            raise UserError("unsupported: use_sliding_window")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"unsupported hidden_act {raw['hidden_act']!r}: only silu")
        try:
            heads, width = raw["num_attention_heads"], raw["hidden_size"]
            bias = bool(raw.get("attention_bias", False))
            return Config(
                model_type=kind, vocab_size=raw["vocab_size"], hidden_size=width, intermediate_size=raw["intermediate_size"],
                layers=raw["num_hidden_layers"], heads=heads, kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or width // heads, eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=raw.get("rope_theta") or rope.get("rope_theta", 10000.0),
                rope_scaling=rope if rope_type == "llama3" else None, tied=bool(raw.get("tie_word_embeddings", False)),
                qkv_bias=True if kind == "qwen2" else bias, out_bias=False if kind == "qwen2" else bias,
                mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)), qk_norm=kind == "qwen3", raw=raw)
        except KeyError as e:
            raise UserError(f"config.json lacks {e.args[0]!r}") from None


def rope_frequencies(c: Config) -> Tensor:
    """Rotation speeds (E/2,) in radians per position: theta^(-2i/E), slowed as Llama 3.1 does if asked.

    llama3 scaling: waves longer than the old context / low_freq_factor turn `factor` times slower, waves shorter
    than context / high_freq_factor stay, those between are blended.
    """
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling:
        s = c.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # turns within the old context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    return freq.float()


# ------------------------------------------------------------------------------------------------ the network

class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 whatever the dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE: pairs (x_i, x_{i+E/2}) turned by position * frequency_i. x (N, heads, E); rope: cos and sin, (N, 1, E)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, E) against k, v (B, K, S, E), H / K query heads to one key head; mask (B, 1, T, S) True = look, None = causal."""
    dtype = q.dtype
    if not q.is_cuda and torch.is_grad_enabled():            # the bfloat16 backward on CPU is three times slower than float32's
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return y.to(dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)

    def forward(self, x, rope, attend):
        q = self.q_proj(x).view(len(x), self.c.heads, self.c.head_dim)           # (N, H, E)
        k = self.k_proj(x).view(len(x), self.c.kv_heads, self.c.head_dim)        # (N, K, E)
        v = self.v_proj(x).view(len(x), self.c.kv_heads, self.c.head_dim)
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        y = attend(rotate(q, rope), rotate(k, rope), v)                          # (N, H, E)
        return self.o_proj(y.reshape(len(x), -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope, attend) -> Tensor:
        """x (N, D) -> (N, D), for N tokens of any sequences. attend(q, k, v) knows which may look at which."""
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Parameter names are those of Hugging Face, without their leading `model.`."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden_size, c.eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.frequencies = rope_frequencies(c)   # no buffer: .to(bfloat16) would round it, and far positions with it
        self.source: Path | None = None          # the folder it came from: save_model copies its tokenizer

    @property
    def head(self) -> Tensor:
        return self.lm_head.weight               # (V, D)

    @property
    def device(self):
        return self.head.device

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (N, 1, E) for positions (N,), in float32."""
        angle = positions[:, None, None].float() * self.frequencies.to(positions.device)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def forward(self, ids: Tensor) -> Tensor:
        """Plain causal pass over whole sequences: ids (B, T) -> logits (B, T, V)."""
        B, T = ids.shape

        def attend(q, k, v):
            q, k, v = (z.view(B, T, z.shape[1], -1).transpose(1, 2) for z in (q, k, v))
            return attention(q, k, v).transpose(1, 2).flatten(0, 1)
        rope = self.rope(torch.arange(T, device=ids.device).repeat(B))
        x = self.embed_tokens(ids.flatten())
        for block in self.layers:
            x = block(x, rope, attend)
        return self.lm_head(self.norm(x)).view(B, T, -1)


# ------------------------------------------------------------------------------------------------ prompts with completions

class Level:
    """Token rows that each continue a row of the level before: padded (R, C), with masks."""

    def __init__(self, rows: list[list[int]], parent: "Level | None", owner: Tensor, device):
        self.ids, lengths = pad(rows, device)                # (R, C), (R,)
        self.owner = owner                                   # (R,) the row of the level before that each row continues
        R, C = self.ids.shape
        self.mask = completion_mask(torch.zeros_like(lengths), lengths, C)       # (R, C) True on real tokens
        self.slots = self.mask.flatten().nonzero()[:, 0]     # where each packed token stands in the padded table
        at = torch.arange(C, device=device)
        starts = torch.zeros_like(lengths) if parent is None else parent.ends[owner]
        self.ends = starts + lengths                         # position after each row's last token
        self.positions = (starts[:, None] + at)[self.mask]
        self.seen = self.mask if parent is None else torch.cat((parent.seen[owner], self.mask), 1)   # (R, S) real tokens, ancestors first
        own = (at <= at[:, None]).expand(R, 1, C, C)         # may look at: all real tokens of its ancestors, its own past
        self.look = None if parent is None else torch.cat((parent.seen[owner][:, None, None].expand(R, 1, C, -1), own), 3)

    def spread(self, x: Tensor) -> Tensor:
        """Packed (n, heads, E) -> padded (R, heads, C, E)."""
        R, C = self.ids.shape
        table = x.new_zeros(R * C, x.shape[1] * x.shape[2]).index_copy(0, self.slots, x.flatten(1))
        return table.view(R, C, x.shape[1], x.shape[2]).transpose(1, 2)


class Batch:
    """P prompts and B completions as N packed tokens, in three levels: what all prompts start with (the system turn), run once;
    the rest of each prompt; the completions, each continuing its prompt."""

    def __init__(self, prompts: list[list[int]], completions: list[list[list[int]]], device="cpu", shared: int | None = None):
        """completions[p] lists the token lists that answer prompts[p]; groups may differ in size. shared: length of the common start, found if None."""
        if shared is None:
            if not all(prompts) or not prompts:
                raise ValueError("every prompt needs at least one token")
            shared = len(os.path.commonprefix(prompts))
            shared = max(0, min(shared, min(map(len, prompts)) - 1))             # every prompt keeps a token of its own
        self.source, self.shared = (prompts, completions), shared
        self.owner = torch.tensor([p for p, group in enumerate(completions) for _ in group], dtype=torch.long, device=device)   # (B,)
        start = Level([prompts[0][:shared]], None, None, device)
        middle = Level([p[shared:] for p in prompts], start, torch.zeros(len(prompts), dtype=torch.long, device=device), device)
        end = Level([c for group in completions for c in group], middle, self.owner, device)
        self.levels = start, middle, end
        self.completions, self.mask = end.ids, end.mask      # (B, T); mask True on real tokens, the end-of-text token included
        self.ids = torch.cat([level.ids[level.mask] for level in self.levels])   # (N,)
        self.positions = torch.cat([level.positions for level in self.levels])   # (N,)
        self.first = len(start.slots) + len(middle.slots)    # packed index of the first completion token
        self.prompt_last = len(start.slots) + middle.mask.sum(1).cumsum(0) - 1   # (P,) packed index of each prompt's last token
        self.before = torch.arange(self.first - 1, len(self.ids) - 1, device=device)             # the token before each completion token:
        sizes = end.mask.sum(1)
        self.before[(sizes.cumsum(0) - sizes)[sizes > 0]] = self.prompt_last[self.owner][sizes > 0]  # for its first, the end of its prompt

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep=None) -> Tensor:
        """Each level looks at its ancestors' keys and its own past. keep: collects the prompts' keys and values, (P, K, S, E) each."""
        sizes, out, keys, values = [len(level.slots) for level in self.levels], [], None, None
        for level, ql, kl, vl in zip(self.levels, q.split(sizes), k.split(sizes), v.split(sizes)):
            ql, kl, vl = level.spread(ql), level.spread(kl), level.spread(vl)
            if level.look is not None:
                kl, vl = torch.cat((keys[level.owner], kl), 2), torch.cat((values[level.owner], vl), 2)
            keys, values = kl, vl
            if level is self.levels[1] and keep is not None:
                keep.append((keys, values))
            if len(level.slots):
                out.append(attention(ql, keys, values, level.look).transpose(1, 2).flatten(0, 1)[level.slots])
        return torch.cat(out)

    def select(self, prompts: list[int]) -> tuple["Batch", Tensor, Tensor]:
        """The batch of some prompts with their completions; where its tokens stand in this one (n,); which completions they are."""
        texts, groups = self.source
        keep = torch.zeros(len(texts), dtype=torch.bool, device=self.ids.device)
        keep[prompts] = True
        start, middle, end = self.levels
        chosen = torch.cat((start.mask[start.mask], keep[:, None].expand_as(middle.mask)[middle.mask], keep[self.owner][:, None].expand_as(end.mask)[end.mask]))
        part = Batch([texts[p] for p in sorted(prompts)], [groups[p] for p in sorted(prompts)], self.ids.device, self.shared)
        return part, chosen.nonzero()[:, 0], keep[self.owner].nonzero()[:, 0]


def run_blocks(model: Transformer, batch: Batch, x: Tensor | None = None, start: int = 0, stop: int | None = None) -> Tensor:
    """Hidden states (N, D) of a batch after blocks start .. stop - 1; x: those before block `start` (None: the embeddings)."""
    x = model.embed_tokens(batch.ids) if x is None else x
    rope = model.rope(batch.positions)
    for block in model.layers[start:stop]:
        x = block(x, rope, batch.attend)
    return x


def logps_of_hidden(model: Transformer, x: Tensor, batch: Batch, temperature=1.0) -> Tensor:
    """log pi(token | what stands before it) of every completion token, (B, T), zero where masked, from the last block's output (N, D)."""
    logps = kernels.token_logprobs(model.norm(x[batch.before]), model.head, batch.completions[batch.mask], temperature)
    return logps.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logps)


def token_logps(model: Transformer, batch: Batch, temperature: float = 1.0, frozen: int = 0) -> Tensor:
    """log softmax(logits / temperature)[token] of every completion token: (B, T) float32, zero where `batch.mask` is False.

    The lowest `frozen` blocks run without keeping anything for a backward pass.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and frozen == 0):
        x = run_blocks(model, batch, stop=frozen)
    return logps_of_hidden(model, run_blocks(model, batch, x, start=frozen), batch, temperature)


# ------------------------------------------------------------------------------------------------ generation

@dataclass
class Rollout:
    """What generate returns; row p * samples + g is sample g of prompt p."""
    tokens: Tensor  # (B, T) long
    mask: Tensor    # (B, T) True where a token was sampled, the end-of-text token included
    logps: Tensor   # (B, T) float32, under the distribution sampled from; 0 where masked

    def rows(self) -> list[list[int]]:
        return [t[m].tolist() for t, m in zip(self.tokens, self.mask)]


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> tuple[Tensor, Tensor]:
    """One token a row from logits (B, V): ids (B,) and their log-probs under the (filtered) distribution. temperature 0: the best."""
    logits = logits.float()
    if temperature == 0:
        best = logits.argmax(-1)
        return best, logits.log_softmax(-1).gather(1, best[:, None])[:, 0]
    logits = logits / temperature
    if top_k and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        p = sorted_logits.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p                     # keep the smallest set that reaches top_p
        logits = logits.masked_fill(drop.gather(1, order.argsort(-1)), -math.inf)
    p = logits.softmax(-1)
    # Inverse-CDF sampling: one uniform a row and a search; torch.multinomial draws V exponentials a row instead.
    cdf = p.cumsum(-1)
    u = torch.rand(p.shape[0], 1, generator=generator, device=p.device) * cdf[:, -1:]
    ids = torch.searchsorted(cdf, u, right=True).clamp(max=p.shape[1] - 1)
    return ids[:, 0], p.gather(1, ids)[:, 0].log()


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], samples: int = 1, max_new_tokens: int = 64, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, eos: tuple[int, ...] = ()) -> Rollout:
    """Samples `samples` completions of each prompt (token lists). Prompts run once; their cache is then shared out to the group.

    A row stops after any id of `eos`, which is kept. Finished rows leave the batch when an eighth of it is done.
    """
    device, c = model.device, model.c
    generator = torch.Generator(device=device).manual_seed(seed)
    batch, keys = Batch(prompts, [[] for _ in prompts], device), []
    x, rope = model.embed_tokens(batch.ids), model.rope(batch.positions)
    for block in model.layers:
        x = block(x, rope, lambda q, k, v: batch.attend(q, k, v, keys))
    owner = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    h, (B, L) = x[batch.prompt_last][owner], batch.levels[1].seen[owner].shape   # (B, D): hidden states where a token will be chosen
    cache = []                                               # per block [keys, values], each (B, K, L + new, E)
    for kv in keys:
        cache.append([z.new_empty(B, c.kv_heads, L + max_new_tokens, c.head_dim) for z in kv])
        for whole, z in zip(cache[-1], kv):
            whole[:, :, :L] = z[owner]
    keys.clear()

    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    mask, logps = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(B, max_new_tokens, device=device)
    stop = torch.tensor(list(eos), dtype=torch.long, device=device)
    row = torch.arange(B, device=device)                     # which output row each batch row writes
    done = torch.zeros(B, dtype=torch.bool, device=device)
    can_see = torch.ones(B, 1, 1, L + max_new_tokens, dtype=torch.bool, device=device)
    can_see[..., :L] = batch.levels[1].seen[owner][:, None, None]
    position = batch.levels[1].ends[owner]
    for t in range(max_new_tokens):
        token, logp = choose(F.linear(model.norm(h), model.head), temperature, top_k, top_p, generator)
        live = ~done
        tokens[row[live], t], logps[row[live], t], mask[row[live], t] = token[live], logp[live], True
        done |= torch.isin(token, stop)
        finished = int(done.sum())
        if finished == len(done) or t + 1 == max_new_tokens:
            break
        if finished * 8 >= len(done):
            keep = (~done).nonzero()[:, 0]
            row, token, done, can_see, position = row[keep], token[keep], done[keep], can_see[keep], position[keep]
            cache = [[k[keep] for k in kv] for kv in cache]
        h, rope, end = model.embed_tokens(token), model.rope(position), L + t

        def attend(q, k, v):                                 # one token a row: its H/K query heads are rows against one key head
            K[:, :, end], V[:, :, end] = k, v
            q = q.view(len(q), c.kv_heads, -1, c.head_dim)
            return attention(q, K[:, :, :end + 1], V[:, :, :end + 1], can_see[..., :end + 1]).flatten(1, 2)
        for block, (K, V) in zip(model.layers, cache):
            h = block(h, rope, attend)
        position = position + 1
    return Rollout(tokens, mask, logps)


# ------------------------------------------------------------------------------------------------ folders

def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e.strerror if isinstance(e, OSError) else e}") from None


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: model.safetensors, or the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    tensors = {}
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"no weights: {folder / name} does not exist (only safetensors are read)")
        try:
            tensors.update(load_file(folder / name))
        except Exception as e:
            raise UserError(f"cannot read {folder / name}: {e}") from None
    return tensors


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device="cpu") -> Transformer:
    """Loads a Hugging Face folder (config.json and safetensors). Raises UserError if something is missing or unsupported."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    model = Transformer(Config.from_dict(read_json(folder / "config.json")))
    tensors = {k.removeprefix("model."): v for k, v in load_tensors(folder).items() if not k.endswith("rotary_emb.inv_freq")}
    if model.c.tied:
        tensors["lm_head.weight"] = tensors.get("embed_tokens.weight")
    want, got = {k: tuple(v.shape) for k, v in model.state_dict().items()}, {k: tuple(v.shape) for k, v in tensors.items() if v is not None}
    wrong = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
    if wrong:
        k = wrong[0]
        raise UserError(f"{folder}: tensor {k} has shape {got.get(k)}, config.json asks for {want.get(k)} ({len(wrong)} such tensors)")
    model.load_state_dict(tensors)
    model.source = folder
    return model.to(device=device, dtype=dtype)


def save_model(model: Transformer, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a folder that transformers, vLLM and load_model read; tokenizer files are copied from the folder it came from."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {(k if k.startswith("lm_head") else "model." + k): v.detach().to("cpu", dtype or v.dtype).contiguous()
             for k, v in model.state_dict().items() if not (model.c.tied and k == "lm_head.weight")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)            # one file now; old shards must not be read again
    raw = dict(model.c.raw)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    if model.source and model.source.resolve() != folder.resolve():
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (model.source / name).exists():
                shutil.copyfile(model.source / name, folder / name)


def frozen_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy without gradients, for sampling and scoring; `copy.load_state_dict(model.state_dict())` refreshes it."""
    return copy.deepcopy(model).to(dtype).requires_grad_(False)
