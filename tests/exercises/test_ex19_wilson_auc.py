"""Exercise 19: Wilson's equation solved by bisection; the area under a curve, point by point."""

import math
import random

import pytest

from exercises.grading import same

MIRRORS, SECTION = ("evaluate.wilson", "evaluate.auc"), "Judging the answers"


def bisect(far, near, outside):
    """Where, between a rate that lies outside and one that doesn't, the interval ends."""
    for _ in range(200):
        middle = (far + near) / 2
        far, near = (middle, near) if outside(middle) else (far, middle)
    return near


@pytest.mark.parametrize(
    "hits, n", [(0, 1), (1, 1), (0, 60), (7, 60), (60, 60), (30, 60), (500, 983)]
)
@pytest.mark.parametrize("z", (1.96, 1.0, 2.576))
def test_wilson(my, hits, n, z):
    p = hits / n
    outside = lambda q: abs(p - q) > z * math.sqrt(q * (1 - q) / n)
    want = bisect(0.0, p, outside), bisect(1.0, p, outside)
    same(my.wilson(hits, n, z), want, f"{hits} of {n}, z {z}", 1e-7)
    low, high = my.wilson(hits, n, z)
    same(0 <= low <= high <= 1, True, f"0 <= {low} <= {high} <= 1")


def test_wilson_by_hand(my):
    """z 1, 0 of 1: q^2 = q (1 - q), so q is 0 or 1/2. Nothing of nothing: all is possible."""
    same(my.wilson(0, 1, 1.0), (0.0, 0.5), "0 of 1, z 1")
    same(my.wilson(7, 60), my.wilson(7, 60, 1.96), "z is 1.96 if not said")
    same(my.wilson(0, 0), (0.0, 1.0), "0 of 0")


def area(positive, negative):
    """Under the curve of hit rate over false alarms, as the threshold falls."""
    points = [(0.0, 0.0)]
    for limit in sorted({*positive, *negative}, reverse=True):
        rates = [sum(x >= limit for x in xs) / len(xs) for xs in (negative, positive)]
        points.append(tuple(rates))
    return sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in zip(points, points[1:]))


@pytest.mark.parametrize(
    "n, m, values, seed", [(1, 1, 2, 0), (5, 3, 4, 1), (4, 9, 30, 2), (7, 7, 3, 3)]
)
def test_auc(my, n, m, values, seed):
    r = random.Random(seed)
    positive, negative = ([r.randrange(values) / 2 for _ in range(k)] for k in (n, m))
    same(my.auc(positive, negative), area(positive, negative), f"AUC of {positive} over {negative}")


def test_auc_by_hand(my):
    same(my.auc([2.0, -1.0], [1.0]), 0.5, "one pair right, one wrong")
    same(my.auc([2.0], [2.0]), 0.5, "a tie")
    same(my.auc([3.0, 2.0], [1.0, -5.0]), 1.0, "all pairs right")
    for lists in ([], [1.0]), ([1.0], []), ([], []):
        same(my.auc(*lists), math.nan, f"AUC of {lists[0]} over {lists[1]}")
