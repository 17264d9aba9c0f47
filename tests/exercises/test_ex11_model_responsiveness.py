"""Exercise 11, by hand and against plain loops."""

import math

import pytest
import torch

from exercises.grading import same

MIRRORS, SECTION = ("grpo_s.model_responsiveness",), "Difficulty"


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("drop, inlying", [(0.0, 2.2), (0.2, 0.25), (0.39, 0.25), (0.4, 0.3)])
def test_by_hand(my, drop, inlying):
    """Mean 2.2: 10 is furthest, then 0.1. floor(0.39 * 5) = 1."""
    gaps = torch.tensor([0.1, 0.2, 10.0, 0.3, 0.4], dtype=torch.float64)
    same(
        my.model_responsiveness(gaps, 0.5, drop),
        torch.tensor(sigma(inlying) / sigma(0.5), dtype=torch.float64),
        f"mean of the inlying gaps {inlying}",
    )


def test_same_distance(my):
    """Mean 2, distances 2, 2, 0, 0: the second gap goes first. All 2 away: the last ten go."""
    gaps = torch.tensor([0.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    same(my.model_responsiveness(gaps, 0.0, 0.25).item(), sigma(4 / 3) / 0.5, "0, 2 and 2 stay")
    same(
        my.model_responsiveness(
            torch.tensor([0.0] * 10 + [4.0] * 10, dtype=torch.float64), 0.0, 0.5
        ).item(),
        1.0,
        "the ten zeros stay, as they come first",
    )


@pytest.mark.parametrize("n, drop, seed", [(1, 0.9, 0), (7, 0.3, 1), (16, 0.25, 2), (33, 0.5, 3)])
def test_loops(my, n, drop, seed):
    gaps = (
        0.3 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        - 0.5
    )
    kept, mean = gaps.tolist(), gaps.mean().item()
    for _ in range(math.floor(drop * n)):
        kept.remove(max(kept, key=lambda x: abs(x - mean)))
    mean_gap = torch.tensor(-0.4, dtype=torch.float64)
    same(
        my.model_responsiveness(gaps, mean_gap, drop),
        torch.tensor(sigma(sum(kept) / len(kept)) / sigma(-0.4), dtype=torch.float64),
        f"{len(kept)} of {n} gaps stay",
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dtype(my, dtype):
    """The gaps' dtype, whatever mean_gap is."""
    for mean_gap in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        got = my.model_responsiveness(
            torch.tensor([0.25, 0.5, 8.0, 0.75], dtype=dtype), mean_gap, 0.25
        )
        same(got, torch.tensor(1.0, dtype=dtype), f"gaps in {dtype}, mean_gap {mean_gap!r}", 1e-2)
