"""Exercise 3, against complex numbers, and the scaling wave by wave."""

import cmath
import math
from types import SimpleNamespace

import pytest
import torch

from exercises.grading import same

MIRRORS, SECTION = ("model.rope_frequencies", "model.rotate"), "The transformer"


def config(E, theta, scaling=None):
    return SimpleNamespace(head_dim=E, rope_theta=theta, rope_scaling=scaling)


@pytest.mark.parametrize("E, theta", [(2, 1e4), (8, 1e4), (14, 5e5)])
def test_frequencies(my, E, theta):
    same(
        my.rope_frequencies(config(E, theta)),
        torch.tensor([theta ** (-2 * i / E) for i in range(E // 2)]),
        f"theta {theta}, E {E}",
        1e-6,
    )


@pytest.mark.parametrize(
    "E, context, low, high, factor",
    [(16, 64, 1.0, 4.0, 8.0), (10, 500, 1.5, 5.0, 3.0), (24, 100, 2.0, 8.0, 32.0)],
)
def test_llama3_scaling(my, E, context, low, high, factor):
    want, kinds = [], set()
    for i in range(E // 2):
        f = 1e4 ** (-2 * i / E)
        wave = 2 * math.pi / f  # positions in a full turn
        if wave <= context / high:
            want.append(f), kinds.add("stays")
        elif wave >= context / low:
            want.append(f / factor), kinds.add("slowed")
        else:
            keep = (context / wave - low) / (high - low)
            want.append(keep * f + (1 - keep) * f / factor), kinds.add("between")
    assert len(kinds) == 3
    scaling = dict(
        low_freq_factor=low,
        high_freq_factor=high,
        factor=factor,
        original_max_position_embeddings=context,
    )
    same(my.rope_frequencies(config(E, 1e4, scaling)), torch.tensor(want), str(scaling), 1e-6)


@pytest.mark.parametrize(
    "N, heads, E, seed", [(1, 1, 2, 0), (5, 3, 8, 1), (4, 4, 4, 2), (3, 2, 14, 3)]
)
def test_rotate(my, N, heads, E, seed):
    g = torch.Generator().manual_seed(seed)
    x, angle = (
        torch.randn(N, heads, E, generator=g, dtype=torch.float64),
        9 * torch.rand(N, 1, E // 2, generator=g, dtype=torch.float64),
    )
    want = torch.empty_like(x)
    for n in range(N):
        for h in range(heads):
            for i in range(E // 2):
                turned = complex(x[n, h, i], x[n, h, i + E // 2]) * cmath.exp(
                    1j * angle[n, 0, i].item()
                )
                want[n, h, i], want[n, h, i + E // 2] = turned.real, turned.imag
    rope = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    same(my.rotate(x, rope), want, "pairs as complex numbers")


def test_computes_in_the_dtype_of_cos(my):
    """(1, 1) in bfloat16, turned by about 45 degrees: bfloat16 would leave 0 of cos - sin."""
    angle = math.pi / 4 + torch.tensor([1e-3, -2e-3, 5e-4])[:, None, None]
    got = my.rotate(
        torch.ones(3, 1, 2, dtype=torch.bfloat16),
        (angle.cos().expand(3, 1, 2), angle.sin().expand(3, 1, 2)),
    )
    same(
        got[..., :1],
        (angle.double().cos() - angle.double().sin()).bfloat16(),
        "the first of each pair, cos - sin",
        1e-5,
    )


def test_only_the_distance_counts(my):
    """q at 5 and k at 2, q at 93 and k at 90: the same dot product."""
    q, k = torch.randn(2, 1, 1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = my.rope_frequencies(config(12, 1e4)).double().repeat(2)
    turn = lambda x, p: my.rotate(x, ((p * f).cos()[None, None], (p * f).sin()[None, None]))
    same(
        (turn(q, 93) * turn(k, 90)).sum(),
        (turn(q, 5) * turn(k, 2)).sum(),
        "q at 93, k at 90 against 5 and 2",
    )
