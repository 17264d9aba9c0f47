"""Exercise 22, in Triton's interpreter, against Python's math."""

import math

import pytest
import torch

from exercises.grading import compiles, same

MIRRORS, SECTION = ("kernels.triton_kernels.rows",), "Kernels"
BORROWED = ("kernels.triton_kernels.row_kernel", "kernels.reference.rows")
CHANGES = ("z",)
TYPES = dict(Z="*fp32", stride="i32", T="*i64", G="*fp32", LOGP="*fp32", inv_temperature="fp32")
# the interpreter's numpy speaks up about NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def slow(z, targets, temperature, g):
    """Log-probs (n,) and g (1[v = target] - p_v) / t, (n, V)."""
    logp, grad = [], []
    for row, target, weight in zip(z.double().tolist(), targets.tolist(), g.double().tolist()):
        x = [v / temperature for v in row]
        lse = max(x) + math.log(sum(math.exp(v - max(x)) for v in x))
        logp.append(x[target] - lse)
        grad.append(
            [weight * ((v == target) - math.exp(x[v] - lse)) / temperature for v in range(len(x))]
        )
    return torch.tensor(logp), torch.tensor(grad)


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
def test_gradient(my, n, V, block, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((n, V + block), 7.5)  # room for what a store without a mask writes
    z = wide[:, :V]
    z.copy_(3 * torch.randn(n, V, generator=generator))
    targets, g = torch.randint(V, (n,), generator=generator), torch.randn(n, generator=generator)
    targets[-1] = V - 1  # in the last block
    logp, grad = slow(z, targets, temperature, g)
    got = my.rows(z, targets, temperature, g, block=block)
    same(got[0], logp, "log-probs", 5e-6)
    same(
        got[1],
        grad,
        f"gradient of {V} logits in blocks of {block}, temperature {temperature}",
        5e-6,
    )
    same(z, grad, "what stands where the logits were", 5e-6)
    same(
        (wide[:, V:] == 7.5).all().item(),
        True,
        "what lies between the rows is as it was (if not: does tl.store have a mask?)",
    )


def test_far_rows(my):
    """Far below zero and far above; all but the last logit -inf. A row has its own maximum."""
    z = torch.randn(4, 37, generator=torch.Generator().manual_seed(6)).round()
    z[0], z[1], z[2, :-1], z[3] = z[0] - 16384, z[1] + 8192, -math.inf, -30000.0
    targets, g = torch.tensor([3, 30, 36, 7]), torch.tensor([1.0, -2.0, 0.5, 1.0])
    logp, grad = slow(z, targets, 1.0, g)
    got = my.rows(z, targets, 1.0, g, block=16)
    same(got[0], logp, "log-probs of rows near -16384, 8192; -inf but for one; -30000", 2e-3)
    same(got[1], grad, "their gradient", 2e-3)
    z = torch.full((2, 37), -1e30)
    got = my.rows(z, torch.tensor([0, 36]), 1.0, torch.ones(2), block=16)[0]
    near = [abs(x) < 1e24 for x in got.tolist()]  # inf and NaN are not
    same(near, [True, True], f"log-probs of -1e30s, {got.tolist()}: small beside 1e30")


@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_tokens_left_out(my, garbage):
    z, targets, g = (
        torch.randn(4, 21 + 16, generator=torch.Generator().manual_seed(5))[:, :21],
        torch.tensor([3, 20, 0, 7]),
        torch.tensor([1.0, 0.0, -2.0, 0.0]),
    )
    want = slow(z, targets, 0.5, g)[1]
    want[[1, 3]] = 0.0
    z[1] = garbage
    same(
        my.rows(z, targets, 0.5, g, block=16)[1],
        want,
        f"gradient where rows 1 and 3 are left out and row 1 holds {garbage}",
        5e-6,
    )


def test_compiles(my):
    """For a GPU, without one: the interpreter takes more than Triton can compile."""
    z, targets = torch.zeros(1, 3), torch.tensor([1])
    my.rows(z, targets, 1.0, torch.ones(1), block=16)
    names = my.rows.__wrapped__.__globals__  # the project's kernel has another name
    kernel = names.get("gradient_kernel") or names["row_kernel"]
    compiles(kernel, TYPES | {"V": "i32"}, {"BLOCK": 1024, "GRADIENT": True})
