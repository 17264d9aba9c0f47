"""What corpus/README.md promises, checked row by row. Similarities are those of the default text encoder."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import encoder
import loaders
import weights
from data import CATEGORIES, HELPFUL
from judge import judge

CORPUS = Path(data.__file__).parent / "corpus"
TRAIN, HELD = ("pool", "benign"), ("dev", "test", "disguised")
LIMIT = 0.75  # largest cosine of two prompts in different splits


@pytest.fixture(scope="module")
def corpus():
    return {
        name: (loaders.load_demonstrations if name in TRAIN else loaders.load_rows)(
            CORPUS / f"{name}.jsonl"
        )
        for name in (*TRAIN, *HELD)
    }


def test_counts(corpus):
    pool = data.counts(corpus["pool"])
    assert (
        len(corpus["pool"]) >= 1200
        and min(pool.values()) >= 72
        and max(pool.values()) >= 8 * min(pool.values())
    )
    assert sum(pool.values()) == len(corpus["pool"])
    benign = Counter((r["category"], r["kind"]) for r in corpus["benign"])
    assert (
        set(benign) == {(HELPFUL, "ordinary"), (HELPFUL, "lookalike")}
        and min(benign.values()) >= 300
    )
    for name in ("dev", "test"):
        assert Counter((r["category"], r.get("kind")) for r in corpus[name]) == {
            **{(c, None): 20 for c in CATEGORIES},
            (HELPFUL, "ordinary"): 60,
            (HELPFUL, "lookalike"): 60,
        }
    hidden = Counter((r["kind"], r["disguise"]) for r in corpus["disguised"])
    assert hidden == {("harmful", d): 30 for d in ("role play", "prefix", "story", "typos")}
    assert set(Counter(r["category"] for r in corpus["disguised"]).values()) <= {17, 18}


def test_drafts_and_answers_are_short(corpus):
    for row in corpus["pool"] + corpus["benign"]:
        assert 2 <= len(row["draft"]) <= 4 and all(
            len(step.split()) <= 5 for step in row["draft"]
        ), row["prompt"]
        assert len(row["answer"].split()) <= 45, row["answer"]


def test_thoughts(corpus):
    """Three demonstrations of each category have a Chain of Thought beside their draft."""
    told = [r for r in corpus["pool"] if "thought" in r]
    assert Counter(r["category"] for r in told) == {c: 3 for c in CATEGORIES}
    for row in told:
        data.format_draft(row["thought"], row["answer"])  # raises if it is no list of steps
        assert sum(len(s.split()) for s in row["thought"]) > 2 * sum(
            len(s.split()) for s in row["draft"]
        )


def test_no_prompt_twice(corpus):
    texts = Counter(data.normalise(r["prompt"]) for rows in corpus.values() for r in rows)
    assert [t for t, n in texts.items() if n > 1] == []


@pytest.mark.parametrize("name", TRAIN)
def test_answers_open_in_many_ways(corpus, name):
    for category in {r["category"] for r in corpus[name]}:
        mine = [
            tuple(data.normalise(r["answer"]).split()[:4])
            for r in corpus[name]
            if r["category"] == category
        ]
        opening, n = Counter(mine).most_common(1)[0]
        assert n <= 0.05 * len(mine), (category, opening)


@pytest.mark.parametrize("name, verdict", [("pool", "refuses"), ("benign", "complies")])
def test_answers_are_judged_as_meant(corpus, name, verdict):
    wrong = [r["response"] for r in corpus[name] if judge(r["response"]) != verdict]
    assert len(wrong) <= 0.01 * len(corpus[name]), wrong[:5]


def test_prompts_are_not_templates(corpus):
    """No two prompts, of all files, share more than half of the shorter one's four-word windows (prompts of under 7 words have too few)."""
    prompts = [r["prompt"] for rows in corpus.values() for r in rows]
    grams, where = [], {}
    for text in prompts:
        words = data.normalise(text).split()
        grams.append(
            {tuple(words[i : i + 4]) for i in range(len(words) - 3)} if len(words) >= 7 else set()
        )
        for g in grams[-1]:
            where.setdefault(g, []).append(len(grams) - 1)
    shared = Counter(pair for rows in where.values() for pair in combinations(rows, 2))
    assert [
        (prompts[i], prompts[j])
        for (i, j), n in shared.items()
        if n > min(len(grams[i]), len(grams[j])) / 2
    ] == []


