"""Exercise 13, against numbers by hand and plain loops."""

import math

import pytest
import torch

from exercises.grading import refuses, same

MIRRORS, SECTION = ("kernels.group_advantage",), "Advantages"
BORROWED = ("kernels.reference.advantage", "kernels.triton_kernels.advantage")


def test_by_hand(my):
    """Rewards 1, 2, 6: mean 3, variance 14 / 3."""
    std = math.sqrt(14 / 3)
    R = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    same(
        my.group_advantage(R, 3.0, 0.5),
        torch.tensor([[-2.0, -1.0, 3.0]], dtype=torch.float64) * 3 / (std + 0.5),
        "rewards 1, 2, 6, alpha 3, eps 0.5",
    )


@pytest.mark.parametrize("P, G, seed", [(1, 2, 0), (3, 5, 1), (4, 4, 2), (7, 3, 3), (2, 1, 4)])
def test_loops(my, P, G, seed):
    g = torch.Generator().manual_seed(seed)
    R = 2 * torch.randn(P, G, generator=g, dtype=torch.float64) + 5
    for alpha in (
        0.7,
        torch.tensor(0.7, dtype=torch.float64),
        torch.rand(P, 1, generator=g, dtype=torch.float64),
        torch.rand(P, G, generator=g, dtype=torch.float64),
    ):
        scale = (
            alpha.expand(P, G).tolist() if isinstance(alpha, torch.Tensor) else [[alpha] * G] * P
        )
        want = []
        for r, a in zip(R.tolist(), scale):
            mean = sum(r) / G
            std = math.sqrt(sum((x - mean) ** 2 for x in r) / G)
            want.append([b * (x - mean) / (std + 0.1) for x, b in zip(r, a)])
        same(
            my.group_advantage(R, alpha, 0.1),
            torch.tensor(want, dtype=torch.float64),
            f"alpha {tuple(torch.as_tensor(alpha).shape)}",
        )


@pytest.mark.parametrize("G", (1, 3, 6, 7))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equal_rewards(my, G, dtype):
    same(
        my.group_advantage(torch.full((2, G), 0.1, dtype=dtype), 5.0, 0.0),
        torch.zeros(2, G, dtype=dtype),
        "equal rewards, eps 0",
        0.0,
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_nearly_equal_rewards(my, dtype):
    """0 and 1e-9, 5 and a millionth more are not equal."""
    R = torch.tensor([[0.0, 1e-9], [5.0, 5.0 + 2.0**-20]], dtype=dtype)
    same(
        my.group_advantage(R, 2.0, 0.0),
        torch.tensor([[-2.0, 2.0]] * 2, dtype=dtype),
        f"rewards {R.tolist()}, alpha 2, eps 0",
    )


def test_equal_beside_others(my):
    """Each group is asked by itself."""
    R = torch.tensor([[0.1, 0.1], [0.0, 2.0], [-0.3, -0.3]])
    want = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    for alpha in (1.0, torch.ones(3, 1)):
        got = my.group_advantage(R, alpha, 0.0)
        same(got, want, f"two equal groups, one that is not; float32, alpha {alpha}, eps 0", 0.0)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 2), (1,), (1, 1), (1, 3, 3), (3, 1, 1)])
def test_other_shapes_of_alpha(my, shape):
    refuses(my.group_advantage, torch.rand(3, 3), torch.ones(shape))
