"""The decoder transformer by hand: the Llama, Qwen2 and Qwen3 families.

Letters in most files: P prompts, G samples per prompt, B completions (P*G), L prompt tokens,
T completion tokens, N packed tokens, S keys, V vocabulary, D width, H query heads, K key heads,
E width of a head. reward.py, encoder.py, grpo_s.py, kernels/ and read_tokens redefine
some of them.

Tokens are packed: a block sees one list of N real tokens, x (N, D), of whatever sequences. Only
attention must know which token may look at which; it comes as a function attend(q, k, v). There
are three: whole sequences (Transformer.forward), prompts with their completions (sample.Batch) and
one new token a row against a cache (sample.read_tokens).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a config.json that shape the network (support/hf.py reads them)."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # width inside the SwiGLU
    layers: int
    heads: int  # H
    kv_heads: int  # K; H / K query heads share a key head
    head_dim: int  # E; not always D / H
    eps: float  # of RMSNorm
    rope_theta: float
    rope_scaling: dict | None  # None, or llama3's four numbers
    tied: bool  # the head is the embedding matrix
    qkv_bias: bool
    out_bias: bool  # of attention's output projection
    mlp_bias: bool
    qk_norm: bool  # Qwen3: RMSNorm on each head's q and k
    raw: dict  # the whole file


def rope_frequencies(c: ModelConfig) -> Tensor:
    """Rotation speeds (E/2,) in radians per position: theta^(-2i/E).

    llama3 scaling: waves longer than context / low_freq_factor turn `factor` times slower, waves
    shorter than context / high_freq_factor stay, those between are blended.
    """
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if s := c.rope_scaling:
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    return freq.float()


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 or better."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        kind = y.device.type  # one cast here saves one in each product that reads y
        return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE: pairs (x_i, x_{i+E/2}) turned by position * frequency_i.

    x (N, heads, E); rope: cos and sin, each (N, 1, E).
    """
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, E) against k, v (B, K, S, E), H / K query heads to a key head.

    mask (B, 1, T, S): True where a token may look; None: causal.
    """
    dtype, gqa = q.dtype, q.shape[1] != k.shape[1]
    if dtype == torch.bfloat16 and not q.is_cuda and torch.is_grad_enabled():
        q, k, v = q.float(), k.float(), v.float()  # bfloat16's backward on a CPU is 3x slower
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)
    return y.to(dtype)


class Attention(nn.Module):
    """Queries, keys and values come out of one product: a wide one is faster than three."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        width = (c.heads + 2 * c.kv_heads) * c.head_dim
        self.qkv_proj = nn.Linear(c.hidden_size, width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden_size, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.eps), RMSNorm(c.head_dim, c.eps)

    def forward(self, x: Tensor, rope, attend) -> Tensor:
        H, K, E = self.config.heads, self.config.kv_heads, self.config.head_dim
        qk, v = self.qkv_proj(x).view(len(x), H + 2 * K, E).split((H + K, K), 1)
        if self.config.qk_norm:
            qk = torch.cat((self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])), 1)
        q, k = rotate(qk, rope).split((H, K), 1)
        return self.o_proj(attend(q, k, v).reshape(len(x), -1))  # attend: (N, H, E)


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x), gate and up in one product."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope, attend) -> Tensor:
        """x (N, D) -> (N, D). attend(q, k, v) knows which token may look at which."""
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Names are Hugging Face's without `model.`, except qkv_proj and gate_up_proj."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden_size, c.eps)
        if not c.tied:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.source = None  # or a Path: the folder it came from, with its tokenizer

    @property
    def head(self) -> Tensor:
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight  # (V, D)

    @property
    def device(self) -> torch.device:
        return self.head.device

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (N, 1, E) in float32, for positions (N,)."""
        frequencies = rope_frequencies(self.config)  # .to(bfloat16) would round a buffer
        angle = positions[:, None, None].float() * frequencies.to(positions.device)
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
