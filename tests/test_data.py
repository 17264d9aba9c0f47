"""data.py: drafts, padding and masks, balancing and routing."""

import itertools
import math

import pytest
import torch

import data
from data import (
    CATEGORIES,
    HELPFUL,
    UserError,
    balance,
    balance_report,
    centroids,
    completion_mask,
    format_draft,
    imbalance,
    k_center,
    pad,
    parse_draft,
    route,
)


# ------------------------------------------------------------------------------------------------ drafts


@pytest.mark.parametrize(
    "steps",
    [
        ["a"],
        ["two words", "b"],
        ["  indented", "trailing  ", "tab\there"],
        ["#one", "##", "###"],
        ["é ü 中文", "“quotes”", "-"],
    ],
)
@pytest.mark.parametrize(
    "answer",
    [
        "x",
        "Yes.",
        " two spaces before",
        "ends in space ",
        "line\nbreak",
        "line\n\nbreak\n",
        "# ## ###",
        "中文 ’",
    ],
)
def test_draft_round_trip(steps, answer):
    text = format_draft(steps, answer)
    assert text == "\n".join(steps) + "\n#### " + answer
    assert parse_draft(text) == (steps, answer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no separator",
        "a\nb",
        "####",
        "a\n#### b\n#### c",
        "a\n####b",
        "a\n####",
        "a\n#### ",
        "a\n####  \n",
        "#### b",
        "\n#### b",
        " \n#### b",
        "a\n\n#### b",
        "a\n\nb\n#### c",
        "a #### b",
        "a\n  #### b",
        "a\n######## b",
        "a\n##### b",
        "a\n####\nb",
    ],
)
def test_malformed_drafts_raise(text):
    with pytest.raises(ValueError):
        parse_draft(text)


@pytest.mark.parametrize(
    "steps, answer",
    [
        ([], "b"),
        ([""], "b"),
        (["a", " "], "b"),
        (["a\nb"], "c"),
        (["a ####"], "b"),
        (["a"], ""),
        (["a"], " "),
        (["a"], "b #### c"),
        (["a#"], "#### b"),
    ],
)
def test_format_refuses_what_it_could_not_parse(steps, answer):
    with pytest.raises(ValueError):
        format_draft(steps, answer)


def test_answer_of():
    assert data.answer_of("a\nb\n#### the answer ") == "the answer"
    assert data.answer_of("a\n#### b\n#### c") == "c"
    assert data.answer_of(" no draft ") == "no draft"
    assert data.answer_of("a\n####") == ""


# ------------------------------------------------------------------------------------------------ tokens


def test_pad():
    ids, lengths = pad([[5, 6, 7], [8], []])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]] and lengths.tolist() == [3, 1, 0]
    assert ids.dtype == lengths.dtype == torch.long
    assert pad([[]])[0].shape == (1, 1)
    assert pad([])[0].shape == (0, 1)


def test_completion_mask_is_the_written_list():
    """Rows: prompt 2 + completion 3; prompt 1 + completion 1; no completion; empty prompt."""
    mask = completion_mask(torch.tensor([2, 1, 4, 0]), torch.tensor([5, 2, 4, 2]), 6)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
    ]


def test_the_end_of_text_stays_in_even_if_it_is_the_pad_id():
    eos = 0
    ids, lengths = pad([[3, 4, 9, eos], [3, 9, eos]])
    mask = completion_mask(torch.tensor([2, 1]), lengths, 4)
    assert [row[m].tolist() for row, m in zip(ids, mask)] == [[9, eos], [9, eos]]


# ------------------------------------------------------------------------------------------------ balancing


