"""Exercise 15: estimate from one sample how far pi has moved.

Difficulty 1 of 3, 10 minutes. Read first: teach/WALKTHROUGH.md, section The loss.

A penalty holds the policy near the warm start: KL(pi, pi_ref) = E_pi[log pi - log pi_ref] per
token. The obvious estimate from a sampled token, log pi - log pi_ref, is right on average, but
often negative, and noisy. k3 (Schulman, "Approximating KL Divergence", 2020) adds a term whose mean
is 0: exp(d) - 1, as E_pi[pi_ref / pi] = 1. The result is the distance between a curve and its
tangent, so it is never negative.

Hint: mind the sign of d. The test of the mean lists all tokens of a small vocabulary; you can do so
on paper with two.
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """k3 = exp(d) - d - 1 with d = logp_ref - logp, clamped to [-20, 20] so that exp stays finite.

    Any shape -> the same shape and dtype, in nats. Differentiable in logp: dk3/dlogp = 1 - exp(d),
    and 0 beyond the clamp.
    """
    raise NotImplementedError
