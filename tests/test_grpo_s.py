"""grpo_s.py: the formulas against hand numbers and plain loops. Training: test_grpo_train.py."""

import math

import pytest
import torch

from config import GRPOConfig, settings
from data import HELPFUL
from grpo_s import (
    INFO,
    advantages,
    blend,
    data_hardness,
    difficulty,
    difficulty_scale,
    kl_k3,
    loss,
    model_responsiveness,
)
from kernels import group_advantage, token_logprobs

(SCALINGS,) = [f.metadata["choices"] for key, f, _ in settings() if key == "grpo.scaling"]


def sigma(x):
    return 1 / (1 + math.exp(-x))


def double(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


# ---------------------------------------------------------------------------- difficulty


def test_data_hardness():
    W = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    want = torch.tensor([[sigma(0), sigma(1)], [sigma(2), sigma(0.5)]], dtype=torch.float64)
    torch.testing.assert_close(data_hardness(W, 0.4), want / sigma(0.4))
    assert data_hardness(torch.tensor(0.3), 0.7).item() == 1  # an average prompt
    assert data_hardness(torch.tensor(0.9), 0.5) < 1 < data_hardness(torch.tensor(0.1), 0.5)


@pytest.mark.parametrize("drop, mean", [(0.0, 2.2), (0.2, 0.25), (0.39, 0.25), (0.4, 0.3)])
def test_model_responsiveness(drop, mean):
    """The mean is 2.2: 10 is furthest from it, then 0.1. Of five, floor(0.39 * 5) = 1 goes."""
    gaps = torch.tensor([0.1, 0.2, 0.3, 0.4, 10.0])
    got = model_responsiveness(gaps, 0.5, drop).item()
    assert got == pytest.approx(sigma(mean) / sigma(0.5))


def test_model_responsiveness_at_the_edges():
    one = model_responsiveness(torch.tensor([-0.3]), torch.tensor(-0.3), 0.9)
    assert one.item() == pytest.approx(1)
    far = model_responsiveness(torch.tensor([-19.0]), -800.0).item()  # finite: as for -20
    assert far == pytest.approx(sigma(-19) / sigma(-20))
    zeros = torch.zeros(3)
    for bad, drop in ((zeros[:0], 0.2), (zeros[None], 0.2), (zeros, 1.0), (zeros, -0.1)):
        with pytest.raises(ValueError, match="want gaps"):
            model_responsiveness(bad, 0.0, drop)


def test_difficulty_scale():
    a, b = torch.tensor([[0.5, 2.0]], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    want = {"none": [1.0, 1.0], "data": [0.5, 2.0], "model": [3.0, 3.0], "product": [1.5, 6.0]}
    want |= {"sum": [1.75, 2.5], "spread": [1.5**8, 6.0**8]}
    assert want.keys() == set(SCALINGS)
    for scaling, value in want.items():
        out = difficulty_scale(a, b, scaling)
        assert out.tolist() == [value] and not out.requires_grad
        assert (difficulty_scale(torch.ones(2), torch.tensor(1.0), scaling) == 1).all()
    with pytest.raises(ValueError, match="magic"):
        difficulty_scale(a, b, "magic")


def test_running_mean():
    means = {}
    got = [blend(means, "crime", x) for x in (2.0, 4.0, 5.0)] + [blend(means, "insult", 7.0)]
    assert got == [2.0, 3.0, 4.0, 7.0] and means == {"crime": 4.0, "insult": 7.0}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_difficulty(scaling):
    """Two batches of two categories in plain loops; the second meets the running means."""
    names, deltas, gap_means, mean_delta, mean_gap = ["crime", HELPFUL, "crime"], {}, {}, {}, {}
    for batch in range(2):
        W, gaps = double(3, 5, seed=batch).sigmoid(), double(3, 5, seed=batch + 2)
        alpha = difficulty(W, gaps, names, deltas, gap_means, scaling)
        for name, rows in (("crime", [0, 2]), (HELPFUL, [1])):
            all_w, all_gaps = W[rows].flatten().tolist(), gaps[rows].flatten().tolist()
            now_delta, now_gap = 1 - sum(all_w) / len(all_w), sum(all_gaps) / len(all_gaps)
            mean_delta[name] = (mean_delta.get(name, now_delta) + now_delta) / 2
            mean_gap[name] = (mean_gap.get(name, now_gap) + now_gap) / 2
            nearest = sorted(all_gaps, key=lambda gap: abs(gap - now_gap))
            inlying = nearest[: len(nearest) - len(nearest) // 5]
            b = sigma(sum(inlying) / len(inlying)) / sigma(mean_gap[name])
            for p in rows:
                a = sigma(1 - sum(W[p].tolist()) / 5) / sigma(mean_delta[name])
                want = {"none": 1, "data": a, "model": b, "product": a * b}
                want |= {"sum": (a + b) / 2, "spread": (a * b) ** 8}
                assert alpha[p].tolist() == pytest.approx([want[scaling]], abs=1e-12)


# ---------------------------------------------------------------------------- advantages


def test_advantages():
    """Two groups and an anchor. Samples 1 and 3: mean 2, std 1, alpha 3. Equal rewards: 0."""
    R = torch.tensor([[1.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    alpha = torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    A, learnt = advantages(R, alpha, 1, GRPOConfig(std_eps=0.5))
    want = [[-2.0, 2.0], [0.0, 0.0]]
    torch.testing.assert_close(A[:2, :2], torch.tensor(want, dtype=torch.float64))
    assert A[2, 2] == 1 and learnt.tolist() == [[True, True, False]] * 2 + [[False, False, True]]


def test_ends():
    """Of a group the best and the worst, also where several are; none where all are equal."""
    R = torch.tensor([[0.2, 0.9, -1.0, 0.3], [4.0, 3.0, 1.0, 1.0], [0.5] * 4])
    _, learnt = advantages(R, torch.ones(3, 1), 0, GRPOConfig(members="ends"))
    assert ["".join(map(str, row)) for row in learnt.int().tolist()] == ["01100", "10110", "00000"]


def test_alpha_one_is_grpo():
    """Advantages of plain GRPO, written out for two groups of three; equal rewards give none."""
    R = torch.tensor([[1.0, 2.0, 6.0], [0.3, 0.3, 0.3]], dtype=torch.float64)
    std = math.sqrt((4 + 1 + 9) / 3)
    want = [-2 / (std + 0.1), -1 / (std + 0.1), 3 / (std + 0.1), 0.0, 0.0, 0.0]
    alpha = difficulty_scale(torch.rand(2, 1), torch.tensor(5.0), "none").expand(2, 3)
    A = group_advantage(R, alpha, 0.1).flatten()
    assert A.tolist() == pytest.approx(want, abs=1e-12)
    logp, old, ref, _, mask = example(seed=3)
    grpo, _ = slow_loss(logp, old, ref, want, mask, 0.2, 0.2, 0.02)
    got, _ = loss(logp, old, ref, A, mask, 0.2, 0.2, 0.02)
    assert got.item() == pytest.approx(grpo.item(), abs=1e-12)
    assert torch.equal(group_advantage(R, torch.tensor([[2.0], [3.0]]), 0.1).flatten(), A * 2)


# ---------------------------------------------------------------------------- the loss


def test_kl_k3():
    d = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    logp = torch.full((3,), -1.5, dtype=torch.float64, requires_grad=True)
    out = kl_k3(logp, logp.detach() + d)
    want = torch.tensor([0.0, math.e - 2, math.exp(-2) + 1], dtype=torch.float64)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    torch.testing.assert_close(logp.grad, 1 - d.exp())  # d/dlogp (e^d - d - 1), d = ref - logp
    x = double(1000)
    assert (kl_k3(x, torch.zeros(1000)) >= 0).all() and kl_k3(x, x).abs().max() == 0
    far = kl_k3(torch.tensor([-1e4, 1e4]), torch.zeros(2))
    assert far.tolist() == pytest.approx([math.exp(20) - 21, 19], rel=1e-5)


def test_kl_k3_is_unbiased():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    torch.testing.assert_close((p * kl_k3(p.log(), q.log())).sum(), (p * (p / q).log()).sum())


def slow_loss(logp, old, ref, A, mask, clip, clip_high, beta_kl):
    """Token by token, in Python; torch scalars, so that autograd gives the gradient too."""
    total, told = 0.0, dict.fromkeys(INFO, 0.0)
    for i in range(len(A)):
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        weight = 1 / len(tokens) / len(A)
        for t in tokens:
            rho, d = torch.exp(logp[i, t] - old[i, t]), ref[i, t] - logp[i, t]
            if clip_high == 0 and A[i] > 0:  # A grad log pi, of value A
                surrogate = A[i] * (1 + logp[i, t] - logp[i, t].detach())
            else:
                surrogate = min(rho * A[i], min(max(rho, 1 - clip), 1 + clip_high) * A[i])
                told["clipped_low"] += weight * bool(A[i] < 0 and rho < 1 - clip)
                told["clipped_high"] += weight * bool(A[i] > 0 and rho > 1 + clip_high)
            total = total - weight * (surrogate - beta_kl * (torch.exp(d) - d - 1))
            told["kl"] -= weight * d.item()
            told["entropy"] -= weight * logp[i, t].item()
    return total, told


def example(B=6, T=5, seed=0):
    """Ratios on both sides of the clip, advantages of both signs, sequences of 1 to T tokens."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    logp = -3 * draw(B, T).sigmoid()
    old, ref = logp + 0.4 * draw(B, T), logp + 0.4 * draw(B, T)
    A = draw(B).abs() * (-1.0) ** torch.arange(B)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    return logp.requires_grad_(True), old, ref, A, torch.arange(T) < lengths[:, None]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "clip, clip_high, beta_kl",
    [(0.2, 0.2, 0.0), (0.2, 0.4, 0.3), (0.1, 0.1, 0.05), (0.2, 0.0, 0.0), (0.3, 0.0, 0.1)],
)
def test_loss_against_loops(seed, clip, clip_high, beta_kl):
    logp, old, ref, A, mask = example(seed=seed)
    got, info = loss(logp, old, ref, A, mask, clip, clip_high, beta_kl)
    want, slow_info = slow_loss(logp, old, ref, A, mask, clip, clip_high, beta_kl)
    assert info == pytest.approx(slow_info, abs=1e-12)
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    ours, oracle = (torch.autograd.grad(x, logp)[0] for x in (got, want))
    torch.testing.assert_close(ours, oracle, atol=1e-12, rtol=0)
    rho = torch.exp(logp - old)[mask]
    assert (A > 0).any() and (A < 0).any() and (rho > 1 + clip).any() and (rho < 1 - clip).any()


@pytest.mark.parametrize("temperature", (1.0, 0.5))
@pytest.mark.parametrize("trained", ("h", "W", "both"))
@pytest.mark.parametrize("on_policy", (False, True))
def test_gradient_through_token_logprobs(temperature, trained, on_policy):
    """As training takes it, against log_softmax and plain loops."""
    _, old, ref, A, mask = example(seed=1)
    n, V, D = int(mask.sum()), 11, 7
    h, W = double(n, D, seed=2).requires_grad_(), double(V, D, seed=3).requires_grad_()
    targets = torch.arange(n) % V
    wanted = {"h": (h,), "W": (W,), "both": (h, W)}[trained]
    h_in, W_in = h if trained != "W" else h.detach(), W if trained != "h" else W.detach()
    table = lambda logps: logps.new_zeros(mask.shape).masked_scatter(mask, logps)
    logp = table(token_logprobs(h_in, W_in, targets, temperature))
    direct = (h @ W.T / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    noise = 0 if on_policy else 0.4
    shift = direct.detach()
    old, ref = table(shift + noise * double(n, seed=4)), table(shift + 0.4 * double(n, seed=5))
    got, _ = loss(logp, old, ref, A, mask, 0.2, 0.2, 0.3)
    want, _ = slow_loss(table(direct), old, ref, A, mask, 0.2, 0.2, 0.3)
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    ours, oracle = (torch.autograd.grad(3 * x, wanted) for x in (got, want))
    torch.testing.assert_close(ours, oracle, atol=1e-11, rtol=1e-11)


def test_gradcheck():
    """Far from where the clip begins: finite differences see no kink."""
    _, old, ref, A, mask = example(B=3, T=2, seed=5)
    score = lambda logp: loss(logp, old, ref, A, mask, 0.2, 0.2, 0.3)[0]
    logp = (old + 0.4 * double(3, 2, seed=6)).requires_grad_()
    assert torch.autograd.gradcheck(score, (logp,))


@pytest.mark.parametrize(
    "clip_high, value, first, high",
    [
        (0.2, 1.2 + 0.5, [0.0, 0.5], 0.25),
        (0.6, 1.5 + 0.5, [1.5, 0.5], 0),
        (0.0, 2.0, [1.0, 1.0], 0),
    ],
)
def test_clip_has_a_side(clip_high, value, first, high):
    """Ratios 1.5, 0.5, 1.5, 0.5 and advantages 1, 1, -1, -1: the low clip holds the last.

    The high one may hold the first. At 0, the first two count with ratio 1.
    """
    rho = torch.tensor([[1.5], [0.5], [1.5], [0.5]], dtype=torch.float64)
    logp, zero = rho.log().requires_grad_(), torch.zeros_like(rho)
    A = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    out, info = loss(logp, zero, logp.detach(), A, rho > 0, clip_high=clip_high)
    out.backward()
    assert out.item() == pytest.approx(-(value - 1.5 - 0.8) / 4)
    assert (info["kl"], info["clipped_low"], info["clipped_high"]) == (0, 0.25, high)
    assert (-4 * logp.grad[:, 0]).tolist() == pytest.approx([*first, -1.5, 0.0])


def test_masked_tokens_do_not_matter():
    logp, old, ref, A, mask = example(seed=1)
    want, want_info = loss(logp, old, ref, A, mask, 0.2, 0.2, 0.1)
    grad = torch.autograd.grad(want, logp)[0]
    for garbage in (math.nan, math.inf, -1e30):
        x, o, r = (z.detach().masked_fill(~mask, garbage) for z in (logp, old, ref))
        out, info = loss(x.requires_grad_(), o, r, A, mask, 0.2, 0.2, 0.1)
        assert torch.equal(out, want) and info == want_info
        assert torch.equal(torch.autograd.grad(out, x)[0], grad)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()


def test_micro_batches_add_up():
    """A filler, divided by infinity, adds nothing."""
    logp, old, ref, A, mask = example(seed=2)
    whole, info = loss(logp, old, ref, A, mask, 0.2, 0.2, 0.1)
    cuts = [(slice(0, 1), 6), (slice(1, 4), 6), (slice(4, 6), 6), (slice(0, 2), math.inf)]
    parts = [loss(logp[s], old[s], ref[s], A[s], mask[s], 0.2, 0.2, 0.1, n) for s, n in cuts]
    total = sum(value for value, _ in parts)
    assert total.item() == pytest.approx(whole.item(), abs=1e-12) and parts[-1][0] == 0
    assert {k: sum(i[k] for _, i in parts) for k in info} == pytest.approx(info, abs=1e-12)
    ours, want = (torch.autograd.grad(x, logp)[0] for x in (total, whole))
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=0)


def test_on_policy_loss_is_zero_and_its_gradient_is_not():
    """Whatever the lengths: the loss is a mean over tokens within each sequence."""
    logp, _, _, _, mask = example(seed=4)
    A = group_advantage(double(2, 3, seed=1), 1.3).flatten()
    out, info = loss(logp, logp.detach(), logp.detach(), A, mask, 0.2, 0.2, 0.02)
    out.backward()
    assert (
        abs(out.item()) < 1e-12 and info["kl"] == info["clipped_low"] == info["clipped_high"] == 0
    )
    torch.testing.assert_close(logp.grad, -(A[:, None] * mask / mask.sum(1, keepdim=True)) / 6)


def test_loss_of_wrong_shapes():
    logp, old, ref, A, mask = example()
    bad = [(logp[:, 1:], old, ref, A, mask), (logp, old, ref, A, mask[:, 1:])]
    bad += [(logp, old, ref, A[:, None], mask), (logp, old, ref, A[1:], mask)]
    for args in bad:
        with pytest.raises(ValueError, match="want"):
            loss(*args)
