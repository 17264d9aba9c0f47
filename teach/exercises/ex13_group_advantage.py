"""Exercise 13: better or worse than the other answers to the same prompt?

Difficulty 2 of 3, 20 minutes. Read first: teach/WALKTHROUGH.md, section Advantages.

PPO trains a second network to know what reward a prompt deserves. GRPO (arXiv 2402.03300) draws G
answers per prompt and compares each with their mean. GRPO-S, the S being for scaling, multiplies
the result by alpha: how hard the prompt is.

Hint: torch's std divides by G - 1 unless told otherwise. The mean of 0.1, 0.1, 0.1 may not be 0.1,
and with eps 0 there is 0/0, which is NaN: so test whether the rewards of a group are equal. And if
alpha were (P,), which axis would broadcasting put it on when P = G?
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def group_advantage(rewards: Tensor, alpha: Tensor | float = 1.0, eps: float = 1e-4) -> Tensor:
    """A[p, i] = alpha (R[p, i] - mean_i R[p]) / (std_i R[p] + eps), DR-IRL v3; GRPO's alpha is 1.

    rewards (P, G): G samples for each of P prompts. alpha: a number (or a tensor of shape ()),
    (P, 1) per prompt, or (P, G) per sample. Returns (P, G); rewards stay as they are.
    std is the population's: its variance divides by G. A group of equal rewards gets exactly 0,
    even with eps = 0. ValueError for alpha of any other shape.
    """
    raise NotImplementedError
