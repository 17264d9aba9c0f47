"""data.py: drafts, balancing, routing, duplicates."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from config import UserError
from data import (
    CATEGORIES,
    HELPFUL,
    balance,
    distinct,
    format_draft,
    k_center,
    normalise,
    parse_draft,
    route,
)
from evaluate import balance_report

# ---------------------------------------------------------------------------- drafts

STEPS = (
    ["a"],
    ["two words", "b"],
    ["  indented", "trailing  ", "tab\there"],
    ["#one", "##", "###"],
    ["é ü 中文", "“quotes”", "-"],
)
ANSWERS = ("x", "Yes.", " two spaces before", "ends in space ", "line\nbreak")
ANSWERS += ("line\n\nbreak\n", "# ## ###", "中文 ’")
MALFORMED = ("", "no separator", "a\nb", "####", "a\n#### b\n#### c", "a\n####b", "a\n####")
MALFORMED += ("a\n#### ", "a\n####  \n", "#### b", "\n#### b", " \n#### b", "a\n\n#### b")
MALFORMED += ("a\n\nb\n#### c", "a #### b", "a\n  #### b", "a\n######## b", "a\n##### b")
MALFORMED += ("a\n####\nb",)
NO_DRAFTS = (
    ([], "b"),
    ([""], "b"),
    (["a", " "], "b"),
    (["a\nb"], "c"),
    (["a ####"], "b"),
    (["a"], ""),
    (["a"], " "),
    (["a"], "b #### c"),
    (["a#"], "#### b"),
    ("ab", "c"),
)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_draft_round_trip(steps, answer):
    text = format_draft(steps, answer)
    assert text == "\n".join(steps) + "\n#### " + answer
    assert parse_draft(text) == (steps, answer)


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_drafts_raise(text):
    with pytest.raises(ValueError, match="want"):
        parse_draft(text)


@pytest.mark.parametrize("steps, answer", NO_DRAFTS)
def test_format_refuses_what_it_could_not_parse(steps, answer):
    with pytest.raises(ValueError):
        format_draft(steps, answer)


# ---------------------------------------------------------------------------- k-center


def units(n, width, seed):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=draw, dtype=torch.float64), dim=1)


def greedy(points, k, first):
    """In plain Python: the largest distance to the nearest chosen point, lowest index first."""
    chosen = [first]
    while len(chosen) < k:
        distance = {}
        for i in set(range(len(points))) - set(chosen):
            products = (sum(a * b for a, b in zip(points[i], points[j])) for j in chosen)
            distance[i] = 1 - max(products)
        chosen.append(max(distance, key=lambda i: (distance[i], -i)))
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_k_center_is_the_greedy_furthest_point(seed):
    x = units(9, 4, seed)
    chosen = k_center(x, 6, seed)
    assert chosen == greedy(x.tolist(), 6, chosen[0]) == k_center(x, 6, seed)
    assert sorted(k_center(x, 9, seed)) == list(range(9))


def test_k_center_seed_picks_the_first_point():
    x = torch.eye(10)
    assert len({k_center(x, 1, seed)[0] for seed in range(30)}) > 4


@pytest.mark.parametrize("seed", range(4))
def test_k_center_never_picks_twice(seed):
    """All but one of the points coincide."""
    x = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]])
    assert sorted(k_center(x, 7, seed)) == list(range(7))
    assert 6 in k_center(x, 2, seed)


@pytest.mark.parametrize("given", [None, torch.eye(2)[:1]])
def test_k_center_of_too_many_or_none(given):
    x = torch.eye(2)
    for k in (-1, 3):
        with pytest.raises(ValueError, match=f"k {k}: want 0 to 2"):
            k_center(x, k, given=given)
    assert k_center(x, 0, given=given) == k_center(x[:0], 0, given=given) == []
    assert sorted(k_center(x, 2, given=given)) == [0, 1]


@pytest.mark.parametrize("seed", range(6))
def test_k_center_radius_is_within_twice_the_best_as_chord_and_as_angle(seed):
    """Against every choice of 3 centres out of 9 points.

    1 - cosine, the chord's square over 2, can be 4 times the best and is not promised.
    """
    x = units(9, 3, seed)
    cos = (x @ x.T).clamp(-1, 1)
    for distance in ((2 - 2 * cos).sqrt(), cos.arccos()):
        radius = lambda centres: distance[:, list(centres)].amin(1).max()
        best = min(map(radius, itertools.combinations(range(9), 3)))
        assert all(radius(k_center(x, 3, start)) <= 2 * best for start in range(9))


def test_k_center_goes_on_from_given_points():
    """On the unit circle: of 10, 80 and 170 degrees the furthest from 0 is 170.

    Then it is 80, which is 80 away from both, then 10.
    """
    angles = lambda *degrees: torch.tensor(degrees).double().deg2rad()
    at = lambda *degrees: torch.stack((angles(*degrees).cos(), angles(*degrees).sin()), 1)
    x = at(10, 80, 170)
    assert k_center(x, 3, given=at(0)) == [2, 1, 0] and k_center(x, 0, given=at(0)) == []
    assert k_center(x, 1, given=at(0, 180)) == [1]  # far from the closest of them
    assert k_center(x, 2, 0, given=at(0)[:0]) == k_center(x, 2, 0)


# ---------------------------------------------------------------------------- categories


def rows_of(**numbers):
    """The categories' rows in turn, as long as there are any."""
    turns = itertools.product(range(max(numbers.values())), numbers)
    return [{"category": c, "prompt": f"{c} {i}"} for i, c in turns if i < numbers[c]]


