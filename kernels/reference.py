"""Rows of logits and groups of rewards, in torch: the CPU's path.

With p = softmax(z / t) and logp = log p_target of a row of logits z:

    d logp / d z_v = (1[v = target] - p_v) / t
"""

import torch
from torch import Tensor


def rows(z: Tensor, targets: Tensor, temperature: float, g: Tensor | None = None):
    """logp (n,) of logits z (n, V) and targets (n,), and the gradient of sum(g * logp) in z.

    g (n,) or None: no gradient is formed. The gradient (n, V) has z's dtype. z is overwritten.
    """
    x = z.to(torch.promote_types(z.dtype, torch.float32))  # z itself, or a copy of bfloat16
    if temperature != 1:
        x.div_(temperature)
    log_softmax = torch.log_softmax(x, -1, out=x)  # in place: (n, V) is large
    logp = log_softmax.gather(1, targets[:, None])[:, 0]
    if g is None:
        return logp, None
    slope = g.to(x.dtype)[:, None] / temperature
    dz = log_softmax.exp_().mul_(-slope).scatter_add_(1, targets[:, None], slope)
    dz[slope[:, 0] == 0] = 0  # a token left out may hold anything, NaN too
    return logp, dz if dz.dtype == z.dtype else z.copy_(dz)


def advantage(rewards: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """kernels.group_advantage of rewards (P, G) and alpha (P, G)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = centred.pow(2).mean(dim=1, keepdim=True).sqrt()
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # their mean may round off
    return alpha * (centred / (std + eps)).masked_fill(equal, 0.0)
