"""The decoder transformer by hand: Llama, Qwen2 and Qwen3 families.

Letters used everywhere: P prompts, G samples per prompt, B rows of completions (P*G; P*(G+1) with the demonstrations), L prompt tokens,
T completion tokens, N packed tokens, S keys, V vocabulary, D width, H query heads, K key/value heads, E width of one head.

Tokens are packed. A block sees one flat list of N real tokens, x (N, D), whatever prompts and completions they belong
to; only attention needs to know, and it is handed in as a function `attend`. There are three: whole sequences
(Transformer.forward here), prompts that run once and the completions that look back at each (batch.Batch), one new token
a row against a cache (model.generate). No padding reaches the matrix products.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import UserError
from files import number


# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Config:
    """The numbers of a config.json that shape the network; `raw` is the whole file, written back on save."""

    model_type: str
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # width inside the SwiGLU
    layers: int
    heads: int  # H
    kv_heads: int  # K; H / K query heads share one key/value head
    head_dim: int  # E; not always D / H
    eps: float  # of RMSNorm
    rope_theta: float
    rope_scaling: dict | None  # None, or llama3's four numbers
    tied: bool  # the head is the embedding matrix
    qkv_bias: bool
    out_bias: bool  # bias on attention's output projection
    mlp_bias: bool
    qk_norm: bool  # Qwen3: RMSNorm on each head's q and k
    context: int  # most tokens of a sequence
    raw: dict = field(repr=False, hash=False, compare=False, default_factory=dict)

    @staticmethod
    def from_dict(raw: dict, where: str | Path = "config.json") -> "Config":
        """Reads a Hugging Face config; raises UserError for what this file does not implement and for numbers that make no network."""

        def whole(name, high, default=None):
            return number(raw, name, where, 1, high, default)

        def flag(name):
            value = raw.get(name) or False
            if not isinstance(value, bool):
                raise UserError(f"{where}: {name} is {value!r}: want true or false")
            return value

        kind = raw.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3"):
            raise UserError(
                f"{where}: unsupported architecture {kind!r}: model_type must be llama, qwen2 or qwen3"
            )
        rope = (
            raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        )  # transformers 5 / 4 spell it so
        rope_type = (
            rope.get("rope_type", rope.get("type", "default"))
            if isinstance(rope, dict)
            else repr(rope)
        )
        if rope_type not in ("default", "llama3"):
            raise UserError(
                f"{where}: unsupported rope scaling {rope_type!r}: plain and llama3 are implemented"
            )
        scaling = (
            {
                name: number(rope, name, f"{where}: llama3 rope scaling", 1e-3, 1e9)
                for name in (
                    "factor",
                    "low_freq_factor",
                    "high_freq_factor",
                    "original_max_position_embeddings",
                )
            }
            if rope_type == "llama3"
            else None
        )
        if scaling and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise UserError(
                f"{where}: llama3 rope scaling: low_freq_factor must be below high_freq_factor"
            )
        if raw.get("use_sliding_window"):
            raise UserError(f"{where}: unsupported: use_sliding_window")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: unsupported hidden_act {raw['hidden_act']!r}: only silu")
        heads, width, bias = (
            whole("num_attention_heads", 10**4),
            whole("hidden_size", 10**6),
            flag("attention_bias"),
        )
        kv_heads, head_dim = (
            whole("num_key_value_heads", heads, heads),
            whole("head_dim", 10**4, width // heads),
        )
        if heads % kv_heads or head_dim % 2:
            raise UserError(
                f"{where}: {heads} num_attention_heads must be a multiple of {kv_heads} num_key_value_heads, and head_dim, {head_dim}, even"
            )
        return Config(
            model_type=kind,
            vocab_size=whole("vocab_size", 10**7),
            hidden_size=width,
            intermediate_size=whole("intermediate_size", 10**7),
            layers=whole("num_hidden_layers", 1000),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=number(raw, "rms_norm_eps", where, 0.0, 1.0, 1e-6),
            rope_theta=number(
                rope if raw.get("rope_theta") is None else raw,
                "rope_theta",
                where,
                1.0,
                1e12,
                10000.0,
            ),
            rope_scaling=scaling,
            tied=flag("tie_word_embeddings"),
            qkv_bias=True if kind == "qwen2" else bias,
            out_bias=False if kind == "qwen2" else bias,
            mlp_bias=kind == "llama" and flag("mlp_bias"),
            qk_norm=kind == "qwen3",
            context=whole("max_position_embeddings", 10**9, 10**9),
            raw=raw,
        )


def rope_frequencies(c: Config) -> Tensor:
    """Rotation speeds (E/2,) in radians per position: theta^(-2i/E), slowed as Llama 3.1 does if asked.

    llama3 scaling: waves longer than the old context / low_freq_factor turn `factor` times slower, waves shorter
    than context / high_freq_factor stay, those between are blended.
    """
    freq = c.rope_theta ** (
        -torch.arange(0, c.head_dim, 2, dtype=torch.float64, device="cpu") / c.head_dim
    )
    if c.rope_scaling:
        s = c.rope_scaling
        turns = (
            s["original_max_position_embeddings"] * freq / (2 * math.pi)
        )  # turns within the old context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    return freq.float()


# ------------------------------------------------------------------------------------------------ the network


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 or better."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        # under autocast every product that reads y would cast it again: once here is 5% of a training step
        return (
            y.to(torch.get_autocast_dtype(y.device.type))
            if torch.is_autocast_enabled(y.device.type)
            else y
        )


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE: pairs (x_i, x_{i+E/2}) turned by position * frequency_i. x (N, heads, E); rope: cos and sin, (N, 1, E)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, E) against k, v (B, K, S, E), H / K query heads to one key head; mask (B, 1, T, S) True = look, None = causal."""
    dtype = q.dtype
    if (
        q.dtype == torch.bfloat16 and not q.is_cuda and torch.is_grad_enabled()
    ):  # the bfloat16 backward on CPU is three times slower than float32's
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
    return y.to(dtype)


