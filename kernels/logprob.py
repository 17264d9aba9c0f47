"""log softmax(h W^T / temperature)[target] without ever holding an (N, V) tensor.

With N = 4096 tokens and V = 49152 the logits alone are 800 MB in float32, and log_softmax with its backward keeps
several such tensors. Here rows go through in chunks, for O(chunk * V) memory. While the head is frozen each row's gradient,
d logp/dh = (onehot - softmax) W / temperature, is formed from the logits at hand, and the backward only scales it; otherwise
the forward keeps the log-sum-exp of each row, and the backward forms the chunk's logits again: one more matrix product.
"""
import torch
from torch import Tensor

CHUNK = 128  # rows of logits alive at a time: 25 MB at V = 49152


def _logits(h: Tensor, W: Tensor, temperature: float) -> Tensor:
    out = h.to(W.dtype) @ W.T
    out = out if out.dtype == torch.float64 else out.float()             # at least float32 from here on
    return out if temperature == 1 else out.div_(temperature)


def _dlogits(z: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    """onehot - softmax from logits z (rows, V), in place."""
    z = z.sub_(lse[:, None]).exp_().neg_()
    return z.scatter_add_(1, targets[:, None], torch.ones_like(z[:, :1]))


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, targets, temperature):
        want_h, want_W = ctx.needs_input_grad[:2]
        logps, lses, dh = [], [], []
        for rows, t in zip(h.split(CHUNK), targets.split(CHUNK)):
            z = _logits(rows, W, temperature)                            # (chunk, V)
            lses.append(z.logsumexp(-1))
            logps.append(z.gather(1, t[:, None])[:, 0] - lses[-1])
            if want_h and not want_W:
                dh.append((_dlogits(z, lses[-1], t).to(W.dtype) @ W).to(h.dtype))
        ctx.temperature = temperature
        ctx.save_for_backward(*((torch.cat(dh),) if dh else (h, W, targets, torch.cat(lses))))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, g):
        g = (g / ctx.temperature)[:, None]
        if len(ctx.saved_tensors) == 1:
            dh, = ctx.saved_tensors
            return dh * g.to(dh.dtype), None, None, None
        h, W, targets, lses = ctx.saved_tensors
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(W, dtype=lses.dtype)
        for i in range(0, len(h), CHUNK):
            s = slice(i, i + CHUNK)
            z = _dlogits(_logits(h[s], W, ctx.temperature), lses[s], targets[s])
            z = z.mul_(g[s]).to(W.dtype)                                 # of the loss
            if dh is not None:
                dh[s] = (z @ W).to(h.dtype)
            dW += (z.T @ h[s].to(W.dtype)).to(dW.dtype)
        return dh, dW.to(W.dtype), None, None


def token_logprobs(h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of each target token: hidden states h (N, D), head W (V, D), targets (N,) -> (N,), float32 (float64 for float64).

    Differentiable in h and W. Raises ValueError on shapes that do not fit or a temperature that is not positive.
    """
    if h.ndim != 2 or W.ndim != 2 or h.shape[1] != W.shape[1] or targets.shape != h.shape[:1]:
        raise ValueError(f"h {tuple(h.shape)}, W {tuple(W.shape)}, targets {tuple(targets.shape)}: want (N, D), (V, D), (N,)")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if len(h) == 0:
        return (h.float().sum(-1) if h.dtype != torch.float64 else h.sum(-1))
    if torch.is_autocast_enabled(h.device.type):
        W = W.to(torch.get_autocast_dtype(h.device.type))
    return _TokenLogProbs.apply(h, W, targets, temperature)
