"""log softmax(h W^T / temperature)[target], and GRPO-S's objective of it, a chunk of logits at a time.

With N = 4096 tokens and V = 49152 the logits alone are 800 MB in float32, and log_softmax with its backward keeps several such tensors.
Here rows go through in chunks, and a chunk's logits become its gradient in place. When that gradient can be formed:

    head frozen      d logp/dh = (onehot - softmax) W / temperature, (N, D), in the forward pass; the backward pass scales it
    head trained     dW sums over tokens what the backward pass has yet to say, so it forms the chunk's logits again: one more product
    grpo_loss        each token's slope is known from its log-prob: dh and dW, both in the forward pass
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import kernels
from kernels.reference import Objective

CHUNK = {
    "cpu": 2**25,
    "cuda": 2**29,
}  # bytes of a chunk's logits; on CPU their log-softmax, in float32, stands beside bfloat16 ones


def _rows(W: Tensor) -> int:
    n = max(1, CHUNK[W.device.type] // (len(W) * W.element_size()))
    return (
        n - n % 16 if n > 16 else n
    )  # slices of equal alignment: Triton compiles once for all of them


def _chunks(h: Tensor, W: Tensor):
    """Slices of the rows with their logits, which all take the same memory."""
    n = _rows(W)
    buffer = W.new_empty(min(n, len(h)), len(W))
    for i in range(0, len(h), n):
        x = h[i : i + n].to(W.dtype)
        yield slice(i, i + n), torch.mm(x, W.T, out=buffer[: len(x)])


def _add_product(dW: Tensor, dz: Tensor, h: Tensor) -> None:
    """dW += dz^T h; bfloat16 products are summed in float32."""
    if dW.dtype == dz.dtype:
        dW.addmm_(dz.T, h.to(dz.dtype))
    else:
        dW += dz.T @ h.to(dz.dtype)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, targets, temperature, dtype):
        want_h, want_W = ctx.needs_input_grad[:2]
        frozen = want_h and not want_W
        logps, dh = [], torch.empty_like(h) if frozen else None
        head = W.to(dtype)
        for s, z in _chunks(h, head):
            g = torch.ones(len(targets[s]), device=h.device) if frozen else None
            logp, _, dz = kernels.backend(z).rows(z, targets[s], temperature, g)
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
        dh, dW, head = (
            torch.empty_like(h),
            torch.zeros(W.shape, dtype=g.dtype, device=W.device),
            W.to(ctx.dtype),
        )
        for s, z in _chunks(h, head):
            dz = kernels.backend(z).rows(z, targets[s], ctx.temperature, g[s])[2]
            if ctx.needs_input_grad[0]:
                dh[s] = dz @ head
            _add_product(dW, dz, h[s])
        return dh if ctx.needs_input_grad[0] else None, dW.to(W.dtype), None, None, None


class _GRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, targets, temperature, dtype, objective):
        want_h, want_W = ctx.needs_input_grad[:2]
        logps, dh, total = [], torch.empty_like(h), 0.0
        dW = (
            torch.zeros(W.shape, dtype=torch.promote_types(W.dtype, torch.float32), device=W.device)
            if want_W
            else None
        )
        head = W.to(dtype)
        for s, z in _chunks(h, head):
            logp, loss, dz = kernels.backend(z).rows(
                z, targets[s], temperature, objective=objective.rows(s)
            )
            logps.append(logp)
            total = total + loss.sum()
            if want_h:
                dh[s] = dz @ head
            if want_W:
                _add_product(dW, dz, h[s])
        ctx.save_for_backward(dh if want_h else None, dW if want_W else None)
        logps = torch.cat(logps)
        ctx.mark_non_differentiable(logps)
        return total, logps

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        return (
            *(None if d is None else d * g.to(d.dtype) for d in ctx.saved_tensors),
            None,
            None,
            None,
            None,
        )


def _checked(h: Tensor, W: Tensor, targets: Tensor, temperature: float) -> torch.dtype:
    """Raises ValueError for what does not fit; returns the dtype of the products, the head's or what autocast wants."""
    if h.ndim != 2 or W.ndim != 2 or h.shape[1] != W.shape[1] or targets.shape != h.shape[:1]:
        raise ValueError(
            f"h {tuple(h.shape)}, W {tuple(W.shape)}, targets {tuple(targets.shape)}: want (N, D), (V, D), (N,)"
        )
    for name, x in (("h", h), ("W", W)):
        if x.dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} is {x.dtype}: want bfloat16, float32 or float64")
    if targets.dtype != torch.long:
        raise ValueError(f"targets are {targets.dtype}: want int64")
    if not h.device == W.device == targets.device:
        raise ValueError(
            f"h, W and targets are on {h.device}, {W.device}, {targets.device}: want one device"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return (
        torch.get_autocast_dtype(h.device.type)
        if torch.is_autocast_enabled(h.device.type)
        else W.dtype
    )


def token_logprobs(h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of each target token: hidden states h (N, D), head W (V, D), targets (N,) -> (N,), float32 (float64 for float64).

    Differentiable in h and W, once. Raises ValueError on shapes, dtypes or devices that do not fit and on a temperature that is not positive.
    """
    dtype = _checked(h, W, targets, temperature)
    if len(h) == 0:
        return h.sum(-1) if h.dtype == torch.float64 else h.float().sum(-1)
    return _TokenLogProbs.apply(h, W, targets, temperature, dtype)


def grpo_loss(
    h: Tensor, W: Tensor, targets: Tensor, objective: Objective, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """-sum_n weight_n J_n, a scalar, and the tokens' log-probs (N,), not differentiable; J is kernels.clipped_objective.

    h, W, targets, temperature and errors as for token_logprobs. Differentiable in h and W, once.
    """
    dtype = _checked(h, W, targets, temperature)
    for name in ("advantage", "weight", "logp_ref", "logp_old"):
        x = getattr(objective, name)
        if x is not None and (x.shape != targets.shape or x.device != h.device):
            raise ValueError(
                f"{name} {tuple(x.shape)} on {x.device}: want {tuple(targets.shape)} on {h.device}"
            )
    if len(h) == 0:
        return h.float().sum(), h.float().sum(-1)
    return _GRPOLoss.apply(h, W, targets, temperature, dtype, objective)
