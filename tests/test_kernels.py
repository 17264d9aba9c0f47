"""kernels, what the project calls, on CPU: log-probs and loss against log_softmax in float64, the advantage against numbers by hand."""

from dataclasses import replace

import pytest
import torch

import kernels.logprob
from kernels import (
    Objective,
    backend,
    clipped_objective,
    group_advantage,
    grpo_loss,
    token_logprobs,
)

CHUNK = 32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels.logprob, "_rows", lambda W: CHUNK)


def problem(n, width=7, vocab=11, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, W = (
        torch.randn(k, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for k in (n, vocab)
    )
    return (
        h,
        W,
        torch.randint(vocab, (n,), generator=g),
        torch.randn(n, generator=g, dtype=torch.float64),
    )


def direct(h, W, targets, temperature):
    return (h @ W.T / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("n", (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17))
@pytest.mark.parametrize("temperature", (1.0, 0.5, 1.7))
def test_values_and_gradients(n, temperature):
    h, W, targets, weights = problem(n)
    got, want = token_logprobs(h, W, targets, temperature), direct(h, W, targets, temperature)
    assert got.shape == (n,) and got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got, (h, W), weights), torch.autograd.grad(want, (h, W), weights)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)
    assert (
        got - direct(h, W, (targets + 1) % 11, temperature)
    ).abs().max() > 0.1  # another target is another number


@pytest.mark.parametrize("n, temperature", ((5, 1.0), (CHUNK + 3, 0.5)))
def test_gradcheck(n, temperature):
    h, W, targets, _ = problem(n, width=2, vocab=4)
    assert torch.autograd.gradcheck(lambda h, W: token_logprobs(h, W, targets, temperature), (h, W))
    assert torch.autograd.gradcheck(
        lambda h: token_logprobs(h, W.detach(), targets, temperature), (h,)
    )  # a frozen head


def test_rows_of_a_chunk(monkeypatch):
    monkeypatch.undo()
    assert [
        kernels.logprob._rows(torch.empty(V, 1, dtype=t))
        for V, t in ((49152, torch.float32), (49152, torch.bfloat16), (2**21, torch.float32))
    ] == [160, 336, 4]
    assert kernels.logprob._rows(torch.empty(2**24, 1)) == 1


def test_only_one_gradient_wanted():
    h, W, targets, weights = problem(CHUNK + 3)
    both = torch.autograd.grad(token_logprobs(h, W, targets), (h, W), weights)
    torch.testing.assert_close(
        torch.autograd.grad(token_logprobs(h, W.detach(), targets), h, weights)[0],
        both[0],
        atol=1e-12,
        rtol=1e-12,
    )
    assert torch.equal(
        torch.autograd.grad(token_logprobs(h.detach(), W, targets), W, weights)[0], both[1]
    )


def test_float32_far_from_zero():
    """Logits of some hundreds: the log-sum-exp must not overflow."""
    h, W, targets, _ = problem(CHUNK + 3, dtype=torch.float32)
    got = token_logprobs(h * 100, W, targets)
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(
        got.double(), direct(h.double() * 100, W.double(), targets, 1.0), atol=2e-3, rtol=1e-5
    )


def test_bfloat16():
    """Products in bfloat16, everything after them in float32; gradients come back in the inputs' dtype."""
    h, W, targets, weights = problem(CHUNK + 3, dtype=torch.bfloat16)
    got = token_logprobs(h, W, targets, 0.5)
    want = direct(h.double(), W.double(), targets, 0.5)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 0.1 and (got - want).abs().max() > 0
    ours, theirs = (
        torch.autograd.grad(got, (h, W), weights.float()),
        torch.autograd.grad(want, (h, W), weights),
    )
    (frozen,) = torch.autograd.grad(token_logprobs(h, W.detach(), targets, 0.5), h, weights.float())
    for a, b in zip((*ours, frozen), (*theirs, theirs[0])):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b.double()).norm() < 0.02 * b.double().norm()


