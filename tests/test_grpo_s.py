"""grpo_s.py: the pieces against hand numbers and plain loops (the training loop: test_grpo_train.py)."""

import math

import pytest
import torch

import grpo_s
from data import HELPFUL
from encoder import WordEncoder, similarity, split_sentences
from grpo_s import (
    GRPOConfig,
    blend,
    data_hardness,
    difficulty,
    difficulty_scale,
    loss,
    model_responsiveness,
    similarities,
)
from kernels import group_advantage, kl_k3


def sigma(x):
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------------ difficulty


def test_data_hardness():
    W = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    want = [
        [sigma(0) / sigma(0.4), sigma(1) / sigma(0.4)],
        [sigma(2) / sigma(0.4), sigma(0.5) / sigma(0.4)],
    ]
    torch.testing.assert_close(data_hardness(W, 0.4), torch.tensor(want, dtype=torch.float64))
    assert data_hardness(torch.tensor(0.3), 0.7).item() == 1  # an average prompt
    assert data_hardness(torch.tensor(0.9), 0.5) < 1 < data_hardness(torch.tensor(0.1), 0.5)


def test_model_responsiveness():
    gaps = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])  # mean 22: 100 is furthest, then 1
    assert model_responsiveness(gaps, 0.5, 0.0).item() == pytest.approx(sigma(22) / sigma(0.5))
    assert model_responsiveness(gaps / 10, 0.5, 0.2).item() == pytest.approx(
        sigma(0.25) / sigma(0.5)
    )
    assert model_responsiveness(gaps / 10, 0.5, 0.39).item() == pytest.approx(
        sigma(0.25) / sigma(0.5)
    )  # floor(1.95) = 1
    assert model_responsiveness(gaps / 10, 0.5, 0.4).item() == pytest.approx(
        sigma(0.3) / sigma(0.5)
    )
    assert model_responsiveness(
        torch.tensor([-0.3]), torch.tensor(-0.3), 0.9
    ).item() == pytest.approx(1)
    for bad, drop in (
        (torch.zeros(0), 0.2),
        (torch.zeros(2, 2), 0.2),
        (torch.zeros(3), 1.0),
        (torch.zeros(3), -0.1),
    ):
        with pytest.raises(ValueError):
            model_responsiveness(bad, 0.0, drop)


