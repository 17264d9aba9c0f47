"""Exercise 16, against loops over tokens, autograd giving both gradients."""

import math

import pytest
import torch

from exercises.grading import refuses, same

MIRRORS, SECTION = ("grpo_s.loss",), "The loss"


def example(B, T, seed):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    old, ref = (logp + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(B, T, generator=g) < 0.6  # completions with gaps, from any column
    mask[torch.arange(B), torch.randint(T, (B,), generator=g)] = True  # a token in every row
    return logp.requires_grad_(), old, ref, torch.randn(B, generator=g, dtype=torch.float64), mask


def slow(logp, old, ref, A, mask, clip, high, beta_kl):
    """-J and the four numbers to log, one token after the other."""
    total, told = 0.0, dict.fromkeys(("kl", "entropy", "clipped_low", "clipped_high"), 0.0)
    for i in range(len(A)):
        n, a = mask[i].sum().item() * len(A), A[i].item()
        for t in mask[i].nonzero()[:, 0].tolist():
            d = ref[i, t] - logp[i, t]
            base = logp[i, t].detach() if high == 0 and a > 0 else old[i, t]
            rho = (logp[i, t] - base).exp()
            held = rho.item() > 1 + high if a > 0 else rho.item() < 1 - clip
            limit = 1 + high if a > 0 else 1 - clip
            total = total - (limit * a if held else rho * a) / n + beta_kl * (d.exp() - d - 1) / n
            told["kl"] -= d.item() / n
            told["entropy"] -= logp[i, t].item() / n
            told["clipped_high" if a > 0 else "clipped_low"] += held / n
    return total, told


@pytest.mark.parametrize(
    "B, T, clip, high, beta_kl, seed",
    [
        (1, 1, 0.2, 0.2, 0.0, 0),
        (6, 5, 0.2, 0.2, 0.0, 1),
        (5, 5, 0.1, 0.3, 0.3, 2),
        (4, 9, 0.3, 0.1, 0.05, 3),
        (6, 5, 0.2, 0.0, 0.1, 4),
    ],
)
def test_loops(my, B, T, clip, high, beta_kl, seed):
    logp, *rest = example(B, T, seed)
    got, stats = my.loss(logp, *rest, clip, high, beta_kl)
    want, told = slow(logp, *rest, clip, high, beta_kl)
    same(got, want.detach(), "the loss")
    same(torch.autograd.grad(got, logp)[0], torch.autograd.grad(want, logp)[0], "its gradient")
    same(stats, told, "what it tells")


def test_each_side_of_the_clip(my):
    """A good token too likely, one too unlikely; a bad one too likely, one too unlikely."""
    logp = torch.tensor([[1.5], [0.5], [1.5], [0.5]], dtype=torch.float64).log().requires_grad_()
    A = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    old, mask = torch.zeros(4, 1, dtype=torch.float64), torch.ones(4, 1, dtype=torch.bool)
    got, stats = my.loss(logp, old, old, A, mask)
    want = torch.tensor([[0.0], [-0.5], [1.5], [0.0]], dtype=torch.float64) / 4
    same(got.item(), -(1.2 + 0.5 - 1.5 - 0.8) / 4, "the loss")
    same(torch.autograd.grad(got, logp)[0], want, "its gradient")
    same(stats["clipped_low"], 0.25, "clipped_low")
    same(stats["clipped_high"], 0.25, "clipped_high")


@pytest.mark.parametrize("clip, high", [(0.2, 0.2), (0.2, 0.0), (0.0, 0.0)])
def test_fresh_samples(my, clip, high):
    """logp_old is logp: rho is 1, where a bound may lie, and the gradient is that of A log pi."""
    logp, _, ref, A, mask = example(6, 5, 6)
    got, _ = my.loss(logp, logp.detach(), ref, A, mask, clip, high)
    want, _ = slow(logp, logp.detach(), ref, A, mask, clip, high, 0.0)
    what = "its gradient at rho 1 (torch.minimum halves it at ties, clamp does not)"
    same(torch.autograd.grad(got, logp)[0], torch.autograd.grad(want, logp)[0], what)


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -1e30))
def test_masked_positions_hold_anything(my, garbage):
    logp, old, ref, A, mask = example(5, 6, 4)
    want = slow(logp, old, ref, A, mask, 0.2, 0.2, 0.1)[0]
    dirty, o, r = (x.detach().masked_fill(~mask, garbage) for x in (logp, old, ref))
    got = my.loss(dirty.requires_grad_(), o, r, A, mask, 0.2, 0.2, 0.1)[0]
    same(got, want.detach(), f"the loss, {garbage} where masked")
    same(torch.autograd.grad(got, dirty)[0], torch.autograd.grad(want, logp)[0], "its gradient")


def test_good_samples_need_no_old_log_probs(my):
    """clip_high 0: pi_old may be unknown where A > 0."""
    logp, old, ref, A, mask = example(6, 5, 4)
    unknown = torch.where((A > 0)[:, None], math.nan, old)
    want, told = slow(logp, old, ref, A, mask, 0.2, 0.0, 0.1)
    got, stats = my.loss(logp, unknown, ref, A, mask, 0.2, 0.0, 0.1)
    same(got, want.detach(), "the loss, clip_high 0")
    same(torch.autograd.grad(got, logp)[0], torch.autograd.grad(want, logp)[0], "its gradient")
    same(stats, told, "what it tells")


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (1,), (3, 3), (), (2,)])
def test_other_shapes(my, shape):
    x, mask = torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool)
    refuses(my.loss, x, x, x, torch.ones(shape), mask)
    refuses(my.loss, x, x[:, :1], x, torch.ones(3), mask)
    refuses(my.loss, x, x, x[:1], torch.ones(3), mask)
    refuses(my.loss, x, x, x, torch.ones(3), mask[:, :2])
    refuses(my.loss, x[:, :2], x, x, torch.ones(3), mask)


def test_micro_batches(my):
    parts = example(6, 4, 5)
    slices = (slice(0, 1), slice(1, 4), slice(4, 6))
    found = [my.loss(*(x[s] for x in parts), 0.2, 0.2, 0.1, sequences=6) for s in slices]
    total, told = slow(*parts, 0.2, 0.2, 0.1)
    same(sum(x for x, _ in found), total.detach(), "the sum of three micro-batches' losses")
    for name, value in told.items():
        same(sum(stats[name] for _, stats in found), value, f"of their {name}")


def test_float32(my):
    *parts, mask = (x.detach() for x in example(6, 5, 1))
    want, told = slow(*parts, mask, 0.2, 0.2, 0.1)
    got, stats = my.loss(*(x.float() for x in parts), mask, 0.2, 0.2, 0.1)
    same(got, want.float(), "the loss in float32", 1e-5)
    same(stats, told, "what it tells, in float32", 1e-5)