class Attention(nn.Module):
    """One product makes queries, keys and values: a wide one is faster than three."""

    def __init__(self, c: Config):
        super().__init__()
        self.c, self.heads = c, (c.heads, c.kv_heads, c.kv_heads)
        self.qkv_proj = nn.Linear(c.hidden_size, sum(self.heads) * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)

    def forward(self, x, rope, attend):
        H, K, _ = self.heads
        qkv = self.qkv_proj(x).view(len(x), H + 2 * K, self.c.head_dim)  # (N, H + 2K, E)
        qk, v = qkv.split((H + K, K), 1)
        if self.c.qk_norm:
            qk = torch.cat((self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])), 1)
        q, k = rotate(qk, rope).split((H, K), 1)
        return self.o_proj(attend(q, k, v).reshape(len(x), -1))  # attend: (N, H, E)


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x), gate and up in one product."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


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
    """Parameter names are those of Hugging Face, without their leading `model.`; `named` also takes the joined ones apart."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden_size, c.eps)
        if not c.tied:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.frequencies = rope_frequencies(
            c
        )  # no buffer: .to(bfloat16) would round it, and far positions with it
        self.source: Path | None = None  # the folder it came from: save_model copies its tokenizer

    @property
    def head(self) -> Tensor:
        return self.embed_tokens.weight if self.c.tied else self.lm_head.weight  # (V, D)

    @property
    def device(self):
        return self.head.device

    def named(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state_dict() under Hugging Face's names: views of the joined products' parts."""
        c, out = self.c, {}
        parts = {
            "qkv_proj": (
                ("q_proj", "k_proj", "v_proj"),
                [n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)],
            ),
            "gate_up_proj": (("gate_proj", "up_proj"), [c.intermediate_size] * 2),
        }
        for key, x in state.items():
            joined = next((j for j in parts if f".{j}." in key), "")
            names, sizes = parts.get(joined, ([""], len(x)))
            out.update(zip([key.replace(joined, name) for name in names], x.split(sizes)))
        return out

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
        return F.linear(self.norm(x), self.head).view(B, T, -1)
