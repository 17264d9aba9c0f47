"""Exercise 17: a policy that is a table of logits, token by token in float64."""

import math
from dataclasses import replace

import pytest
import torch

from config import GRPOConfig
from exercises.grading import same

MIRRORS, SECTION = ("teach.exercises.answers.learn",), "The loss"
BORROWED = ("grpo_s.update", "grpo_s.train")
P, G, T, V = 4, 5, 6, 7
CONFIG = replace(GRPOConfig(), members="ends", std_eps=0.1, beta_kl=0.1)


def rollout(seed):
    """Logits (P, T, V) of a table; tokens and mask (P, G, T) with gaps; R, with an equal group."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(P, T, V, generator=g, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(V, (P, G, T), generator=g)
    mask = torch.rand(P, G, T, generator=g) < 0.6
    mask[..., int(torch.randint(T, (1,), generator=g))] = True
    R = torch.randint(4, (P, G), generator=g).double()
    R[1] = 0.1
    alpha = 0.5 + torch.rand(P, 1, generator=g, dtype=torch.float64)
    ref = torch.randn(P, G, T, generator=g, dtype=torch.float64) / 3 - 2
    return table, tokens, mask, R, alpha, ref


def slow(table, tokens, mask, R, alpha, ref, order, g, lr):
    """The losses; trains the table. One token after the other, advantages written out."""
    logp = lambda p, i, t: table[p, t].log_softmax(0)[tokens[p, i, t]]
    at = {(p, i): mask[p, i].nonzero()[:, 0].tolist() for p in range(P) for i in range(G)}
    old = {(p, i, t): logp(p, i, t).item() for (p, i), ts in at.items() for t in ts}
    A = {}
    for p, r in enumerate(R.tolist()):
        mean = sum(r) / G
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / G)
        for i, x in enumerate(r):
            a = alpha[p, 0].item() * (x - mean) / (std + g.std_eps)
            if min(r) < max(r) and (g.members == "all" or x in (min(r), max(r))):
                A[p, i] = a
            elif g.members == "all":
                A[p, i] = 0.0
    losses = []
    for prompts in order:
        mine = [(p, i) for p, i in A if p in prompts and (A[p, i] != 0 or g.members == "all")]
        total = torch.zeros((), dtype=torch.float64)
        for p, i in mine:
            a, share = A[p, i], 1 / len(mine) / len(at[p, i])
            for t in at[p, i]:
                now = logp(p, i, t)
                good = g.clip_high == 0 and a > 0
                rho = (now - (now.detach() if good else old[p, i, t])).exp()
                clipped = rho.clamp(1 - g.clip, 1 + g.clip_high)
                d = ref[p, i, t] - now
                gain = torch.minimum(rho * a, clipped * a)
                total = total - share * (gain - g.beta_kl * (d.exp() - d - 1))
        losses.append(total.item())
        if mine:
            table.data -= lr * torch.autograd.grad(total, table)[0]
    return losses


ORDERS = [
    [[0, 1, 2, 3]],
    [[0, 2], [1, 3], [2, 0], [3, 1]],
    [[2], [1], [0, 3], [2], [3, 0], [1]],
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("changes", [{}, {"members": "all"}, {"clip_high": 0.0}])
def test_against_loops(my, order, changes):
    g, lr = replace(CONFIG, **changes), 2.0
    table, tokens, mask, R, alpha, ref = rollout(len(order))
    theirs = table.detach().clone().requires_grad_()
    want = slow(theirs, tokens, mask, R, alpha, ref, order, g, lr)
    before = table.detach().clone()

    def logps(p):  # where nothing was said, anything may stand
        found = table[p].log_softmax(-1).expand(G, T, V).gather(2, tokens[p][..., None])[..., 0]
        return torch.where(mask[p], found, math.nan)

    got = my.learn(logps, torch.optim.SGD([table], lr), R, alpha, ref, mask, order, g)
    same(got, want, f"the losses of the updates {order}, {changes or 'members ends'}")
    moved = (theirs - before).abs().amax((1, 2)).tolist()
    same(table, theirs, f"the policy's table afterwards; prompts should have moved by {moved}")


def test_nothing_to_learn_is_no_step(my):
    """Adam would go on by its momentum. The second update has only a group of equal rewards."""
    tables = []
    for order in ([[0, 2]], [[0, 2], [1]]):
        table, tokens, mask, R, alpha, ref = rollout(0)
        logps = lambda p: (
            table[p].log_softmax(-1).expand(G, T, V).gather(2, tokens[p][..., None])[..., 0]
        )
        optimizer = torch.optim.Adam([table], 0.1)
        losses = my.learn(logps, optimizer, R, alpha, ref, mask, order, CONFIG)
        tables.append(table)
    same(losses[1:], [0.0], "the loss of an update without a sequence")
    same(tables[1], tables[0], "the policy after it, as before")