def test_difficulty_scale():
    a, b = torch.tensor([[0.5, 2.0]], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    want = {
        "none": [[1.0, 1.0]],
        "data": [[0.5, 2.0]],
        "model": [[3.0, 3.0]],
        "product": [[1.5, 6.0]],
        "sum": [[1.75, 2.5]],
        "spread": [[1.5**8, 6.0**8]],
    }
    assert set(want) == set(grpo_s.SCALINGS)
    for scaling, value in want.items():
        out = difficulty_scale(a, b, scaling)
        assert out.tolist() == value and not out.requires_grad
        assert (difficulty_scale(torch.ones(2), torch.tensor(1.0), scaling) == 1).all()
    with pytest.raises(ValueError, match="magic"):
        difficulty_scale(a, b, "magic")


def test_running_mean():
    means = {}
    assert blend(means, "crime", 2.0, 0.9) == pytest.approx(2.0) and blend(
        means, "crime", 4.0, 0.9
    ) == pytest.approx(2.2)
    assert blend(means, "insult", 7.0, 0.9) == pytest.approx(7.0) and blend(
        means, "crime", 2.2, 0.9
    ) == pytest.approx(2.2)
    assert means == pytest.approx({"crime": 2.2, "insult": 7.0})


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("scaling", grpo_s.SCALINGS)
def test_difficulty(scaling, per_sample):
    """Two batches of two categories in plain loops; the second meets the moving averages."""
    g, names = torch.Generator().manual_seed(0), ["crime", HELPFUL, "crime"]
    c = GRPOConfig(scaling=scaling, per_sample=per_sample, drop=0.2, decay=0.8)
    deltas, gap_means, mean_delta, mean_gap = {}, {}, {}, {}
    for _ in range(2):
        W, gaps = torch.rand(3, 5, generator=g), torch.randn(3, 5, generator=g)
        alpha = difficulty(W, gaps, names, deltas, gap_means, c)
        for name, rows in (("crime", [0, 2]), (HELPFUL, [1])):
            all_w, all_gaps = (
                [W[p, i].item() for p in rows for i in range(5)],
                [gaps[p, i].item() for p in rows for i in range(5)],
            )
            now_delta, now_gap = 1 - sum(all_w) / len(all_w), sum(all_gaps) / len(all_gaps)
            mean_delta[name] = 0.8 * mean_delta.get(name, now_delta) + 0.2 * now_delta
            mean_gap[name] = 0.8 * mean_gap.get(name, now_gap) + 0.2 * now_gap
            inlying = sorted(all_gaps, key=lambda x: abs(x - now_gap))[
                : len(all_gaps) - len(all_gaps) // 5
            ]
            b = sigma(sum(inlying) / len(inlying)) / sigma(mean_gap[name])
            for p in rows:
                for i in range(5):
                    w = W[p, i].item() if per_sample else sum(W[p].tolist()) / 5
                    a = sigma(1 - w) / sigma(mean_delta[name])
                    want = {
                        "none": 1,
                        "data": a,
                        "model": b,
                        "product": a * b,
                        "sum": (a + b) / 2,
                        "spread": (a * b) ** 8,
                    }[scaling]
                    assert alpha[p, i].item() == pytest.approx(want, abs=1e-5, rel=1e-4)


def test_similarities():
    texts = [
        ["One cat. Two dogs!", "####", "A bird sings\n#### Two dogs"],
        ["Nothing alike", "Two dogs", "one cat"],
    ]
    demonstrations, encoder = ["one cat\n#### Two dogs.", "A bird sings"], WordEncoder()
    W = similarities(encoder, texts, demonstrations)
    for p, group in enumerate(texts):
        for i, t in enumerate(group):
            direct = (
                similarity(
                    encoder.embed(split_sentences(t)),
                    encoder.embed(split_sentences(demonstrations[p])),
                )
                if split_sentences(t)
                else torch.tensor(0.0)
            )
            assert W[p, i].item() == pytest.approx(direct.item(), abs=1e-5)
    assert W[0, 0].item() == pytest.approx(1, abs=1e-5) and W[0, 1] == 0 and W[1, 0].abs() < 0.5


# ------------------------------------------------------------------------------------------------ the loss


def test_kl_k3():
    d = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    logp = torch.full((3,), -1.5, dtype=torch.float64, requires_grad=True)
    out = kl_k3(logp, logp.detach() + d)
    torch.testing.assert_close(
        out, torch.tensor([0.0, math.e - 2, math.exp(-2) + 1], dtype=torch.float64)
    )
    out.sum().backward()
    torch.testing.assert_close(logp.grad, 1 - d.exp())  # d/dlogp (e^d - d - 1), d = ref - logp
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert (kl_k3(x, torch.zeros(1000)) >= 0).all() and kl_k3(x, x).abs().max() == 0
    far = kl_k3(torch.tensor([-1e4, 1e4]), torch.zeros(2))
    assert (
        far.isfinite().all()
        and far[0].item() == pytest.approx(math.exp(20) - 21, rel=1e-5)
        and far[1].item() == pytest.approx(19)
    )


def test_kl_k3_is_unbiased():
    p, q = (
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64),
    )
    torch.testing.assert_close((p * kl_k3(p.log(), q.log())).sum(), (p * (p / q).log()).sum())


def slow_loss(logp, old, ref, A, mask, clip, beta_kl):
    """Token by token, in Python; torch scalars, so that autograd gives the gradient too."""
    total, clipped, kl = 0.0, 0.0, 0.0
    for i in range(len(A)):
        at = [t for t in range(mask.shape[1]) if mask[i, t]]
        for t in at:
            rho, d = torch.exp(logp[i, t] - old[i, t]), ref[i, t] - logp[i, t]
            bounded = min(max(rho, 1 - clip), 1 + clip)
            k3 = torch.exp(d) - d - 1
            total = total - (min(rho * A[i], bounded * A[i]) - beta_kl * k3) / len(at) / len(A)
            kl += k3.item() / len(at) / len(A)
            clipped += (
                bool((A[i] > 0 and rho > 1 + clip) or (A[i] < 0 and rho < 1 - clip))
                / len(at)
                / len(A)
            )
    return total, {"kl": float(kl), "clipped": float(clipped)}


