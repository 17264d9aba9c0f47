"""What corpus/README.md promises, row by row. Similarities are the default text encoder's."""

import json
from collections import Counter
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

import data
from config import CORPUS
from data import CATEGORIES, HELPFUL, normalise
from encoder import load_encoder, split_sentences
from support.judge import judge
from support.loaders import load_rows
from support.weights import fetch

TRAIN, OPEN = ("pool", "benign"), ("open",)
HELD = ("dev", "test", "disguised")
LIMIT = 0.75  # largest cosine of two prompts in different splits


@pytest.fixture(scope="module")
def corpus():
    rows = {name: load_rows(CORPUS / f"{name}.jsonl", drafted=True) for name in TRAIN}
    return rows | {name: load_rows(CORPUS / f"{name}.jsonl") for name in OPEN + HELD}


def words(text):
    return normalise(text).split()


def test_counts(corpus):
    pool = data.counts(corpus["pool"])
    assert len(corpus["pool"]) == sum(pool.values()) >= 1200
    assert min(pool.values()) >= 72 and max(pool.values()) >= 8 * min(pool.values())
    ordinary, lookalike = (HELPFUL, "ordinary"), (HELPFUL, "lookalike")
    benign = Counter((r["category"], r["kind"]) for r in corpus["benign"])
    assert set(benign) == {ordinary, lookalike} and min(benign.values()) >= 300
    open_kinds = Counter(r["kind"] for r in corpus["open"])
    assert open_kinds["lookalike"] >= 2 * open_kinds["ordinary"] and len(corpus["open"]) >= 900
    for name, least in (
        ("dev", (65, 200, 322)),
        ("test", (65, 200, 322)),
    ):
        found = Counter((r["category"], r["kind"]) for r in corpus[name])
        assert set(found) == {*((c, "harmful") for c in CATEGORIES), ordinary, lookalike}
        harmful = min(n for (_, kind), n in found.items() if kind == "harmful")
        assert (harmful, found[ordinary], found[lookalike]) == least


def test_many_prompts_are_short(corpus):
    """Of those added last at least two fifths have ten words or fewer, harmful or not."""
    for name in ("open",):
        for kind in {r["kind"] for r in corpus[name]}:
            sizes = [len(r["prompt"].split()) for r in corpus[name] if r["kind"] == kind]
            assert sum(n <= 10 for n in sizes) >= 0.4 * len(sizes), (name, kind)


def test_disguised(corpus):
    hidden = Counter((r["kind"], r["disguise"]) for r in corpus["disguised"])
    assert hidden == {("harmful", d): 30 for d in ("role play", "prefix", "story", "typos")}
    assert set(Counter(r["category"] for r in corpus["disguised"]).values()) <= {17, 18}


def test_drafts_and_answers_are_short(corpus):
    for row in corpus["pool"] + corpus["benign"]:
        assert 2 <= len(row["draft"]) <= 4, row["prompt"]
        assert all(len(step.split()) <= 5 for step in row["draft"]), row["prompt"]
        assert len(row["answer"].split()) <= 45, row["answer"]


def test_thoughts(corpus):
    """Three demonstrations of each category have a Chain of Thought beside their draft."""
    told = [r for r in corpus["pool"] if "thought" in r]
    assert Counter(r["category"] for r in told) == {c: 3 for c in CATEGORIES}
    for row in told:
        data.format_draft(row["thought"], row["answer"])  # raises if it is no list of steps
        thought, draft = (len(" ".join(row[k]).split()) for k in ("thought", "draft"))
        assert thought > 2 * draft


def test_no_prompt_twice(corpus):
    texts = Counter(normalise(r["prompt"]) for rows in corpus.values() for r in rows)
    assert [t for t, n in texts.items() if n > 1] == []


@pytest.mark.parametrize("name", TRAIN)
def test_answers_open_in_many_ways(corpus, name):
    openings = {}
    for r in corpus[name]:
        opening = tuple(words(r["answer"])[:4])
        openings.setdefault(r["category"], Counter())[opening] += 1
    for category, found in openings.items():
        opening, n = found.most_common(1)[0]
        assert n <= 0.05 * found.total(), (category, opening)


@pytest.mark.parametrize("name, verdict", [("pool", "refuses"), ("benign", "complies")])
def test_answers_are_judged_as_meant(corpus, name, verdict):
    wrong = [r["response"] for r in corpus[name] if judge(r["response"]) != verdict]
    assert len(wrong) <= 0.01 * len(corpus[name]), wrong[:5]


