"""Exercise 16: the loss of GRPO-S, the one that training descends (grpo_s.update calls it).

Difficulty 3 of 3, 45 minutes. Read first: teach/WALKTHROUGH.md, section The loss.

The samples come from pi_old. After an optimizer step the policy is another, and the ratio rho
corrects for that. The clip takes the gradient away once a good token has become too much likelier,
or a bad one too much less likely. It never holds back a step that undoes a mistake: that is what
the min is for. With clip_high 0 a good sample has no ratio at all: it is learnt as SFT learns,
A times the gradient of log pi. Advantages (exercise 13, scaled by 12) and the penalty (15) come
together here.

Hint: index with the mask before any arithmetic. Masked positions hold anything, and NaN * 0 is NaN,
in the gradient too. Each sequence weighs the same, however long; the sum of all tokens divided by
their number would let long answers count more.
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor

from grpo_s import kl_k3  # noqa: F401 (for you to use; or your exercise 15)


def loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    clip_high: float = 0.2,
    beta_kl: float = 0.0,
    sequences: int | None = None,
) -> tuple[Tensor, dict]:
    """-1/sequences sum_i 1/|o_i| sum_t [ min(rho A_i, clamp(rho, 1 - clip, 1 + clip_high) A_i)
                                         - beta_kl k3 ]

    (GRPO, arXiv 2402.03300; DR-IRL v3.) logp, logp_old, logp_ref (B, T): log-probs, where
    rho = exp(logp - logp_old), k3 as in exercise 15. advantage A (B,).
    clip_high 0: where A_i > 0, rho is exp(logp - logp.detach()), which is 1, and
    logp_old may hold anything.
    mask (B, T) bool: True on completion tokens, anywhere in the row, |o_i| >= 1 of them in row i.
    sequences None: B. A micro-batch passes the number of its whole update, so that the losses
    of micro-batches add up. Differentiable in logp, in its dtype. ValueError unless logp, logp_old,
    logp_ref and mask are (B, T) and advantage is (B,): torch would broadcast others silently.
    Also a dict of floats, means with the loss's weights: "kl": logp - logp_ref; "entropy": -logp;
    "clipped_low" (A < 0) and "clipped_high" (A > 0): 1 where the clip removes the token's gradient,
    else 0. (1 / mask.sum(1) is float32: convert it.)
    """
    raise NotImplementedError
