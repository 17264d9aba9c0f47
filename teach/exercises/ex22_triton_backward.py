"""Exercise 22: the gradient in place of the logits.

Difficulty 3 of 3, 30 minutes. Read first: teach/WALKTHROUGH.md, section Kernels.

Autograd keeps the log-softmax of the forward pass, (N, V), and writes a gradient of the same size
beside it. But once log-sum-exp is known, a logit's gradient needs that logit alone. So a second
pass can replace each logit by its gradient, and no further memory is used. This is how kernels/
never holds the logits of all tokens, nor their gradient.

Hint: begin with your kernel of exercise 21. Read the target's logit first: when one
warp of a GPU ends a pass, another may be in the next. dlogp/dz_v = (1[v = target] - p_v) /
temperature with p_v = exp(z_v / temperature - lse). A token left out (its G is 0) may have NaN
logits, so its gradient must be set to 0; a product would stay NaN.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gradient_kernel(Z, stride, T, G, LOGP, inv_temperature, V, BLOCK: tl.constexpr):
    """LOGP[n] as in exercise 21. Then, in place of Z[n, v] for v < V,

        G[n] * inv_temperature * (1[v = T[n]] - exp(x_v - lse)), exactly 0 where G[n] is 0.

    Z here: the logits; T: the targets; G: the weights of the log-probs. n = tl.program_id(0),
    x_v = Z[n, v] * inv_temperature, lse = log sum_v exp(x_v). Z[n, v] lies at Z + n * stride + v.
    Nothing else may be written.
    """
    raise NotImplementedError


def rows(z: Tensor, targets: Tensor, temperature: float, g: Tensor | None = None, block: int = 0):
    """The launcher, given: z (N, V) float32, targets (N,), g (N,) -> log-probs (N,), and z itself.

    z then holds d sum(g * logp) / dz.
    """
    logp = torch.full((len(z),), math.nan)
    gradient_kernel[(len(z),)](
        z, z.stride(0), targets, g, logp, 1 / temperature, z.shape[1], BLOCK=block or 1024
    )
    return logp, z
