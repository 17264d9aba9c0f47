"""Log-probs of tokens without all their logits, and GRPO-S's group advantages.

With N = 4096 tokens and V = 49152, float32 logits take 800 MB, and log_softmax keeps several such
tensors. Here rows pass in chunks, and each chunk's logits become their gradient in place.
"""

import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import reference

CHUNK = {"cpu": 2**25, "cuda": 2**29}  # bytes of a chunk's logits


def backend(x: Tensor):
    """The module that computes for x; the variable DRIRL_KERNELS=triton or torch forces one."""
    fits = x.is_cuda and x.dtype in (torch.float32, torch.bfloat16)
    choice = os.environ.get("DRIRL_KERNELS") or ("triton" if fits else "torch")
    if choice == "triton":
        from kernels import triton_kernels

        return triton_kernels
    if choice == "torch":
        return reference
    raise ValueError(f"DRIRL_KERNELS={choice}: want triton or torch")


def chunks(h: Tensor, W: Tensor):
    """Slices of the rows with their logits h W^T. All logits are written into the same memory."""
    n = max(1, CHUNK[W.device.type] // (len(W) * W.element_size()))
    n -= n % 16 if n > 16 else 0  # Triton compiles anew for another alignment
    buffer = W.new_empty(min(n, len(h)), len(W))
    for i in range(0, len(h), n):
        x = h[i : i + n].to(W.dtype)
        yield slice(i, i + n), torch.mm(x, W.T, out=buffer[: len(x)])


class TokenLogProbs(torch.autograd.Function):
    """Head frozen: the forward pass forms dlogp/dh, and the backward pass scales it by g.

    Head trained: dW = sum_n g_n dlogp_n/dW needs g, so the backward pass forms the logits again.
    """

    @staticmethod
    def forward(ctx, h, W, targets, temperature, dtype):
        frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        logps, dh = [], torch.empty_like(h) if frozen else None
        head = W.to(dtype)
        for s, z in chunks(h, head):
            g = torch.ones(len(z), device=h.device) if frozen else None
            logp, dz = backend(z).rows(z, targets[s], temperature, g)
            logps.append(logp)
            if frozen:
                dh[s] = dz @ head
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.save_for_backward(*((dh,) if frozen else (h, W, targets)))
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if len(ctx.saved_tensors) == 1:
            (dh,) = ctx.saved_tensors
            return dh * g[:, None].to(dh.dtype), None, None, None, None
        h, W, targets = ctx.saved_tensors
        dh, head = torch.empty_like(h), W.to(ctx.dtype)
        dW = torch.zeros(W.shape, dtype=g.dtype, device=W.device)
        for s, z in chunks(h, head):
            _, dz = backend(z).rows(z, targets[s], ctx.temperature, g[s])
            dh[s] = dz @ head
            if dW.dtype == dz.dtype:
                dW.addmm_(dz.T, h[s].to(dz.dtype))
            else:
                dW += dz.T @ h[s].to(dz.dtype)  # bfloat16 products, summed in float32
        return dh, dW.to(W.dtype), None, None, None


def token_logprobs(h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(W h_n / temperature)[target_n] of hidden states h (N, D) and head W (V, D).

    targets (N,) int64 -> (N,) float32, or float64 for float64. Products are in autocast's dtype,
    else in W's. Differentiable in h and W, once. ValueError: shapes, devices, temperature.
    """
    if h.ndim != 2 or W.ndim != 2 or h.shape[1] != W.shape[1] or targets.shape != h.shape[:1]:
        shapes = f"h {tuple(h.shape)}, W {tuple(W.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes}: want (N, D), (V, D), (N,)")
    if not h.device == W.device == targets.device:
        raise ValueError(f"want one device: {h.device}, {W.device}, {targets.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if len(h) == 0:
        return h.sum(-1, dtype=torch.promote_types(h.dtype, torch.float32))
    autocast = torch.is_autocast_enabled(h.device.type)
    dtype = torch.get_autocast_dtype(h.device.type) if autocast else W.dtype
    return TokenLogProbs.apply(h, W, targets, temperature, dtype)


def group_advantage(rewards: Tensor, alpha: Tensor | float = 1.0, eps: float = 1e-4) -> Tensor:
    """A_i = alpha (R_i - mean R) / (std R + eps) within each group (DR-IRL v3; GRPO: alpha 1).

    rewards (P, G) floating point; alpha a number, (P, 1) or (P, G) -> (P, G). std has divisor G.
    A group of equal rewards gets exactly 0. ValueError: shapes, dtypes, alpha not finite, eps < 0.
    """
    if rewards.ndim != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be (P, G) floats: {tuple(rewards.shape)}, {rewards.dtype}")
    alpha = torch.as_tensor(alpha, dtype=rewards.dtype, device=rewards.device)
    if alpha.shape not in ((), (len(rewards), 1), rewards.shape):
        raise ValueError(f"alpha must be a number, (P, 1) or (P, G), got {tuple(alpha.shape)}")
    if not alpha.isfinite().all() or not eps >= 0:
        raise ValueError(f"alpha must be finite, and eps not negative; eps is {eps}")
    return backend(rewards).advantage(rewards, alpha.expand(rewards.shape), eps)
