"""Exercise 17: the update loop of GRPO-S.

Difficulty 3 of 3, 50 minutes. Read first: teach/WALKTHROUGH.md, section The loss.

Here the pieces come together. A rollout was sampled and scored. Its samples are learnt from in
several small updates, each on some of the prompts, perhaps in more than one pass. After the first
update the policy is no longer pi_old, the one that drew the samples. So pi_old's log-probs are
taken once, before the first update, and stay fixed: the ratio then knows how far the policy has
come, and the clip stops a sample that has gone far enough.

All prompts at once may not fit into memory. So an update goes prompt by prompt: each prompt's
loss is divided by the number of sequences of the *whole* update, and backward adds the gradients
up. The result does not depend on how the update was cut.

Hint: advantages first (they need whole groups), then pi_old, then the updates. Count an update's
sequences before its first backward. Only rows that are learnt from go into the loss: index them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from config import GRPOConfig
from grpo_s import advantages, loss  # noqa: F401 (or your exercises 14 and 16)


def learn(
    logps: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    R: Tensor,
    alpha: Tensor,
    logp_ref: Tensor,
    mask: Tensor,
    order: list[list[int]],
    g: GRPOConfig,
) -> list[float]:
    """Learns from one rollout, an optimizer step per update. Returns the loss before each update.

    logps(p): log-probs (G, T) of prompt p's samples under the policy as it is now, with a gradient.
    R (P, G), alpha (P, 1), logp_ref (P, G, T), mask (P, G, T) bool: True on the samples' tokens,
    anywhere in the row; elsewhere log-probs may be NaN. order: the prompts of each update, as
    [[0, 2], [1, 3], [0, 2], [1, 3]]. An update's loss is that of exercise 16 over its sequences:
    the samples of its prompts that are learnt from (exercise 14, no anchors). g: std_eps, members,
    clip, clip_high, beta_kl.
    An update without a sequence has loss 0.0 and takes no step. Gradients are not clipped.
    """
    raise NotImplementedError