def test_autocast():
    """Under autocast the products run in bfloat16 and float32 weights still get float32 gradients."""
    h, W, targets, weights = problem(CHUNK + 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(h, W, targets)
    want = direct(h, W, targets, 1.0)
    assert got.dtype == torch.float32 and 0 < (got - want).abs().max() < 0.1
    for a, b in zip(
        torch.autograd.grad(got, (h, W), weights.float()),
        torch.autograd.grad(want, (h, W), weights.float()),
    ):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize(
    "dtype, out",
    (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ),
)
def test_no_tokens(dtype, out):
    h, W, targets, _ = problem(0, dtype=dtype)
    got = token_logprobs(h, W, targets)
    assert got.shape == (0,) and got.dtype == out
    got.sum().backward()


def test_logprob_errors():
    h, W, targets, _ = problem(4)
    for bad in (
        (h[0], W, targets),
        (h[:, :3], W, targets),
        (h, W, targets[:3]),
        (h, W[0], targets),
        (h, W, targets[:, None]),
    ):
        with pytest.raises(ValueError, match=r"want \(N, D\), \(V, D\), \(N,\)"):
            token_logprobs(*bad)
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_logprobs(h, W, targets, temperature)
    for bad, name in (
        ((h.half(), W, targets), "h is"),
        ((h, W.half(), targets), "W is"),
        ((h, W, targets.int()), "targets are"),
        ((h, W, targets.to("meta")), "one device"),
    ):
        with pytest.raises(ValueError, match=name):
            token_logprobs(*bad)


def test_one_rule_chooses_the_backend(monkeypatch):
    x = torch.zeros(1)
    assert backend(x).__name__ == "kernels.reference"
    monkeypatch.setenv("DRIRL_KERNELS", "triton")
    assert backend(x).__name__ == "kernels.triton_kernels"
    monkeypatch.setenv("DRIRL_KERNELS", "cuda")
    with pytest.raises(ValueError, match="want triton or torch"):
        backend(x)


# ------------------------------------------------------------------------------------------------ the objective on top


def objective(n, logp, seed=0, **more):
    """Ratios on both sides of the clip, advantages of both signs, a token without weight."""
    g = torch.Generator().manual_seed(seed)
    A, ref, old = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3))
    weight = torch.rand(n, generator=g, dtype=torch.float64)
    weight[0] = 0
    return Objective(
        **{
            "advantage": A,
            "weight": weight,
            "logp_ref": logp.detach() + 0.4 * ref,
            "logp_old": logp.detach() + 0.3 * old,
            "clip": 0.2,
            "beta_kl": 0.3,
            **more,
        }
    )


@pytest.mark.parametrize("n", (1, CHUNK, 2 * CHUNK + 5))
@pytest.mark.parametrize("temperature", (1.0, 0.5))
@pytest.mark.parametrize("trained", ("h", "W", "both"))
@pytest.mark.parametrize("on_policy", (False, True))
def test_grpo_loss(n, temperature, trained, on_policy):
    h, W, targets, _ = problem(n)
    want_logp = direct(h, W, targets, temperature)
    o = objective(n, want_logp, **({"logp_old": None} if on_policy else {}))
    want = -(o.weight * clipped_objective(want_logp, o)[0]).sum()
    wrt = {"h": (h,), "W": (W,), "both": (h, W)}[trained]
    ours = [h if trained != "W" else h.detach(), W if trained != "h" else W.detach()]
    got, logp = grpo_loss(*ours, targets, o, temperature)
    torch.testing.assert_close(logp, want_logp, atol=1e-12, rtol=0)
    assert not logp.requires_grad and got.item() == pytest.approx(want.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(3 * got, wrt), torch.autograd.grad(3 * want, wrt)):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_grpo_loss_gradcheck():
    h, W, targets, _ = problem(5, width=2, vocab=4)
    o = objective(5, direct(h, W, targets, 1.0))
    assert torch.autograd.gradcheck(lambda h, W: grpo_loss(h, W, targets, o)[0], (h, W))


