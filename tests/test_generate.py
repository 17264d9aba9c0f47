"""generate and choose of model.py against transformers, one prompt at a time, and against distributions by hand."""

import math

import pytest
import torch

from batch import Batch
from model import choose, generate, token_logps
from test_model import PROMPTS, STARTS, pair  # noqa: F401 (pair is a fixture)


def their_greedy(theirs, prompt, count):
    ids = torch.tensor([prompt])
    return theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def greedy(pair):
    """20 greedy tokens of every prompt by transformers, one prompt at a time."""
    return [their_greedy(pair[1], p, 20) for p in PROMPTS]


def test_greedy_matches_transformers(pair, greedy):
    assert len({tuple(g) for g in greedy}) == len(PROMPTS)
    assert generate(pair[0], PROMPTS, max_new_tokens=20, temperature=0).rows() == greedy
    assert [
        generate(pair[0], [p], max_new_tokens=20, temperature=0).rows()[0] for p in PROMPTS
    ] == greedy
    assert generate(pair[0], PROMPTS[:3], samples=2, max_new_tokens=20, temperature=0).rows() == [
        g for g in greedy[:3] for _ in "ab"
    ]


@pytest.mark.parametrize("start", STARTS)
def test_greedy_of_prompts_with_a_common_start(pair, start):
    prompts = STARTS[start][0]
    assert generate(pair[0], prompts, max_new_tokens=8, temperature=0).rows() == [
        their_greedy(pair[1], p, 8) for p in prompts
    ]


def cut(row, eos):
    """Up to and with the first end-of-text id."""
    return next((row[: i + 1] for i, t in enumerate(row) if t in eos), row)


def lengths(greedy, eos):
    return {len(cut(g, eos)) for g in greedy}


def test_rows_end_at_different_times(pair, greedy):
    """With end-of-text ids that stop rows at many different lengths: finished rows wait, then leave, and the others do not notice.

    A row leaves when an eighth is done, so of these 20 a first one waits for others.
    """
    for count in (1, 2, 4):
        eos = ()
        for _ in range(count):  # the ids after which lengths differ most
            eos += (max(range(61), key=lambda t: len(lengths(greedy, (*eos, t)))),)
        want = [cut(g, eos) for g in greedy]
        assert len(lengths(greedy, eos)) > 2 + (count > 1) and any(len(w) < 20 for w in want)
        got = generate(pair[0], PROMPTS, max_new_tokens=20, temperature=0, eos=eos)
        assert got.rows() == want
        assert got.rows() == [
            generate(pair[0], [p], max_new_tokens=20, temperature=0, eos=eos).rows()[0]
            for p in PROMPTS
        ]
        for w, tokens, mask in zip(want, got.tokens, got.mask):
            assert (
                mask.tolist() == [i < len(w) for i in range(20)] and (tokens[len(w) :] == 0).all()
            )
        assert (got.logps == 0).all()  # greedy choice is no draw: probability 1


@pytest.mark.parametrize("temperature", (1.0, 0.6))
def test_rollout_logps_are_token_logps(pair, temperature):
    """Sampled in groups, rows ending at their own times: scoring the rollout again gives the log-probs it was sampled with."""
    got = generate(
        pair[0],
        PROMPTS[:5],
        samples=3,
        max_new_tokens=12,
        temperature=temperature,
        seed=4,
        eos=(5, 9, 17),
    )
    assert len({len(r) for r in got.rows()}) > 2
    batch = Batch(PROMPTS[:5], [got.rows()[3 * p : 3 * p + 3] for p in range(5)])
    again = token_logps(pair[0], batch, temperature)
    assert (
        torch.equal(batch.mask, got.mask[:, : batch.mask.shape[1]])
        and (got.logps[~got.mask] == 0).all()
    )
    assert (again - got.logps[:, : again.shape[1]]).abs().max() < 1e-4
    same = generate(
        pair[0],
        PROMPTS[:5],
        samples=3,
        max_new_tokens=12,
        temperature=temperature,
        seed=4,
        eos=(5, 9, 17),
    )
    other = generate(
        pair[0],
        PROMPTS[:5],
        samples=3,
        max_new_tokens=12,
        temperature=temperature,
        seed=5,
        eos=(5, 9, 17),
    )
    assert (
        torch.equal(same.tokens, got.tokens)
        and torch.equal(same.logps, got.logps)
        and other.rows() != got.rows()
    )


def test_a_row_says_the_same_in_whatever_company(pair):
    """Its uniform numbers are its own, also after other rows have ended and left."""
    draws = torch.rand(10, 12, generator=torch.Generator().manual_seed(1))
    rows = generate(pair[0], PROMPTS[:5], 2, 12, 1.3, eos=(5, 9, 17, 3), draws=draws).rows()
    assert len({len(r) for r in rows}) > 2
    assert rows == [
        generate(
            pair[0], [PROMPTS[i // 2]], 1, 12, 1.3, eos=(5, 9, 17, 3), draws=draws[i : i + 1]
        ).rows()[0]
        for i in range(10)
    ]


def filtered(logits, temperature, top_k, top_p):
    """The distribution to sample from, by hand for one row: the best top_k, then the smallest set that reaches top_p."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    total, kept, reached = sum(p[i] for i in order), [], 0.0
    for i in order:
        if reached < top_p:
            kept.append(i)
            reached += p[i] / total
    kept_sum = sum(p[i] for i in kept)
    return [p[i] / kept_sum if i in kept else 0.0 for i in range(len(p))]


FILTERS = [
    (1.0, 0, 1.0),
    (0.5, 0, 1.0),
    (1.3, 5, 1.0),
    (1.0, 0, 0.7),
    (0.8, 6, 0.8),
    (1.0, 1, 1.0),
    (1.0, 0, 0.01),
]


@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS)
def test_choose_samples_the_filtered_distribution(temperature, top_k, top_p):
    n, logits = 20000, torch.randn(12, generator=torch.Generator().manual_seed(2)) * 1.5
    want = filtered(logits, temperature, top_k, top_p)
    ids, logps = choose(
        logits.expand(n, -1),
        temperature,
        top_k,
        top_p,
        torch.rand(n, generator=torch.Generator().manual_seed(3)),
    )
    counts = torch.bincount(ids, minlength=12).tolist()
    for p, c in zip(want, counts):
        assert abs(c - n * p) <= 5 * math.sqrt(
            n * p * (1 - p)
        )  # five standard deviations; 0 for what was filtered out
    assert torch.allclose(
        logps.double(), torch.tensor(want, dtype=torch.double)[ids].log(), atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_k, top_p", FILTERS[2:5])
def test_rollout_logps_with_filters(pair, temperature, top_k, top_p):
    got = generate(
        pair[0],
        PROMPTS[:3],
        samples=2,
        max_new_tokens=6,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    for i, row in enumerate(got.rows()):
        prompt = PROMPTS[i // 2]
        logits = pair[1](torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
        want = [math.log(filtered(z, temperature, top_k, top_p)[t]) for z, t in zip(logits, row)]
        assert got.logps[i, : len(row)].tolist() == pytest.approx(want, abs=1e-4)
