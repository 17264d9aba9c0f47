"""Exercise 14: which samples are learnt from?

Difficulty 2 of 3, 25 minutes. Read first: teach/WALKTHROUGH.md, section Advantages.

A rollout costs time, and so does each sample that is learnt from. GRPO learns from all G samples of
a group. On a laptop this project draws four and learns from two, the best and the worst: they say
most. All G still make the mean and the std.

Some demonstrations join each update too, with advantage 1. They are called anchors, as they hold
the policy to answers that are known to be good.

Hint: put the table together first, then say which cells count. Tied samples all count as best, or
as worst. A group in which all are equal has nothing to teach: its advantages are 0.
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor

from config import GRPOConfig
from kernels import group_advantage  # noqa: F401 (for you to use; or your exercise 13)


def advantages(R: Tensor, alpha: Tensor, anchors: int, g: GRPOConfig) -> tuple[Tensor, Tensor]:
    """A and learnt, both (P + anchors, G + 1): a column per sample, then the demonstrations'.

    R (P, G), alpha (P, 1). The first P rows are the prompts whose samples were scored, the rows
    below are the anchors' prompts, without samples.
    A, in R's dtype: of a sample, group_advantage(R, alpha, g.std_eps). All other cells are 1.
    learnt, bool: of the samples, all if g.members is "all". If it is "ends", those whose reward is
    the largest or the smallest of their group, unless their A is 0. In the last column, only the
    anchors' rows. All else is False.
    """
    raise NotImplementedError
