"""Exercise 4: the CDF added up number by number, and the nucleus among all sets of tokens."""

import itertools
import math

import pytest
import torch

from exercises.grading import same

MIRRORS, SECTION = ("sample.choose", "teach.exercises.answers.top_p"), "The transformer"


def softmax(row, temperature=1.0):
    x = [v / temperature for v in row]
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def inverse(row, temperature, draw):
    """The first token at which the sum of the probabilities passes the draw."""
    total = 0.0
    for v, p in enumerate(softmax(row, temperature)):
        total += p
        if total > draw:
            return v


def nucleus(row, p):
    """Brute force: sets of one token, of two, ...; the likeliest set of the first size that do."""
    probs = softmax(row)
    for size in range(1, len(row) + 1):
        best = max(
            itertools.combinations(range(len(row)), size),
            key=lambda s: sum(map(probs.__getitem__, s)),
        )
        if sum(probs[v] for v in best) >= p or size == len(row):
            return [x if v in best else -math.inf for v, x in enumerate(row)]


@pytest.mark.parametrize(
    "B, V, temperature, seed", [(1, 3, 1.0, 0), (5, 5, 0.5, 1), (9, 7, 1.8, 2)]
)
def test_choose(my, B, V, temperature, seed):
    g = torch.Generator().manual_seed(seed)
    logits, draws = 2 * torch.randn(B, V, generator=g), torch.rand(B, generator=g)
    want = [inverse(row, temperature, u) for row, u in zip(logits.tolist(), draws.tolist())]
    got = my.choose(logits, temperature, draws)
    same(got, torch.tensor(want), f"temperature {temperature}, draws {draws.tolist()}")


def test_float64(my):
    """A draw just below a half belongs to the first of two equal tokens. In float32 it is 1/2."""
    draws = torch.tensor([0.5 - 1e-12, 0.5 + 1e-12], dtype=torch.float64)
    got = my.choose(torch.zeros(2, 2, dtype=torch.float64), 1.0, draws)
    same(got, torch.tensor([0, 1]), "draws of 1e-12 below and above a half, two equal tokens")


def test_shares(my):
    """A hundred draws side by side: each token as often as its probability says, in its place."""
    logits = torch.tensor([0.25, 0.5, 0.2, 0.05]).log().expand(100, 4)
    draws = (torch.arange(100) + 0.5) / 100
    got = my.choose(logits, 1.0, draws)
    same(got, torch.tensor([0] * 25 + [1] * 50 + [2] * 20 + [3] * 5), "tokens of 100 draws")


def test_hard_rows(my):
    """Impossible tokens first and last; logits of 30000 and of -30000; the ends of [0, 1)."""
    inf, last = math.inf, 1 - 2.0**-24
    rows = [[-inf, -inf, 1.0, 0.0, -inf]] * 2
    rows += [[30000.0, 30001.0, 0.0, 0.0, 0.0], [-30000.0, -30001.0, -60000.0, -inf, -inf]]
    draws = torch.tensor([0.0, last, 0.5, 0.9])
    got = my.choose(torch.tensor(rows), 1.0, draws)
    same(got, torch.tensor([2, 3, 1, 1]), f"rows {rows}, draws {draws.tolist()}")


@pytest.mark.parametrize("draw", (0.0, 0.99, math.nan))
def test_temperature_zero(my, draw):
    logits = torch.tensor([[0.1, 0.3, -1.0], [5.0, 4.0, 4.9], [-9.0, -8.0, -7.0]])
    want = torch.tensor([1, 0, 2])
    same(
        my.choose(logits, 0, torch.full((3,), draw)), want, f"the best token, whatever draw {draw}"
    )


@pytest.mark.parametrize("p", (0.01, 0.3, 0.6, 0.9, 0.99, 1.0))
@pytest.mark.parametrize("B, V, seed", [(1, 2, 0), (4, 6, 1), (6, 6, 2)])
def test_top_p(my, B, V, seed, p):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, V, generator=generator, dtype=torch.float64)
    want = torch.tensor([nucleus(row, p) for row in logits.tolist()], dtype=torch.float64)
    same(my.top_p(logits, p), want, f"logits {logits.tolist()}, p {p}")


def test_the_whole_share(my):
    """p 1 cuts nothing off, though in float32 the sums of a thousand reach 1 before the end."""
    logits = 4 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    same(my.top_p(logits, 1.0), logits, "p 1 of 4 rows of 1000 float32 logits")


def test_top_p_by_hand(my):
    """0.5, 0.3, 0.15, 0.05 in two orders: 0.7 needs 0.5 and 0.3. Sure rows need one token."""
    inf, log = math.inf, [math.log(x) for x in (0.5, 0.3, 0.15, 0.05)]
    rows = [log, [log[3], log[1], log[2], log[0]], [-20000.0, 0.0, -1e4, -inf]]
    rows = torch.tensor([*rows, [30000.0, 29990.0, 0.0, -inf], [-20010.0, -20020.0, -2e4, -3e4]])
    want = rows.clone()
    want[0, [2, 3]] = want[1, [0, 2]] = want[2, [0, 2]] = -inf
    want[3, [1, 2]] = want[4, [0, 1, 3]] = -inf
    same(my.top_p(rows, 0.7), want, f"p 0.7 of {rows.tolist()}")


def test_both(my):
    """The temperature first: at 0.5 the shares 0.5, 0.3, 0.2 are 0.66, 0.24, 0.11."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(50, 3)
    draws = (torch.arange(50) + 0.5) / 50
    got = my.choose(my.top_p(logits / 0.5, 0.65), 1.0, draws)
    same(got, torch.zeros(50, dtype=torch.long), "50 draws, temperature 0.5, p 0.65")
