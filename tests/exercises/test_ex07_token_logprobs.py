"""Exercise 7, against Python's math, and its gradients against the formula."""

import math

import pytest
import torch

from exercises.grading import same

MIRRORS, SECTION = ("kernels.token_logprobs",), "Log-probs"
BORROWED = ("kernels.TokenLogProbs", "kernels.reference.rows", "sample.completion_logps")
BORROWED += ("sample.token_logps",)


def problem(N, D, V, seed, size=1.0):
    g = torch.Generator().manual_seed(seed)
    h, W = (size * torch.randn(n, D, generator=g, dtype=torch.float64) for n in (N, V))
    return (
        h.requires_grad_(),
        W.requires_grad_(),
        torch.randint(V, (N,), generator=g),
        torch.randn(N, generator=g, dtype=torch.float64),
    )


def by_hand(h, W, temperature):
    """Log-probs of all tokens, (N, V), number by number."""
    out = []
    for state in h.tolist():
        z = [sum(a * b for a, b in zip(state, w)) / temperature for w in W.tolist()]
        lse = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
        out.append([x - lse for x in z])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(
    "N, D, V, temperature, seed",
    [(5, 3, 7, 0.5, 1), (1, 2, 3, 1.0, 0), (6, 6, 6, 1.7, 2), (9, 4, 2, 1.0, 3)],
)
def test_values_and_gradients(my, N, D, V, temperature, seed):
    h, W, targets, weights = problem(N, D, V, seed)
    logps = by_hand(h, W, temperature)
    got = my.token_logprobs(h, W, targets, temperature)
    same(got, torch.stack([logps[n, targets[n]] for n in range(N)]), "log-probs")
    dh, dW = torch.autograd.grad(got, (h, W), weights)
    slope = (
        (torch.eye(V, dtype=torch.float64)[targets] - logps.exp()) * weights[:, None] / temperature
    )  # of the logits, (N, V)
    same(dh, slope @ W.detach(), "gradient of h")
    same(dW, slope.T @ h.detach(), "gradient of W")


@pytest.mark.parametrize("size", (30.0, 100.0))
def test_large_logits(my, size):
    h, W, targets, _ = problem(8, 3, 5, 4, size)
    want = by_hand(h, W, 1.0)
    same(
        my.token_logprobs(h, W, targets),
        torch.stack([want[n, targets[n]] for n in range(8)]),
        "log-probs of logits in the thousands",
        1e-8,
    )


def test_far_below_zero(my):
    """All logits around -20000, and one row whose tokens are 20000 apart."""
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    W = torch.tensor([[-20000.0, 0.0], [-20001.0, -20000.0]], dtype=torch.float64)
    want = torch.tensor([-math.log(1 + math.exp(-1)), -20000.0], dtype=torch.float64)
    same(my.token_logprobs(h, W, torch.tensor([0, 1])), want, "log-probs of logits near -20000")
    got = my.token_logprobs(h[:1], torch.full_like(W, -1e30), torch.tensor([1]))
    want = torch.tensor([-math.log(2)], dtype=torch.float64)
    same(got, want, "log-probs of two logits of -1e30")


def test_float32(my):
    h, W, targets, _ = problem(8, 3, 5, 5)
    want = by_hand(h.float(), W.float(), 1.0)
    same(
        my.token_logprobs(h.float(), W.float(), targets),
        torch.stack([want[n, targets[n]] for n in range(8)]).float(),
        "log-probs in float32",
        1e-5,
    )
