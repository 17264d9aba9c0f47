"""Exercise 10, against plain loops."""

import math

import pytest
import torch

from exercises.grading import same

MIRRORS, SECTION = ("encoder.similarity", "grpo_s.data_hardness"), "Difficulty"
BORROWED = ("encoder.similarities",)


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("K, L, D, seed", [(1, 1, 2, 0), (2, 5, 3, 1), (5, 2, 3, 2), (4, 4, 4, 3)])
def test_similarity(my, K, L, D, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (3 * torch.randn(n, D, generator=g, dtype=torch.float64) for n in (K, L))
    best = [
        max(sum(x * y for x, y in zip(u, v)) / math.hypot(*u) / math.hypot(*v) for v in b.tolist())
        for u in a.tolist()
    ]
    same(
        my.similarity(a, b),
        torch.tensor(sum(best) / K, dtype=torch.float64),
        f"mean of the best cosines {best}",
    )


def test_similarity_by_hand(my):
    """The second sentence is in the demonstration; the first is 60 degrees from the closest."""
    a = torch.tensor([[0.5, math.sqrt(0.75)], [0.0, -2.0]], dtype=torch.float64)
    same(
        my.similarity(
            a, torch.tensor([[7.0, 0.0], [0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
        ).item(),
        0.75,
        "cosines 1/2 and 1",
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("K, L", [(0, 3), (3, 0), (0, 0), (2, 3)])
def test_dtype_and_no_sentences(my, K, L, dtype):
    got = my.similarity(torch.ones(K, 2, dtype=dtype), torch.ones(L, 2, dtype=dtype))
    same(got, torch.tensor(float(K * L > 0), dtype=dtype), f"{K} sentences against {L} equal ones")


@pytest.mark.parametrize(
    "shape, mean_delta", [((), 0.3), ((3,), 0.9), ((2, 4), torch.tensor(1.4, dtype=torch.float64))]
)
def test_data_hardness(my, shape, mean_delta):
    W = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    want = [sigma(1 - w) / sigma(float(mean_delta)) for w in W.flatten().tolist()]
    same(
        my.data_hardness(W, mean_delta),
        torch.tensor(want, dtype=torch.float64).view(shape),
        f"similarities {W.tolist()}, mean_delta {float(mean_delta)}",
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dtype(my, dtype):
    """W's dtype, whatever mean_delta is."""
    for mean_delta in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        same(
            my.data_hardness(torch.tensor(0.5, dtype=dtype), mean_delta),
            torch.tensor(1.0, dtype=dtype),
            f"a similarity in {dtype}, mean_delta {mean_delta!r}",
            1e-2,
        )