def greedy(points, k, first):
    """Furthest-point greedy in plain Python: the largest distance to the nearest chosen one, lowest index first."""
    chosen = [first]
    while len(chosen) < k:
        rest = [i for i in range(len(points)) if i not in chosen]
        distance = {
            i: min(1 - sum(a * b for a, b in zip(points[i], points[j])) for j in chosen)
            for i in rest
        }
        chosen.append(max(rest, key=lambda i: (distance[i], -i)))
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_k_center_is_the_greedy_furthest_point(seed):
    x = torch.nn.functional.normalize(
        torch.randn(9, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )
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
    chosen = k_center(x, 7, seed)
    assert sorted(chosen) == list(range(7))
    assert 6 in k_center(x, 2, seed)


@pytest.mark.parametrize("given", [None, torch.eye(2)[:1]])
def test_k_center_of_too_many_or_none(given):
    x = torch.eye(2)
    for k in (-1, 3):
        with pytest.raises(ValueError, match=f"k {k}: want 0 to 2"):
            k_center(x, k, given=given)
    assert k_center(x, 0, given=given) == k_center(x[:0], 0, given=given) == [] and sorted(
        k_center(x, 2, given=given)
    ) == [0, 1]


@pytest.mark.parametrize("seed", range(6))
def test_k_center_radius_is_within_twice_the_best_as_chord_and_as_angle(seed):
    """Against every choice of 3 centres out of 9 points; 1 - cosine, the chord's square over 2, can be 4 times the best and is not promised."""
    x = torch.nn.functional.normalize(
        torch.randn(9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )
    cos = (x @ x.T).clamp(-1, 1)
    for distance in ((2 - 2 * cos).sqrt(), cos.arccos()):
        best = min(distance[:, list(c)].amin(1).max() for c in itertools.combinations(range(9), 3))
        for start in range(9):
            assert distance[:, k_center(x, 3, start)].amin(1).max() <= 2 * best


def rows_of(**numbers):
    return [
        {"category": c, "prompt": f"{c} {i}"}
        for i in range(max(numbers.values()))
        for c in numbers
        if i < numbers[c]
    ]


def test_balance_is_exact_and_in_category_order():
    rows = rows_of(**{c: 4 + i for i, c in enumerate(reversed(CATEGORIES))}, **{HELPFUL: 9})
    x = torch.nn.functional.normalize(
        torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(0)), dim=1
    )
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
    with pytest.raises(UserError) as e:
        balance(rows, 5, torch.ones(len(rows), 1))
    assert (
        "crime (2 missing)" in str(e.value)
        and "privacy (5 missing)" in str(e.value)
        and "insult" not in str(e.value)
        and "--generate true" in str(e.value)
    )


def test_imbalance():
    """28 in all: 60 : 20 : 10 : 5 : 3 : 1 : 1 of 100, so 16.8, 5.6, 2.8, 1.4, .84, .28, .28; two are the least, if there are two."""
    names = ("crime", "insult", "ethics", "privacy", "unfairness", "mental_health", "physical_harm")

    def drawn(numbers, n, how):
        rows = rows_of(**dict(zip(names, numbers)))
        x = torch.nn.functional.normalize(
            torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(0)), dim=1
        )
        out = imbalance(rows, n, how, x, seed=3)
        mine = [i for i, r in enumerate(rows) if r["category"] == "crime"]
        crime = [r["prompt"] for r in out if r["category"] == "crime"]
        assert set(crime) == {
            rows[mine[i]]["prompt"] for i in k_center(x[mine], len(crime), 3)
        } and [*dict.fromkeys(r["category"] for r in out)] == list(CATEGORIES)
        return [sum(r["category"] == c for r in out) for c in names]

    assert drawn((60, 20, 10, 5, 3, 1, 1), 4, "pool") == [16, 5, 2, 2, 2, 1, 1]
    assert drawn((10, 10, 10, 10, 10, 10, 7), 5, "pool") in (
        [5, 6, 5, 5, 5, 5, 4],
        [6, 5, 5, 5, 5, 5, 4],
    )  # 35 of 67: 5.22 six times, 3.66: the two left go to the largest rests
    assert drawn((30, 12, 12, 12, 12, 11, 11), 4, "pool") == [
        9,
        4,
        3,
        3,
        3,
        3,
        3,
    ]  # 8.4, 3.36, 3.08: the two left go to crime and the first of the four
    assert (
        drawn((60, 50, 45, 44, 12, 11, 10), 40, "tail") == [40] * 4 + [4] * 3
        and drawn((9, 8, 7, 7, 5, 5, 5), 7, "tail") == [7] * 4 + [2] * 3
    )