def example(B=6, T=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    logp, A = (
        -torch.rand(B, T, generator=g, dtype=torch.float64) * 3,
        torch.randn(B, generator=g, dtype=torch.float64),
    )
    old, ref = (logp + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    return logp.requires_grad_(True), old, ref, A, torch.arange(T) < lengths[:, None]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clip, beta_kl", [(0.2, 0.0), (0.2, 0.3), (0.1, 0.05)])
def test_loss_against_loops(seed, clip, beta_kl):
    logp, old, ref, A, mask = example(seed=seed)
    out, stats = loss(logp, old, ref, A, mask, clip, beta_kl)
    want, slow_stats = slow_loss(logp, old, ref, A, mask, clip, beta_kl)
    assert stats == pytest.approx(slow_stats, abs=1e-10) and out.item() == pytest.approx(
        want.item(), abs=1e-12
    )
    torch.testing.assert_close(
        torch.autograd.grad(out, logp)[0], torch.autograd.grad(want, logp)[0], atol=1e-12, rtol=0
    )
    rho = torch.exp(logp - old)[mask]
    assert (A > 0).any() and (A < 0).any() and (rho > 1 + clip).any() and (rho < 1 - clip).any()


def test_clip_has_a_side():
    """Rows: a good token grown too likely, a good one too unlikely, a bad one too likely, a bad one too unlikely."""
    logp = torch.log(
        torch.tensor([[1.5], [0.5], [1.5], [0.5]], dtype=torch.float64)
    ).requires_grad_(True)
    zero, A = (
        torch.zeros(4, 1, dtype=torch.float64),
        torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64),
    )
    out, stats = loss(logp, zero, logp.detach(), A, torch.ones(4, 1, dtype=torch.bool), clip=0.2)
    out.backward()
    assert (
        out.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
        and stats["clipped"] == 0.5
        and stats["kl"] == 0
    )
    torch.testing.assert_close(
        logp.grad[:, 0] * 4, torch.tensor([0.0, -0.5, 1.5, 0.0], dtype=torch.float64)
    )


def test_masked_tokens_do_not_matter():
    logp, old, ref, A, mask = example(seed=1)
    want, want_stats = loss(logp, old, ref, A, mask, 0.2, 0.1)
    grad = torch.autograd.grad(want, logp)[0]
    for garbage in (math.nan, math.inf, -1e30):
        x, o, r = (z.detach().masked_fill(~mask, garbage) for z in (logp, old, ref))
        out, stats = loss(x.requires_grad_(True), o, r, A, mask, 0.2, 0.1)
        assert (
            torch.equal(out, want)
            and stats == want_stats
            and torch.equal(torch.autograd.grad(out, x)[0], grad)
        )
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()


def test_micro_batches_add_up():
    logp, old, ref, A, mask = example(seed=2)
    whole, stats = loss(logp, old, ref, A, mask, 0.2, 0.1)
    parts = [
        loss(logp[s], old[s], ref[s], A[s], mask[s], 0.2, 0.1, sequences=6)
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    total = sum(p for p, _ in parts)
    assert total.item() == pytest.approx(whole.item(), abs=1e-12)
    assert {k: sum(s[k] for _, s in parts) for k in stats} == pytest.approx(stats, abs=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(total, logp)[0], torch.autograd.grad(whole, logp)[0], atol=1e-12, rtol=0
    )


def test_alpha_one_is_grpo():
    """Advantages of plain GRPO, written out for two groups of three; a group of equal rewards has none."""
    R = torch.tensor([[1.0, 2.0, 6.0], [0.3, 0.3, 0.3]], dtype=torch.float64)
    std = math.sqrt((4 + 1 + 9) / 3)
    A = group_advantage(
        R, difficulty_scale(torch.rand(2, 1), torch.tensor(5.0), "none").expand(2, 3), 0.1
    )
    torch.testing.assert_close(
        A,
        torch.tensor(
            [[-2 / (std + 0.1), -1 / (std + 0.1), 3 / (std + 0.1)], [0, 0, 0]], dtype=torch.float64
        ),
    )
    logp, old, ref, _, mask = example(seed=3)
    grpo = slow_loss(
        logp,
        old,
        ref,
        [-2 / (std + 0.1), -1 / (std + 0.1), 3 / (std + 0.1), 0.0, 0.0, 0.0],
        mask,
        0.2,
        0.02,
    )[0]
    assert loss(logp, old, ref, A.flatten(), mask, 0.2, 0.02)[0].item() == pytest.approx(
        grpo.item(), abs=1e-12
    )
    assert torch.equal(group_advantage(R, torch.tensor([[2.0], [3.0]]), 0.1), A * 2)


def test_on_policy_loss_is_zero_and_its_gradient_is_not():
    """Whatever the lengths: the loss is a mean over tokens within each sequence."""
    logp, _, _, _, mask = example(seed=4)
    A = group_advantage(
        torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1.3
    ).flatten()
    out, stats = loss(logp, logp.detach(), logp.detach(), A, mask, 0.2, 0.02)
    out.backward()
    assert abs(out.item()) < 1e-12 and stats == {"kl": 0, "clipped": 0}
    torch.testing.assert_close(logp.grad, -(A[:, None] * mask / mask.sum(1, keepdim=True)) / 6)


def test_loss_of_wrong_shapes():
    logp, old, ref, A, mask = example()
    for bad in (
        (logp[:, 1:], old, ref, A, mask),
        (logp, old, ref, A[:, None], mask),
        (logp, old, ref, A[1:], mask),
        (logp, old, ref, A, mask[:, 1:]),
    ):
        with pytest.raises(ValueError, match="want"):
            loss(*bad)
