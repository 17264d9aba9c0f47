"""Exercise 9: the gradient by listing every response, then from samples of another policy."""

import math

import pytest
import torch

from exercises.grading import refuses, same

MIRRORS, SECTION = ("reward.irl_loss",), "Inverse RL"


def world(P, M, seed):
    """Rewards (P, M) of all responses, log pi_ref, and each prompt's demonstration."""
    g = torch.Generator().manual_seed(seed)
    r, log_ref = (torch.randn(P, M, generator=g, dtype=torch.float64) for _ in range(2))
    return r.requires_grad_(), log_ref.log_softmax(1), torch.randint(M, (P, 1), generator=g)


def minus_gradient(r, log_ref, demo, beta):
    """Of the demonstrations' mean log-likelihood, in r: -(1[y = demo] - pi(y)) / (beta P)."""
    out = []
    for rewards, refs, d in zip(r.tolist(), log_ref.tolist(), demo[:, 0].tolist()):
        weight = [math.exp(x / beta + ref) for x, ref in zip(rewards, refs)]
        out.append([(w / sum(weight) - (y == d)) / beta / len(r) for y, w in enumerate(weight)])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("P, M, beta, seed", [(1, 2, 1.0, 0), (3, 6, 0.5, 1), (4, 4, 2.0, 2)])
def test_enumeration(my, P, M, beta, seed):
    r, log_ref, demo = world(P, M, seed)
    loss = my.irl_loss(r.gather(1, demo)[:, 0], r, beta, "importance", log_ref)
    likelihood = (r / beta + log_ref).log_softmax(1).gather(1, demo) - log_ref.gather(1, demo)
    same(loss, -likelihood.mean(), "the loss, all responses listed")
    same(torch.autograd.grad(loss, r)[0], minus_gradient(r, log_ref, demo, beta), "its gradient")


@pytest.mark.parametrize("counts", [(1, 2, 1), (3, 1, 2), (5, 1, 1)])
@pytest.mark.parametrize("beta", (1.0, 0.7))
def test_importance_weights(my, counts, beta):
    """Response y is listed counts[y] times, as samples of q = counts / K: weights undo q."""
    r, log_ref, demo = world(2, 3, sum(counts))
    samples = torch.arange(3).repeat_interleave(torch.tensor(counts)).expand(2, -1)
    log_q = torch.tensor(counts, dtype=torch.float64).div(sum(counts)).log()
    loss = my.irl_loss(
        r.gather(1, demo)[:, 0],
        r.gather(1, samples),
        beta,
        "importance",
        (log_ref - log_q).gather(1, samples),
    )
    same(
        torch.autograd.grad(loss, r)[0],
        minus_gradient(r, log_ref, demo, beta),
        "the gradient from samples of q",
    )
    loss = my.irl_loss(r.gather(1, demo)[:, 0], r.gather(1, samples), beta)
    same(
        torch.autograd.grad(loss, r)[0],
        minus_gradient(r, log_q.expand(2, 3), demo, beta),
        "the gradient from samples of pi_ref itself",
    )


@pytest.mark.parametrize("P, K, beta, seed", [(1, 1, 1.0, 0), (3, 5, 0.5, 1), (4, 2, 2.0, 2)])
def test_linear_and_logistic(my, P, K, beta, seed):
    """Neither looks at log_ratio."""
    demo, samples = world(P, 1, seed)[0][:, 0].detach(), world(P, K, seed + 9)[0].detach()
    log_ratio = torch.ones(P, K, dtype=torch.float64)
    gaps = [[(d - r) / beta for r in row] for d, row in zip(demo.tolist(), samples.tolist())]
    same(
        my.irl_loss(demo, samples, beta, "linear", log_ratio),
        torch.tensor(-sum(map(sum, gaps)) / P / K, dtype=torch.float64),
        "linear",
    )
    same(
        my.irl_loss(demo, samples, beta, "logistic", log_ratio),
        torch.tensor(
            sum(math.log(1 + math.exp(-x)) for row in gaps for x in row) / P / K,
            dtype=torch.float64,
        ),
        "logistic",
    )


def test_large_rewards(my):
    for estimator, want in (("importance", [[1.0, 0.0]]), ("logistic", [[0.5, 0.0]])):
        r = torch.tensor([[1e4, -1e4]], requires_grad=True)
        same(
            torch.autograd.grad(my.irl_loss(torch.zeros(1), r, 1.0, estimator), r)[0],
            torch.tensor(want),
            f"{estimator}: gradient at rewards of 10^4",
        )
    refuses(my.irl_loss, torch.zeros(1), torch.zeros(1, 2), 1.0, "magic")


@pytest.mark.parametrize("estimator", ("importance", "linear", "logistic"))
@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (1,), (3, 3), ()])
def test_other_shapes(my, estimator, shape):
    refuses(my.irl_loss, torch.zeros(shape), torch.zeros(3, 3), 1.0, estimator)
    if shape not in ((3, 3), (3, 1)):  # these two fit
        refuses(my.irl_loss, torch.zeros(3), torch.zeros(shape), 1.0, estimator)
    refuses(my.irl_loss, torch.zeros(3), torch.zeros(3, 2, 2), 1.0, estimator)


def test_far_below_zero(my):
    """Rewards of -20000: each prompt has its own maximum, and none is 0."""
    r = torch.tensor([[-20000.0, -20001.0], [0.0, -1.0]], dtype=torch.float64)
    want = (math.log(1 + math.exp(-1)) - 20000 + math.log(1 + math.exp(-1))) / 2
    demo = torch.zeros(2, dtype=torch.float64)
    same(my.irl_loss(demo, r).item(), want, "importance at rewards of -20000")
    r = torch.full((1, 2), -1e30, dtype=torch.float64)
    same(my.irl_loss(demo[:1], r).item(), -1e30, "importance at rewards of -1e30")


@pytest.mark.parametrize(
    "estimator, want", [("importance", math.log(3)), ("linear", 0.0), ("logistic", math.log(2))]
)
def test_float32(my, estimator, want):
    got = my.irl_loss(torch.ones(2), torch.ones(2, 3), 1.0, estimator)
    same(got, torch.tensor(want), f"{estimator} in float32, all rewards 1")