def test_prompts_are_not_templates(corpus):
    """No two prompts share more than half of the shorter one's four-word windows.

    Those of under 7 words have too few.
    """
    prompts = [r["prompt"] for rows in corpus.values() for r in rows]
    windows, where = [], {}
    for i, w in enumerate(map(words, prompts)):
        windows.append(set(zip(w, w[1:], w[2:], w[3:])) if len(w) >= 7 else set())
        for window in windows[-1]:
            where.setdefault(window, []).append(i)
    shared = Counter(pair for found in where.values() for pair in combinations(found, 2))
    for (i, j), n in shared.items():
        assert n <= min(len(windows[i]), len(windows[j])) / 2, (prompts[i], prompts[j])


def shape(text):
    """What can be seen of a prompt without reading it."""
    w = words(text)
    seen = [len(w), len(text), text.endswith("?"), text[0].islower(), len(split_sentences(text))]
    return [*seen, not {"i", "my", "me", "our", "us"}.isdisjoint(w)]


def fit_shape(harmful, harmless):
    """Class-balanced logistic regression on shapes: a function, which of some texts are harmful."""
    x = torch.tensor([shape(t) for t in harmful + harmless], dtype=torch.double)
    y = torch.tensor([1.0] * len(harmful) + [0.0] * len(harmless), dtype=torch.double)
    mean, std = x.mean(0), x.std(0)
    w = torch.zeros(x.shape[1], dtype=torch.double, requires_grad=True)
    b = torch.zeros((), dtype=torch.double, requires_grad=True)
    weight = torch.where(y == 1, 0.5 / len(harmful), 0.5 / len(harmless))
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def logits(x):
        return (x - mean) / std @ w + b

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits(x), y, weight, reduction="sum")
        loss = loss + 1e-3 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda texts: logits(torch.tensor([shape(t) for t in texts], dtype=torch.double)) > 0


@pytest.mark.parametrize(
    "seen, name",
    [(TRAIN + OPEN, "dev"), (TRAIN + OPEN, "test"), (("test",), "dev"), (("dev",), "test")],
)
def test_shape_does_not_tell(corpus, seen, name):
    """Harmful prompts or look-alikes? Who learns other files' shapes alone is near chance, 0.5."""

    def prompts(names):
        rows = [r for n in names for r in corpus[n]]
        harmful = [r["prompt"] for r in rows if r["category"] in CATEGORIES]
        return harmful, [r["prompt"] for r in rows if r.get("kind") == "lookalike"]

    flagged = fit_shape(*prompts(seen))
    hits, false_alarms = (flagged(texts).double().mean() for texts in prompts([name]))
    assert 0.35 < (hits + 1 - false_alarms) / 2 < 0.65


@pytest.mark.parametrize("name", ("dev", "test"))
def test_no_setting_is_everywhere(corpus, name):
    """A word of under 1 in 100 pool prompts, such as a place, is in at most 4 of 140 harmful."""

    def prompts_with(rows):
        harmful = [set(words(r["prompt"])) for r in rows if r["category"] in CATEGORIES]
        return Counter(w for found in harmful for w in found), len(harmful)

    (pool, _), rare = prompts_with(corpus["pool"]), len(corpus["pool"]) / 100
    held, size = prompts_with(corpus[name])
    assert {w: n for w, n in held.items() if n > 4 * size / 140 and pool[w] < rare} == {}


def test_splits_are_apart(corpus):
    phi = load_encoder(fetch("all-MiniLM-L6-v2"))
    vectors = {name: phi.embed([r["prompt"] for r in rows]) for name, rows in corpus.items()}
    for a, b in [(a, b) for a in TRAIN + OPEN for b in HELD] + list(combinations(HELD, 2)):
        similar = vectors[a] @ vectors[b].T
        i, j = divmod(int(similar.argmax()), similar.shape[1])
        pair = corpus[a][i]["prompt"], corpus[b][j]["prompt"]
        assert similar.max() < LIMIT, (a, b, similar.max(), pair)


def test_blind_readers_agree(corpus):
    """corpus/README.md: each disagrees with one label of all."""
    held = corpus["dev"] + corpus["test"]
    labels = {r["prompt"]: r["category"] for r in held}
    rows = [json.loads(line) for line in (CORPUS / "readers.jsonl").read_text().splitlines()]
    harmful = {prompt for prompt, category in labels.items() if category != HELPFUL}
    assert harmful <= {r["prompt"] for r in rows} <= labels.keys()
    for reader in ("reader1", "reader2"):
        given = [(r[reader].replace("answer", HELPFUL), labels[r["prompt"]]) for r in rows]
        assert sum(a != b for a, b in given) == 1
