"""Exercise 12: the modes by hand, and why alpha belongs behind the normalisation."""

import math

import pytest
import torch

from exercises.grading import refuses, same
from kernels import group_advantage

MIRRORS, SECTION = ("grpo_s.difficulty_scale",), "Advantages"
MODES = {
    "none": lambda a, b: 1.0,
    "data": lambda a, b: a,
    "model": lambda a, b: b,
    "product": lambda a, b: a * b,
    "sum": lambda a, b: (a + b) / 2,
    "spread": lambda a, b: (a * b) ** 8,
}


@pytest.mark.parametrize("scaling", MODES)
@pytest.mark.parametrize("shapes", [((2, 3), ()), ((4, 1), (4, 1)), ((3, 1), (1, 5)), ((), (2,))])
def test_modes(my, scaling, shapes):
    g = torch.Generator().manual_seed(len(scaling))
    a, b = (0.5 + torch.rand(s, generator=g, dtype=torch.float64) for s in shapes)
    wide = [z.expand(torch.broadcast_shapes(*shapes)) for z in (a, b)]
    want = [MODES[scaling](x, y) for x, y in zip(*(z.flatten().tolist() for z in wide))]
    got = my.difficulty_scale(a.requires_grad_(), b.requires_grad_(), scaling)
    same(got, torch.tensor(want, dtype=torch.float64).view(wide[0].shape), scaling)
    same(got.requires_grad, False, "a gradient through alpha")


@pytest.mark.parametrize("scaling, used", [("none", ()), ("data", (0,)), ("model", (1,))])
@pytest.mark.parametrize("other", (math.nan, math.inf))
def test_what_a_mode_does_not_use(my, scaling, used, other):
    factors = torch.tensor([[0.5, 2.0], [3.0, 0.25]], dtype=torch.float64)
    want = factors[used[0]] if used else torch.ones(2, dtype=torch.float64)
    a, b = (x if i in used else torch.full_like(x, other) for i, x in enumerate(factors))
    same(my.difficulty_scale(a, b, scaling), want, f"{scaling}; the other factor is {other}")


def test_defaults_and_errors(my):
    same(
        my.difficulty_scale(torch.tensor(0.5), torch.tensor(3.0)).item(),
        1.5,
        "the default is the product",
    )
    refuses(my.difficulty_scale, torch.ones(2), torch.ones(2), "magic", says="magic")


@pytest.mark.parametrize("seed", range(3))
def test_scaling_the_rewards_cancels(my, seed):
    g = torch.Generator().manual_seed(seed)
    R, a, b = (
        torch.randn(4, 6, generator=g, dtype=torch.float64),
        *(0.5 + torch.rand(4, 1, generator=g, dtype=torch.float64) for _ in range(2)),
    )
    alpha, plain = my.difficulty_scale(a, b), group_advantage(R, eps=0.0)
    same(group_advantage(alpha * R, eps=0.0), plain, "advantages of alpha R: alpha cancels")
    same(
        group_advantage(R, alpha, eps=0.0),
        a * b * plain,
        "alpha times the advantages of R: it does not",
    )


@pytest.mark.parametrize("scaling", MODES)
def test_float32(my, scaling):
    want = torch.tensor([MODES[scaling](0.5, 1.5)])
    got = my.difficulty_scale(torch.tensor([0.5]), torch.tensor([1.5]), scaling)
    same(got, want, f"{scaling} of 0.5 and 1.5 in float32")
