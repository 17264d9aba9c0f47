"""Exercise 10: how much of the answer does the demonstration cover?

Difficulty 1 of 3, 15 minutes. Read first: teach/WALKTHROUGH.md, section Difficulty.

The first factor of the difficulty, alphaD, looks at texts. Answer and demonstration are split into
sub-sentences and embedded (encoder.py). Each sub-sentence of the answer looks for its closest one
in the demonstration. An answer close to it has little left to learn from this prompt. similarity
takes one pair of texts; data_hardness compares it with what is usual in the prompt's category.

Hint: one matrix product of unit vectors gives all cosines. Which axis is the maximum over, which
the mean?
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def similarity(response: Tensor, demonstration: Tensor) -> Tensor:
    """W = mean_k max_l cos(response_k, demonstration_l) (DR-IRL v3; hardness: 1 - W).

    response, demonstration: a row (D,) per sub-sentence, of any norm above 0, not changed in place.
    Returns a scalar tensor in [-1, 1], in their dtype; 0 if either has no rows.
    """
    raise NotImplementedError


def data_hardness(W: Tensor, mean_delta: Tensor | float) -> Tensor:
    """alphaD = sigma(1 - W) / sigma(mean_delta). Above 1: harder than the category's average.

    sigma is the logistic function. W: similarities, any shape -> the same shape and dtype.
    mean_delta: the mean of 1 - W over the category, a number or a scalar tensor.
    """
    raise NotImplementedError
