"""sft.py: the schedule, what is trained, the batches, and that the loss falls."""

import random
from contextlib import nullcontext

import pytest
import torch

import sft
from data import HELPFUL, UserError
from loop import Loop
from sft import SFTConfig, cycle, set_lr, train, train_top
from test_grpo_train import Letters, tiny

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


def test_train_top():
    for blocks, frozen in ((1, 1), (2, 0), (5, 0), (0, 0)):
        policy = tiny()
        assert train_top(policy, blocks) == frozen
        trained = {n for n, p in policy.named_parameters() if p.requires_grad}
        assert ("embed_tokens.weight" in trained) == (frozen == 0) and "norm.weight" in trained
        assert any(n.startswith("layers.0") for n in trained) == (frozen == 0) and any(
            n.startswith("layers.1") for n in trained
        )


def test_cycle():
    items = cycle(list("abc"), random.Random(0))
    passes = [[next(items) for _ in range(3)] for _ in range(20)]
    assert all(sorted(p) == list("abc") for p in passes) and len(set(map(tuple, passes))) > 3
    with pytest.raises(UserError, match="no demonstrations"):
        next(cycle([], random.Random(0)))


def test_train(monkeypatch):
    """The loss is minus the mean over demonstrations of the mean token log-prob, batches hold their share of harmless ones, and it falls."""
    batches, records, real = [], [], sft.token_logps
    monkeypatch.setattr(
        sft, "token_logps", lambda *a, **k: batches.append((a[1], real(*a, **k))) or batches[-1][1]
    )
    train(
        tiny(),
        Letters(),
        ROWS,
        SFTConfig(steps=40, lr=1e-2, batch=4, helpful_share=0.25, blocks=1),
        nullcontext,
        loop=Loop("sft", log=lambda **r: records.append(r)),
    )
    yes = Letters().answer("yes")
    for (batch, logps), record in zip(batches, records):
        assert [c[0] == yes for c in batch.source[1]].count(True) == 1
        assert record["loss"] == pytest.approx(
            -sum((row[m].mean().item() for row, m in zip(logps, batch.mask))) / 4, abs=1e-5
        )
    assert len(records) == 40 and records[-1]["loss"] < 0.5 * records[0]["loss"]
