"""Exercise 15: by hand, by listing a vocabulary, by the derivative."""

import math

import pytest
import torch

from exercises.grading import same

MIRRORS, SECTION = ("grpo_s.kl_k3",), "The loss"


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1)])
def test_by_hand(my, shape):
    d = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).view(shape)
    logp = torch.full(shape, -1.5, dtype=torch.float64, requires_grad=True)
    got = my.kl_k3(logp, logp.detach() + d)
    same(
        got,
        torch.tensor([0.0, math.e - 2, math.exp(-2) + 1], dtype=torch.float64).view(shape),
        "k3 of d = 0, 1, -2",
    )
    same(
        torch.autograd.grad(got.sum(), logp)[0],
        torch.tensor([0.0, 1 - math.e, 1 - math.exp(-2)], dtype=torch.float64).view(shape),
        "its derivative",
    )


@pytest.mark.parametrize("V, seed", [(2, 0), (5, 1), (30, 2)])
def test_mean_is_the_kl(my, V, seed):
    """sum_v pi_v k3_v over all tokens, each k3 never negative."""
    p, q = torch.randn(
        2, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).softmax(1)
    k3 = my.kl_k3(p.log(), q.log())
    same(k3.min().item() >= 0, True, f"no k3 is negative: {k3.tolist()}")
    same(
        (p * k3).sum().item(),
        sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist())),
        "mean of k3 against KL(pi, pi_ref)",
    )


def test_clamp(my):
    logp = torch.tensor([-900.0, 900.0], dtype=torch.float64, requires_grad=True)
    got = my.kl_k3(logp, torch.zeros(2, dtype=torch.float64))
    same(
        got,
        torch.tensor([math.exp(20) - 21, math.exp(-20) + 19], dtype=torch.float64),
        "d = 900 and -900 count as 20 and -20",
        1e-6,
    )
    same(
        torch.autograd.grad(got.sum(), logp)[0],
        torch.zeros(2, dtype=torch.float64),
        "its derivative there",
    )


def test_float32(my):
    got = my.kl_k3(torch.tensor([-2.0]), torch.tensor([-1.0]))
    same(got, torch.tensor([math.e - 2]), "k3 of d = 1 in float32")
