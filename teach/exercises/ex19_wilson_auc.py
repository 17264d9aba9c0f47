"""Exercise 19: how sure are we?

Difficulty 1 of 3, 25 minutes. Read first: teach/WALKTHROUGH.md, section Judging
the answers.

Seven of 60 look-alikes were refused. Is that 12%, or could it be 20? An interval says which rates
go with the count. The textbook's p +- 1.96 sqrt(p (1 - p) / n) fails for small counts: for 0 of 60
it is 0 +- 0. Wilson's interval (1927) asks instead: for which true rates q would the observed p be
at most z standard deviations away?

    (p - q)^2 = z^2 q (1 - q) / n

Square out, and solve for q. The two solutions are the ends.

A reward model is judged by order alone. Take a good and a bad sample at random: how often has the
good one the higher reward? This is the AUC. 0.5 is a coin, 1 is perfect, below 0.5 is upside down.

Hint: with the equation as a q^2 + b q + c = 0, a is 1 + z^2 / n. Watch n = 0, and rounding:
1.0000000000000007 is no rate. For the AUC compare all pairs; two for loops are enough.
"""


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The ends (low, high) of the Wilson score interval of a rate, hits of n. Floats in [0, 1].

    (0.0, 1.0) for n = 0: nothing is known.
    """
    raise NotImplementedError


def auc(positive: list[float], negative: list[float]) -> float:
    """The share of pairs in which the positive is larger than the negative; a tie counts half.

    NaN if either list is empty.
    """
    raise NotImplementedError
