"""Exercise 11: how much does the model still fall short, outliers aside?

Difficulty 2 of 3, 20 minutes. Read first: teach/WALKTHROUGH.md, section Difficulty.

The second factor of the difficulty, alphaM, looks at rewards: the gap between the demonstration's
and a sample's. A wide gap says that there is something to learn. One absurd sample must not decide
for its whole category, so the gaps furthest from their mean are left out first. Gap and cut
are from DAMA (arXiv 2502.01943). The denominator is sigma of the category's running mean, so that
an average batch has alphaM 1.

Hint: "furthest" is a distance, to either side, from the mean of all gaps. argsort of the distances
tells which gaps to keep.
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def model_responsiveness(gaps: Tensor, mean_gap: Tensor | float, drop: float = 0.2) -> Tensor:
    """alphaM = sigma(mean of the inlying gaps) / sigma(mean_gap), a scalar in the dtype of gaps.

    gaps (n,), n > 0: R(demonstration) - R(sample), in reward units. The floor(drop * n) gaps
    furthest from the mean of all n are left out. Of two at the same distance, the one with the
    larger index goes first (argsort has an option for that). drop in [0, 1). mean_gap: the
    category's mean of all gaps.
    """
    raise NotImplementedError
