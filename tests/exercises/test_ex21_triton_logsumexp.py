"""Exercise 21, in Triton's interpreter, against Python's math."""

import math

import pytest
import torch

from exercises.grading import compiles, loads, same

MIRRORS, SECTION = ("kernels.triton_kernels.rows",), "Kernels"
BORROWED = ("kernels.triton_kernels.row_kernel", "kernels.reference.rows")
TYPES = dict(Z="*fp32", stride="i32", T="*i64", G="*fp32", LOGP="*fp32", inv_temperature="fp32")
# the interpreter's numpy speaks up about infinite numbers
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def case(n, V, block, seed):
    """Rows of logits with NaN between them, at least a block."""
    g = torch.Generator().manual_seed(seed)
    z = torch.full((n, V + block), math.nan)[:, :V]
    z.copy_(3 * torch.randn(n, V, generator=g))
    return z, torch.randint(V, (n,), generator=g)


def slow(z, targets, temperature):
    out = []
    for row, target in zip(z.double().tolist(), targets.tolist()):
        x = [v / temperature for v in row]
        out.append(x[target] - max(x) - math.log(sum(math.exp(v - max(x)) for v in x)))
    return torch.tensor(out)


@pytest.mark.parametrize(
    "n, V, block, temperature, seed",
    [
        (1, 1, 16, 1.0, 0),
        (5, 16, 16, 1.0, 1),
        (4, 37, 16, 0.5, 2),
        (3, 130, 32, 1.7, 3),
        (3, 130, 256, 0.7, 4),
    ],
)
def test_rows(my, n, V, block, temperature, seed):
    z, targets = case(n, V, block, seed)
    with loads() as counts:
        same(
            my.rows(z, targets, temperature, block=block)[0],
            slow(z, targets, temperature),
            f"{V} logits in blocks of {block}, temperature {temperature}",
            5e-6,
        )
    same(
        sum(counts) <= n * (V + 2),
        True,
        f"a row is read once, its target and that logit: at most {n} x ({V} + 2) elements, "
        f"not {sum(counts)}",
    )


@pytest.mark.parametrize("V, block", [(37, 16), (80, 16)])
def test_hard_rows(my, V, block):
    """All but the last -inf; far from zero; rising in every block; falling; far below zero."""
    z, targets = case(6, V, block, 5)
    z[0, :-1], targets[0] = -math.inf, V - 1
    z[1], z[4], z[5] = 8192 + z[1].round(), z[4].round() - 16384, -30000.0
    z[2], z[3] = torch.arange(V) / 4, -torch.arange(V) / 4
    same(
        my.rows(z, targets, 1.0, block=block)[0],
        slow(z, targets, 1.0),
        f"{V} logits in blocks of {block}",
        2e-3,
    )
    same(
        my.rows(z, targets, 1.0, block=block)[0][[0, 2, 3]],
        slow(z, targets, 1.0)[[0, 2, 3]],
        "the rows near zero, closer",
        1e-5,
    )
    z = torch.full((2, V), -1e30)
    got = my.rows(z, torch.tensor([0, V - 1]), 1.0, block=block)[0]
    near = [abs(x) < 1e24 for x in got.tolist()]  # inf and NaN are not
    same(near, [True, True], f"log-probs of -1e30s, {got.tolist()}: small beside 1e30")


def test_compiles(my):
    """For a GPU, without one: the interpreter takes more than Triton can compile."""
    z, targets = torch.zeros(1, 3), torch.tensor([1])
    my.rows(z, targets, 1.0, block=16)
    names = my.rows.__wrapped__.__globals__  # the project's kernel has another name
    kernel = names.get("logprob_kernel") or names["row_kernel"]
    compiles(kernel, TYPES | {"V": "i32"}, {"BLOCK": 1024, "GRADIENT": False})