def test_balance_is_exact_and_in_category_order():
    rows = rows_of(**{c: 4 + i for i, c in enumerate(reversed(CATEGORIES))}, **{HELPFUL: 9})
    x = units(len(rows), 5, 0)
    out = balance(rows, 4, x, seed=3)
    assert [r["category"] for r in out] == [c for c in CATEGORIES for _ in range(4)]
    assert len({r["prompt"] for r in out}) == 28
    assert out == balance(rows, 4, x, seed=3)
    for category in CATEGORIES:
        mine = [i for i, r in enumerate(rows) if r["category"] == category]
        want = {rows[mine[i]]["prompt"] for i in k_center(x[mine], 4, 3)}
        assert {r["prompt"] for r in out if r["category"] == category} == want


def test_balance_says_what_is_missing():
    rows = rows_of(**{c: 5 for c in CATEGORIES if c not in ("privacy", "crime")}, crime=3)
    wanted = r"for crime \(2 missing\), privacy \(5 missing\): .*--generate true"
    with pytest.raises(UserError, match=wanted) as e:
        balance(rows, 5, torch.ones(len(rows), 1))
    assert "insult" not in str(e.value)


def test_balance_report():
    """Shares 1/2, 1/4, 1/4 have entropy 1.5 ln 2."""
    even = {c: 3 for c in CATEGORIES}
    report = balance_report(rows_of(**even))
    assert report == {"counts": even, "imbalance": 1, "entropy": pytest.approx(1)}
    report = balance_report(rows_of(insult=4, crime=2, ethics=2, **{HELPFUL: 9}))
    assert report["entropy"] == pytest.approx(1.5 * math.log(2) / math.log(7))
    assert report["imbalance"] == math.inf
    assert balance_report(rows_of(**{**even, "insult": 7, "crime": 2}))["imbalance"] == 3.5
    assert balance_report([])["entropy"] == 0


def test_route():
    """Two points around each category's axis: the centroid is the axis, the closest one counts."""
    x = torch.eye(7).repeat_interleave(2, 0)
    x[0::2, 0] += 0.2
    x[1::2, 0] -= 0.2
    x[0], x[1] = torch.eye(7)[0], 3 * torch.eye(7)[0]
    names = [c for c in CATEGORIES for _ in range(2)]
    prompts = torch.tensor([[0, 0, 0.5, 0.4, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0.1]])
    assert route(prompts, x, names) == ["crime", "ethics"]
    assert route(torch.tensor([[0.4, 0.5, 0, 0, 0, 0, 0]]), x, names) == ["unfairness"]
    assert route(torch.eye(7), x, names) == [*CATEGORIES]


def test_normalise():
    assert normalise("  What's  THE\nprice — 5€?") == "what s the price 5"


def test_distinct():
    """Of rows with one prompt, but for case and punctuation, one stays.

    One with a draft goes first, then one with a category.
    """
    bare = {"prompt": "Do it!", "category": None}
    known = {"prompt": "do  it", "category": "crime"}
    drafted = {"prompt": "Do it.", "category": None, "draft": ["x"]}
    best = {"prompt": "do it", "category": "crime", "draft": ["y"]}
    other = {"prompt": "Do that", "category": "crime"}
    assert distinct([bare, known, drafted, best, other]) == [best, other]
    assert distinct([bare, drafted, other]) == [drafted, other]
    assert distinct([bare, known]) == [known]
    assert len(distinct([{**bare, "prompt": p} for p in ("?", "!", "一", "二")])) == 4