def test_balance_report():
    even = balance_report(rows_of(**{c: 3 for c in CATEGORIES}))
    assert (
        even["imbalance"] == 1
        and math.isclose(even["entropy"], 1)
        and even["counts"] == {c: 3 for c in CATEGORIES}
    )
    report = balance_report(
        rows_of(insult=4, crime=2, ethics=2, **{HELPFUL: 9})
    )  # p = 1/2, 1/4, 1/4: 1.5 ln 2
    assert (
        math.isclose(report["entropy"], 1.5 * math.log(2) / math.log(7))
        and report["imbalance"] == math.inf
    )
    assert balance_report(rows_of(**{c: 2 for c in CATEGORIES} | {"insult": 7}))["imbalance"] == 3.5


def test_k_center_goes_on_from_given_points():
    """On the unit circle, from 0 degrees: the furthest of 10, 80, 170 is 170, then 80 (80 away from both), then 10."""
    at = lambda *degrees: torch.tensor(
        [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]
    )
    assert (
        k_center(at(10, 80, 170), 3, given=at(0)) == [2, 1, 0]
        and k_center(at(10, 80, 170), 0, given=at(0)) == []
    )
    assert k_center(at(10, 80, 170), 1, given=at(0, 180)) == [1]  # far from the closest of them
    assert k_center(at(10, 80, 170), 2, 0, given=at(0)[:0]) == k_center(at(10, 80, 170), 2, 0)


def test_confusion():
    table = data.confusion(
        ["crime", "crime", "insult", "ethics"], ["crime", "insult", "insult", "privacy"]
    )
    assert (
        "| crime | 1 | 0 | 1 | 0 | 0 | 0 | 0 | 0.50 |" in table
        and "| ethics | 0 | 0 | 0 | 0 | 0 | 1 | 0 | 0.00 |" in table
    )
    assert table.endswith("| all | | | | | | | | 0.50 |")


def test_route():
    """Two points a category around its axis: the centroid is the axis, and a point goes to the axis it is closest to."""
    x = torch.eye(7).repeat_interleave(2, 0)
    x[0::2, 0] += 0.2
    x[1::2, 0] -= 0.2
    x[0], x[1] = torch.eye(7)[0], 3 * torch.eye(7)[0]
    centres = centroids(x, [c for c in CATEGORIES for _ in range(2)])
    torch.testing.assert_close(centres, torch.eye(7))
    assert route(torch.tensor([[0, 0, 0.5, 0.4, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0.1]]), centres) == [
        "crime",
        "ethics",
    ]


def test_balance_table():
    report = {
        "before": balance_report(rows_of(**{c: 2 for c in CATEGORIES} | {"insult": 7})),
        "after": balance_report(rows_of(**{c: 2 for c in CATEGORIES})),
    }
    lines = data.balance_table(report).split("\n")
    assert (
        lines[2] == "| before | 7 | 2 | 2 | 2 | 2 | 2 | 2 | 19 | 3.50 | 0.920 |"
        and lines[3] == "| after | 2 | 2 | 2 | 2 | 2 | 2 | 2 | 14 | 1.00 | 1.000 |"
    )


def test_normalise():
    assert data.normalise("  What's  THE\nprice — 5€?") == "what s the price 5"


def test_distinct():
    """Of rows with the same prompt, but for case and punctuation, one stays: one with a draft, else one with a category."""
    a, b, c, d = (
        {"prompt": p, "category": k, **more}
        for p, k, more in (
            ("Do it!", None, {}),
            ("do  it", "crime", {}),
            ("Do it.", None, {"draft": ["x"]}),
            ("do it", "crime", {"draft": ["y"]}),
        )
    )
    other = {"prompt": "Do that", "category": "crime"}
    assert (
        data.distinct([a, b, c, d, other]) == [d, other]
        and data.distinct([a, c, other]) == [c, other]
        and data.distinct([a, b]) == [b]
    )
    assert len(data.distinct([{**a, "prompt": p} for p in ("?", "!", "一", "二")])) == 4