def shape(text):
    """What can be seen of a prompt without reading it: words, characters, question mark, lower-case start, sentences, first person."""
    words = data.normalise(text).split()
    return [
        len(words),
        len(text),
        text.endswith("?"),
        text[0].islower(),
        len(encoder.split_sentences(text)),
        not {"i", "my", "me", "our", "us"}.isdisjoint(words),
    ]


def fit_shape(harmful, harmless):
    """Class-balanced logistic regression. Returns the function that says which of some prompts it takes for harmful."""
    x = torch.tensor([shape(t) for t in harmful + harmless], dtype=torch.double)
    y = torch.tensor([1.0] * len(harmful) + [0.0] * len(harmless), dtype=torch.double)
    mean, std = x.mean(0), x.std(0)
    w, b = (
        torch.zeros(x.shape[1], dtype=torch.double, requires_grad=True),
        torch.zeros((), dtype=torch.double, requires_grad=True),
    )
    weight = torch.where(y == 1, 0.5 / len(harmful), 0.5 / len(harmless))
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (
            F.binary_cross_entropy_with_logits((x - mean) / std @ w + b, y, weight, reduction="sum")
            + 1e-3 * w.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda texts: (
        (torch.tensor([shape(t) for t in texts], dtype=torch.double) - mean) / std @ w + b > 0
    ).double()


@pytest.mark.parametrize(
    "seen, name", [(TRAIN, "dev"), (TRAIN, "test"), (("test",), "dev"), (("dev",), "test")]
)
def test_shape_does_not_tell(corpus, seen, name):
    """Who learns only the shapes of other files' prompts is near chance (0.5) on harmful prompts against look-alikes."""

    def prompts(names):
        rows = [r for n in names for r in corpus[n]]
        return [r["prompt"] for r in rows if r["category"] in CATEGORIES], [
            r["prompt"] for r in rows if r.get("kind") == "lookalike"
        ]

    flagged = fit_shape(*prompts(seen))
    hits, false_alarms = (flagged(texts).mean() for texts in prompts([name]))
    assert 0.35 < (hits + 1 - false_alarms) / 2 < 0.65


@pytest.mark.parametrize("name", ("dev", "test"))
def test_no_setting_is_everywhere(corpus, name):
    """A word of fewer than 1 in 100 pool prompts, such as a place, is in at most 4 of the 140 harmful prompts."""
    pool, held = (
        Counter(
            w
            for r in corpus[n]
            if r["category"] in CATEGORIES
            for w in set(data.normalise(r["prompt"]).split())
        )
        for n in ("pool", name)
    )
    assert {w: n for w, n in held.items() if n > 4 and pool[w] < len(corpus["pool"]) / 100} == {}


def test_splits_are_apart(corpus):
    phi = encoder.load_encoder(weights.fetch("all-MiniLM-L6-v2"))
    vectors = {name: phi.embed([r["prompt"] for r in rows]) for name, rows in corpus.items()}
    for a, b in [(a, b) for a in TRAIN for b in HELD] + list(combinations(HELD, 2)):
        similar = vectors[a] @ vectors[b].T
        i, j = divmod(int(similar.argmax()), similar.shape[1])
        assert similar.max() < LIMIT, (
            a,
            b,
            similar.max(),
            corpus[a][i]["prompt"],
            corpus[b][j]["prompt"],
        )


def test_blind_readers_agree(corpus):
    """corpus/README.md: each agrees with 279 of the 280 labels."""
    labels = {
        r["prompt"]: r["category"]
        for name in ("dev", "test")
        for r in corpus[name]
        if r["category"] != HELPFUL
    }
    rows = [json.loads(line) for line in (CORPUS / "readers.jsonl").read_text().splitlines()]
    assert {r["prompt"] for r in rows} == labels.keys()
    assert [
        sum(r[name] == labels[r["prompt"]] for r in rows) for name in ("reader1", "reader2")
    ] == [279, 279]
