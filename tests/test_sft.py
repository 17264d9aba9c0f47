"""sft.py: the schedule, what is trained, the batches, and that the loss falls."""

import random

import pytest
import torch
from test_grpo_train import Letters, tiny

import sft
from config import SFTConfig, UserError
from data import HELPFUL, cycle
from sft import optimizer_for, set_lr, sft_loss, train, train_top
from support import parallel
from support.resume import Loop

ROWS = [
    {"prompt": p, "category": c, "response": a}
    for c, a in (("crime", "no"), (HELPFUL, "yes"))
    for p in ("abc", "d", "efghi", "jk")
]


def test_set_lr():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    got = []
    for progress in (0, 0.025, 0.0475, 0.5, 1):
        set_lr(optimizer, 2.0, progress)
        got.append(optimizer.param_groups[0]["lr"])
    assert got == pytest.approx([2 * 0.05, 2 * 0.55 * 0.975, 2 * 0.9525, 1.0, 0.0])


@pytest.mark.parametrize("blocks, frozen", [(1, 1), (2, 0), (5, 0), (0, 0)])
def test_train_top(blocks, frozen):
    policy = tiny()
    assert train_top(policy, blocks) == frozen
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    top = {n for n, _ in policy.named_parameters() if n.startswith(("layers.1", "norm"))}
    assert trained == (top if frozen else {n for n, _ in policy.named_parameters()})


def test_optimizer_keeps_sharded_parameters_apart(monkeypatch):
    """Fused AdamW takes no mixture. Only what is trained is in it."""
    policy = tiny()
    train_top(policy, 1)
    monkeypatch.setattr(parallel, "is_sharded", lambda p: p.ndim == 2)
    groups = [group["params"] for group in optimizer_for(policy, 0.1).param_groups]
    assert [{p.ndim for p in part} for part in groups] == [{1}, {2}]
    assert sum(map(len, groups)) == sum(p.requires_grad for p in policy.parameters())


def test_cycle():
    items = cycle(list("abc"), random.Random(0))
    passes = [[next(items) for _ in range(3)] for _ in range(20)]
    assert all(sorted(p) == list("abc") for p in passes) and len(set(map(tuple, passes))) > 3
    with pytest.raises(UserError, match="no demonstrations"):
        next(cycle([], random.Random(0)))


def test_sft_loss():
    """Minus the mean over responses of their mean token log-prob: (2 + (1 + 2 + 6) / 3) / 2."""
    logps = torch.tensor([[-2.0, 0.0, 0.0], [-1.0, -2.0, -6.0]])
    assert sft_loss(logps, logps < 0) == 2.5


def test_train(monkeypatch):
    """Batches hold their share of harmless demonstrations, the loss is theirs, and it falls."""
    seen, records, real = [], [], sft.token_logps

    def spy(policy, batch, **more):
        logps = real(policy, batch, **more)
        seen.append((batch, logps.detach()))
        return logps

    monkeypatch.setattr(sft, "token_logps", spy)
    c = SFTConfig(steps=40, lr=1e-2, batch=4, helpful_share=0.25, blocks=1)
    loop = Loop("sft", log=lambda **r: records.append(r))
    train(tiny(), Letters(), ROWS, c, torch.float32, loop=loop)
    yes = Letters().answer("yes")
    assert len(records) == len(seen) == 40
    for (batch, logps), record in zip(seen, records):
        assert [group[0] for group in batch.source[1]].count(yes) == 1
        means = [row[m].mean().item() for row, m in zip(logps, batch.mask)]
        assert record["loss"] == pytest.approx(-sum(means) / 4, abs=1e-5)
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]


def test_a_kind_that_is_not_wanted_may_be_missing():
    records = []
    loop = Loop("sft", log=lambda **r: records.append(r))
    for share, rows in ((0.0, ROWS[:4]), (1.0, ROWS[4:])):
        c = SFTConfig(steps=1, batch=2, helpful_share=share)
        train(tiny(), Letters(), rows, c, torch.float32, loop=loop)
        with pytest.raises(UserError, match="no demonstrations of a kind"):
            c = SFTConfig(steps=1, batch=2, helpful_share=1 - share)
            train(tiny(), Letters(), rows, c, torch.float32)
    assert len(records) == 2
