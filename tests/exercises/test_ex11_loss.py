"""Exercise 11, against loops over tokens, autograd giving both gradients."""

import math

import pytest
import torch

from exercises.grading import same

MIRRORS, SECTION = ("grpo_s.loss",), "The loss"


def example(B, T, seed):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    old, ref = (logp + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(B, T, generator=g) < 0.6  # completions with gaps, from any column
    mask[torch.arange(B), torch.randint(T, (B,), generator=g)] = True  # a token in every row
    return logp.requires_grad_(), old, ref, torch.randn(B, generator=g, dtype=torch.float64), mask


def slow(logp, old, ref, A, mask, clip, beta_kl):
    """-J and the two numbers to log, one token after the other."""
    total, kl, clipped = 0.0, 0.0, 0.0
    for i in range(len(A)):
        n, a = mask[i].sum().item() * len(A), A[i].item()
        for t in mask[i].nonzero()[:, 0].tolist():
            rho, k3 = (
                (logp[i, t] - old[i, t]).exp(),
                (ref[i, t] - logp[i, t]).exp() - (ref[i, t] - logp[i, t]) - 1,
            )
            held = rho.item() > 1 + clip if a > 0 else rho.item() < 1 - clip
            total = (
                total
                - ((1 + clip if a > 0 else 1 - clip) * a if held else rho * a) / n
                + beta_kl * k3 / n
            )
            kl, clipped = kl + k3.item() / n, clipped + held / n
    return total, kl, clipped


@pytest.mark.parametrize(
    "B, T, clip, beta_kl, seed",
    [(1, 1, 0.2, 0.0, 0), (6, 5, 0.2, 0.0, 1), (5, 5, 0.1, 0.3, 2), (4, 9, 0.3, 0.05, 3)],
)
def test_loops(my, B, T, clip, beta_kl, seed):
    logp, *rest = example(B, T, seed)
    got, stats = my.loss(logp, *rest, clip, beta_kl)
    want, kl, clipped = slow(logp, *rest, clip, beta_kl)
    same(got, want.detach(), "the loss", 1e-10)
    same(torch.autograd.grad(got, logp)[0], torch.autograd.grad(want, logp)[0], "its gradient")
    same(stats["kl"], kl, "kl")
    same(stats["clipped"], clipped, "clipped")


def test_each_side_of_the_clip(my):
    """A good token too likely, one too unlikely; a bad one too likely, one too unlikely."""
    logp = torch.tensor([[1.5], [0.5], [1.5], [0.5]], dtype=torch.float64).log().requires_grad_()
    A, old = (
        torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64),
        torch.zeros(4, 1, dtype=torch.float64),
    )
    got, stats = my.loss(logp, old, old, A, torch.ones(4, 1, dtype=torch.bool))
    same(got.item(), -(1.2 + 0.5 - 1.5 - 0.8) / 4, "the loss")
    same(
        torch.autograd.grad(got, logp)[0],
        torch.tensor([[0.0], [-0.5], [1.5], [0.0]], dtype=torch.float64) / 4,
        "its gradient",
    )
    same(stats["clipped"], 0.5, "clipped")


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -1e30))
def test_masked_positions_hold_anything(my, garbage):
    logp, old, ref, A, mask = example(5, 6, 4)
    want = slow(logp, old, ref, A, mask, 0.2, 0.1)[0]
    dirty, o, r = (x.detach().masked_fill(~mask, garbage) for x in (logp, old, ref))
    got = my.loss(dirty.requires_grad_(), o, r, A, mask, 0.2, 0.1)[0]
    same(got, want.detach(), f"the loss, {garbage} where masked")
    same(torch.autograd.grad(got, dirty)[0], torch.autograd.grad(want, logp)[0], "its gradient")


def test_micro_batches(my):
    parts = example(6, 4, 5)
    losses, stats = zip(
        *(
            my.loss(*(x[s] for x in parts), 0.2, 0.1, sequences=6)
            for s in (slice(0, 1), slice(1, 4), slice(4, 6))
        )
    )
    total, kl, clipped = slow(*parts, 0.2, 0.1)
    same(sum(losses), total.detach(), "the sum of three micro-batches' losses")
    same(sum(s["kl"] for s in stats), kl, "of their kl")
    same(sum(s["clipped"] for s in stats), clipped, "of their clipped")