def test_no_second_derivative():
    """The gradient is a constant to autograd: a derivative of it would be wrong, so it is an error."""
    h, W, targets = problem(3)[:3]
    (first,) = torch.autograd.grad(
        token_logprobs(h, W.detach(), targets).pow(2).sum(), h, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_grpo_loss_errors():
    h, W, targets, _ = problem(4)
    o = objective(4, direct(h, W, targets, 1.0))
    for name in ("advantage", "weight", "logp_ref", "logp_old"):
        for bad in (getattr(o, name)[:3], getattr(o, name)[:, None], getattr(o, name).to("meta")):
            with pytest.raises(ValueError, match=name):
                grpo_loss(h, W, targets, replace(o, **{name: bad}))
    with pytest.raises(ValueError, match="temperature"):
        grpo_loss(h, W, targets, o, 0.0)
    loss, logp = grpo_loss(h[:0], W, targets[:0], o.rows(slice(0, 0)))
    assert loss == 0 and logp.shape == (0,)


# ------------------------------------------------------------------------------------------------ group advantage


def test_hand_numbers():
    """Rewards 1 2 3 6: mean 3, squared differences 4 1 0 9, population variance 14 / 4 (the sample's would be 14 / 3)."""
    got = group_advantage(
        torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 4.0]], dtype=torch.double), eps=0.5
    )
    torch.testing.assert_close(
        got[0], torch.tensor([-2.0, -1.0, 0.0, 3.0], dtype=torch.double) / (3.5**0.5 + 0.5)
    )
    torch.testing.assert_close(
        got[1], torch.tensor([-1.0, -1.0, -1.0, 3.0], dtype=torch.double) / (3**0.5 + 0.5)
    )


@pytest.mark.parametrize("value", (0.0, 0.1, -1 / 3, 1e6 + 0.3, 1e-8))
@pytest.mark.parametrize("size", (1, 3, 7, 8))
def test_equal_rewards_give_exactly_zero(value, size):
    """Also where the mean of equal numbers rounds to another number; the group beside them is not touched."""
    rewards = torch.stack((torch.full((size,), value), torch.arange(size).float()))
    got = group_advantage(rewards, eps=1e-12)
    assert (got[0] == 0).all()
    assert size == 1 or (got[1] != 0).any()


def test_alpha_scales_and_rewards_do_not():
    """alpha is outside the normalisation: scaling or shifting the rewards changes nothing, scaling alpha scales A."""
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    plain = group_advantage(rewards, eps=0)
    torch.testing.assert_close(
        plain.mean(1), torch.zeros(5, dtype=torch.double), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(plain.pow(2).mean(1), torch.ones(5, dtype=torch.double))
    torch.testing.assert_close(group_advantage(rewards * 7 + 2, eps=0), plain)
    torch.testing.assert_close(group_advantage(rewards, 2.5, eps=0), 2.5 * plain)
    prompts, samples = torch.rand(5, 1, dtype=torch.double), torch.rand(5, 6, dtype=torch.double)
    torch.testing.assert_close(group_advantage(rewards, prompts, eps=0), prompts * plain)
    torch.testing.assert_close(group_advantage(rewards, samples, eps=0), samples * plain)


def test_advantage_errors():
    R = torch.zeros(2, 3)
    for rewards in (torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"rewards must be \(P, G\)"):
            group_advantage(rewards)
    for alpha, text in (
        (torch.ones(2), "alpha must be a number"),
        (torch.ones(3, 3), "alpha must be a number"),
        (torch.ones(4, 2, 3), "alpha must be a number"),
        (float("nan"), "alpha must be finite"),
        (torch.tensor([[1.0], [float("inf")]]), "alpha must be finite"),
        (torch.ones(2, 1, device="meta"), "alpha is on meta"),
    ):
        with pytest.raises(ValueError, match=text):
            group_advantage(R, alpha)
    with pytest.raises(ValueError, match="eps"):
        group_advantage(R, 1.0, -1e-3)
    assert group_advantage(torch.zeros(0, 3)).shape == (0, 3)
