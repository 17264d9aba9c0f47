"""Exercise 20, in Triton's interpreter, against plain loops."""

import math

import pytest
import torch

from exercises.grading import compiles, loads, same

MIRRORS, SECTION = ("kernels.triton_kernels.advantage_kernel",), "Kernels"
TYPES = dict.fromkeys(("R", "ALPHA", "OUT"), "*fp32") | {"eps": "fp32"}
TYPES |= dict.fromkeys(("r_prompt", "r_sample", "a_prompt", "a_sample", "samples"), "i32")
# the interpreter's numpy speaks up about infinite numbers
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def slow(R, alpha, eps):
    out = []
    for r, a in zip(R.double().tolist(), alpha.double().tolist()):
        mean = sum(r) / len(r)
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / len(r))
        out.append(
            [0.0 if min(r) == max(r) else b * (x - mean) / (std + eps) for x, b in zip(r, a)]
        )
    return torch.tensor(out)


def check(my, R, alpha, eps, what):
    """One launch. OUT has NaN behind its last sample, which a store without a mask overwrites."""
    (P, G), block = R.shape, 1 << (R.shape[1] - 1).bit_length()
    out, given = torch.full((P * G + block,), math.nan), (R.clone(), alpha.clone())
    with loads():
        my.advantage_kernel[(P,)](R, *R.stride(), alpha, *alpha.stride(), out, eps, G, BLOCK=block)
    same(out[: P * G].view(P, G), slow(R, alpha, eps), what, 5e-6)
    left = out[P * G :].isnan().sum().item()
    same(left, block, "NaN left behind the last sample (fewer: does tl.store have a mask?)")
    for name, now, was in zip(("R", "ALPHA"), (R, alpha), given):
        same(now, was, f"advantage_kernel changed its argument {name} in place", 0.0)


@pytest.mark.parametrize(
    "P, G, eps, seed",
    [(1, 1, 0.1, 0), (3, 8, 1e-4, 1), (4, 5, 0.3, 2), (2, 33, 0.3, 3), (6, 3, 0.0, 4)],
)
@pytest.mark.parametrize("layout", ("rows", "columns"))
def test_loops(my, P, G, eps, seed, layout):
    g, wide = torch.Generator().manual_seed(seed), torch.full((P, 2 * G), math.nan)
    R = (
        wide[:, :G] if layout == "rows" else wide.view(2 * G, P)[:G].T
    )  # what a load without a mask reads is NaN
    R.copy_(2 * torch.randn(P, G, generator=g) + 3)
    check(
        my,
        R,
        torch.rand(P, G, generator=g)
        if layout == "rows"
        else torch.rand(P, 1, generator=g).expand(P, G),
        eps,
        f"rewards with strides {R.stride()}",
    )


@pytest.mark.parametrize("G", (4, 5, 6, 7))
def test_equal_and_nearly_equal(my, G):
    """Groups that agree, on a negative reward too, and groups apart by 1e-7 or 1e-9; eps 0."""
    R = torch.tensor([[0.1], [-0.1], [0.0], [-3.0], [1e-7], [1e-9]]).repeat(1, G)
    R[4:, 1:] = 0.0
    check(
        my,
        R,
        torch.full((6, G), 2.0),
        0.0,
        "groups of 0.1, of -0.1, of 0, of -3; 0 but for one 1e-7; 0 but for one 1e-9; eps 0",
    )


def test_far_from_zero(my):
    """The squares of 1024.5 and 1024 differ by less than their last digits tell."""
    check(
        my,
        torch.tensor([[1024.5, 1024.0, 1024.0, 1024.0]]),
        torch.ones(1, 4),
        0.0,
        "rewards 1024.5, 1024, 1024, 1024, eps 0",
    )


def test_compiles(my):
    """For a GPU, without one: the interpreter takes more than Triton can compile."""
    check(my, torch.ones(1, 2), torch.ones(1, 2), 0.1, "two equal rewards")
    compiles(my.advantage_kernel, TYPES, {"BLOCK": 8})
