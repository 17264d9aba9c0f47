"""Exercise 4: draw the next token.

Difficulty 2 of 3, 35 minutes. Read first: teach/WALKTHROUGH.md, section The
transformer.

A network gives logits. A sampler turns them into one token. The temperature divides the logits:
below 1 it favours likely tokens, above 1 it evens them out, and at 0 only the best token is left.
The draw itself takes one uniform number u. Lay the probabilities end to end on a line from 0 to 1:
the token is the one whose piece holds u. This is the inverse of the cumulative distribution (CDF).
Each row has a number of its own, so a row says the same whatever stands beside it in the batch.

Long tails hurt: a thousand tokens of probability 0.0001 are drawn every tenth time. Top-p sampling
(Holtzman et al., arXiv 1904.09751) cuts the tail off. It keeps the nucleus, the smallest set of
tokens that holds the share p of the probability. This project samples without it; here you add it.
With both, the temperature comes first: choose(top_p(logits / temperature, p), 1.0, draws).

Hint: sort, and add up. A token stays if the sum of those *before* it is still below p. Then the cut
must go back from the sorted order to that of the vocabulary: torch has scatter. Rounded sums may
reach 1 too early (in top_p, p 1 keeps all tokens) or end below a draw near 1 (in choose).
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def choose(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
    """A token id per row, (B,) int64. logits (B, V), draws (B,) in [0, 1).

    With probs = softmax(logits / temperature): the smallest v with probs_0 + ... + probs_v > draw.
    A token of probability 0 is never drawn. Logits may be -inf, or tens of thousands.
    temperature 0: the token of the largest logit; draws may then hold anything.
    """
    raise NotImplementedError


def top_p(logits: Tensor, p: float) -> Tensor:
    """The logits (B, V), with -inf for every token outside of its row's nucleus.

    The nucleus is the smallest set of tokens whose probabilities, softmax(logits), sum to p or
    more; of the sets of this size, the one that holds most. 0 < p <= 1. Same shape and dtype.
    The tests have no ties.
    """
    raise NotImplementedError
