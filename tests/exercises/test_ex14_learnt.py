"""Exercise 14: a table by hand, and cell by cell."""

import math
from dataclasses import replace

import pytest
import torch

from config import GRPOConfig
from exercises.grading import same

MIRRORS, SECTION = ("grpo_s.advantages",), "Advantages"
ENDS = replace(GRPOConfig(), members="ends", std_eps=0.0)


def slow(R, alpha, anchors, g):
    A, learnt = [], []
    for r, a in zip(R.tolist(), alpha.flatten().tolist()):
        mean = sum(r) / len(r)
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / len(r))
        row = [0.0 if min(r) == max(r) else a * (x - mean) / (std + g.std_eps) for x in r]
        ends = [x in (min(r), max(r)) and y != 0 for x, y in zip(r, row)]
        A.append(row + [1.0])
        learnt.append([e or g.members == "all" for e in ends] + [False])
    A += [[1.0] * (R.shape[1] + 1) for _ in range(anchors)]
    learnt += [[False] * R.shape[1] + [True] for _ in range(anchors)]
    return torch.tensor(A, dtype=R.dtype), torch.tensor(learnt)


def test_by_hand(my):
    """Rewards 0, 1, 1, 2 and four equal ones, one anchor."""
    R = torch.tensor([[0.0, 1.0, 1.0, 2.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    A, learnt = my.advantages(R, torch.tensor([[2.0], [3.0]]).double(), 1, ENDS)
    best = 2 * math.sqrt(2)
    want = [[-best, 0.0, 0.0, best, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0], [1.0] * 5]
    same(A, torch.tensor(want, dtype=torch.float64), "A of 0, 1, 1, 2; four equal; one anchor")
    cells = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    same(learnt, torch.tensor(cells).bool(), "which are learnt from")


@pytest.mark.parametrize("members", ("all", "ends"))
@pytest.mark.parametrize("P, G, anchors, seed", [(1, 2, 0, 0), (3, 5, 2, 1), (4, 4, 4, 2)])
def test_cells(my, members, P, G, anchors, seed):
    """Rewards of few values: ties, also at the ends, and groups in which all are equal."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randint(3, (P, G), generator=generator).double() + 0.1
    R[0] = R[0, 0] if seed == 2 else R[0]
    alpha = 0.5 + torch.rand(P, 1, generator=generator, dtype=torch.float64)
    g = replace(GRPOConfig(), members=members, std_eps=0.3)
    what = f"{anchors} anchors, members {members}, rewards {R.tolist()}"
    got, want = my.advantages(R, alpha, anchors, g), slow(R, alpha, anchors, g)
    same(got[0], want[0], f"A; {what}")
    same(got[1], want[1], f"learnt; {what}")


def test_float32(my):
    R = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    A, learnt = my.advantages(R, torch.ones(2, 1), 0, ENDS)
    same(A, torch.tensor([[-1.0, 1.0, 1.0], [1.0, -1.0, 1.0]]), "A in float32, no anchors")
    same(learnt, torch.tensor([[True, True, False]] * 2), "which are learnt from, no anchors")
