"""Exercise 14, in Triton's interpreter, against plain loops."""
import math

import pytest
import torch
from grading import same

MIRRORS, SECTION = ("kernels.triton_kernels.advantage_kernel", "kernels.triton_kernels.advantage"), "Kernels"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")         # the interpreter's numpy speaks up about infinite numbers


def slow(R, alpha, eps):
    out = []
    for r, a in zip(R.double().tolist(), alpha.double().tolist()):
        mean = sum(r) / len(r)
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / len(r))
        out.append([0.0 if min(r) == max(r) else b * (x - mean) / (std + eps) for x, b in zip(r, a)])
    return torch.tensor(out)


@pytest.mark.parametrize("P, G, eps, seed", [(1, 1, 0.1, 0), (3, 8, 1e-4, 1), (4, 5, 0.3, 2), (2, 33, 0.3, 3), (6, 3, 0.0, 4)])
@pytest.mark.parametrize("layout", ("rows", "columns"))
def test_loops(my, P, G, eps, seed, layout):
    g = torch.Generator().manual_seed(seed)
    R = 2 * torch.randn(P, G, generator=g) + 3 if layout == "rows" else 2 * torch.randn(G, P, generator=g).T + 3
    alpha = torch.rand(P, G, generator=g) if layout == "rows" else torch.rand(P, 1, generator=g).expand(P, G)
    R[-1] = 0.1                                              # a group that agrees
    got = my.advantage(R, alpha, eps)
    same(got, slow(R, alpha, eps), f"rewards with strides {R.stride()}, alpha with {alpha.stride()}", 5e-6)
    same(got[-1], torch.zeros(G), "a group of equal rewards", 0.0)
