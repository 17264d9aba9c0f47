"""data.py: drafts, padding and masks, balancing, files; and what the shipped corpus promises."""
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
from data import CATEGORIES, HELPFUL, UserError, balance, balance_report, completion_mask, format_draft, k_center, pad, parse_draft
from judge import judge

CORPUS = Path(data.__file__).parent / "corpus"


# ------------------------------------------------------------------------------------------------ drafts

@pytest.mark.parametrize("steps", [["a"], ["two words", "b"], ["  indented", "trailing  ", "tab\there"], ["#one", "##", "###"], ["é ü 中文", "“quotes”", "-"]])
@pytest.mark.parametrize("answer", ["x", "Yes.", " two spaces before", "ends in space ", "line\nbreak", "line\n\nbreak\n", "# ## ###", "中文 ’"])
def test_draft_round_trip(steps, answer):
    text = format_draft(steps, answer)
    assert text == "\n".join(steps) + "\n#### " + answer
    assert parse_draft(text) == (steps, answer)


@pytest.mark.parametrize("text", [
    "", "no separator", "a\nb", "####", "a\n#### b\n#### c", "a\n####b", "a\n####", "a\n#### ", "a\n####  \n", "#### b", "\n#### b", " \n#### b", "a\n\n#### b", "a\n\nb\n#### c",
    "a #### b", "a\n  #### b", "a\n######## b", "a\n##### b", "a\n####\nb"])
def test_malformed_drafts_raise(text):
    with pytest.raises(ValueError):
        parse_draft(text)


@pytest.mark.parametrize("steps, answer", [([], "b"), ([""], "b"), (["a", " "], "b"), (["a\nb"], "c"), (["a ####"], "b"), (["a"], ""), (["a"], " "), (["a"], "b #### c"), (["a#"], "#### b")])
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
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]


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
        distance = {i: min(1 - sum(a * b for a, b in zip(points[i], points[j])) for j in chosen) for i in rest}
        chosen.append(max(rest, key=lambda i: (distance[i], -i)))
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_k_center_is_the_greedy_furthest_point(seed):
    x = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)
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


def rows_of(**numbers):
    return [{"category": c, "prompt": f"{c} {i}"} for i in range(max(numbers.values())) for c in numbers if i < numbers[c]]


def test_balance_is_exact_and_in_category_order():
    rows = rows_of(**{c: 4 + i for i, c in enumerate(reversed(CATEGORIES))}, **{HELPFUL: 9})
    x = torch.nn.functional.normalize(torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(0)), dim=1)
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
    assert "crime (2 missing)" in str(e.value) and "privacy (5 missing)" in str(e.value) and "insult" not in str(e.value)


def test_balance_report():
    even = balance_report(rows_of(**{c: 3 for c in CATEGORIES}))
    assert even["imbalance"] == 1 and math.isclose(even["entropy"], 1) and even["counts"] == {c: 3 for c in CATEGORIES}
    report = balance_report(rows_of(insult=4, crime=2, ethics=2, **{HELPFUL: 9}))            # p = 1/2, 1/4, 1/4: 1.5 ln 2
    assert math.isclose(report["entropy"], 1.5 * math.log(2) / math.log(7)) and report["imbalance"] == math.inf
    assert balance_report(rows_of(**{c: 2 for c in CATEGORIES} | {"insult": 7}))["imbalance"] == 3.5


# ------------------------------------------------------------------------------------------------ files

def write(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", '{"prompt": "één", "n": 1}\n\n{"goal": "two"}\n'), ("a.jsonl", '\ufeff{"prompt": "één", "n": 1}\r\n{"Behavior": "two"}'),
    ("a.csv", "n,prompt\n1,één\n2,two\n"), ("A.CSV", "\ufeffforbidden_prompt,n\r\n\"één\",1\r\ntwo,2\r\n")])
def test_load_rows(tmp_path, name, text):
    rows = data.load_rows(str(write(tmp_path, name, text)))
    assert [r["prompt"] for r in rows] == ["één", "two"] and str(rows[0]["n"]) == "1"


def test_load_rows_csv_keeps_commas_and_line_breaks(tmp_path):
    rows = data.load_rows(write(tmp_path, "a.csv", 'question,label\n"one, with\ntwo lines",safe\n'))
    assert rows[0]["prompt"] == "one, with\ntwo lines" and rows[0]["label"] == "safe"


@pytest.mark.parametrize("name, text, message", [
    ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "a.jsonl:3: not JSON"), ("a.jsonl", '{"prompt": "a"}\n{"x": "b"}\n', "a.jsonl:2: no prompt"),
    ("a.jsonl", '{"prompt": " "}\n', "a.jsonl:1: no prompt"), ("a.jsonl", '{"prompt": 3}\n', "a.jsonl:1: no prompt"), ("a.jsonl", '["prompt"]\n', "a.jsonl:1: no prompt"),
    ("a.csv", "prompt,n\na,1\n,2\n", "a.csv:3: no prompt"), ("a.jsonl", "", "no rows"), ("a.csv", "prompt\n", "no rows"), ("a.jsonl", b'{"prompt": "\xff"}\n', "not UTF-8 at byte 12")])
def test_load_rows_errors_say_where(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(UserError) as e:
        data.load_rows(path)
    assert message in str(e.value) and str(path) in str(e.value)


def test_load_rows_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            data.load_rows(path)


def test_load_demonstrations(tmp_path):
    good = {"prompt": "p", "category": "crime", "draft": ["one", "two"], "answer": "No."}
    assert data.load_demonstrations(write(tmp_path, "a.jsonl", json.dumps(good)))[0]["response"] == "one\ntwo\n#### No."
    bad = [{"category": "murder"}, {"category": None}, {"draft": []}, {"draft": ["one", ""]}, {"draft": 3}, {"draft": [1, 2]}, {"answer": ""}, {"answer": "a #### b"}, {"answer": None}]
    for change in bad:
        path = write(tmp_path, "b.jsonl", json.dumps(good) + "\n" + json.dumps({**good, **change}))
        with pytest.raises(UserError, match="b.jsonl, row 2"):
            data.load_demonstrations(path)
    for missing in ("category", "draft", "answer"):
        with pytest.raises(UserError, match="row 1"):
            data.load_demonstrations(write(tmp_path, "c.jsonl", json.dumps({k: v for k, v in good.items() if k != missing})))


def test_normalise():
    assert data.normalise("  What's  THE\nprice — 5€?") == "what s the price 5"


# ------------------------------------------------------------------------------------------------ the corpus

@pytest.fixture(scope="module")
def corpus():
    load = {"demonstrations": data.load_demonstrations, "benign": data.load_demonstrations, "dev": data.load_rows, "test": data.load_rows}
    return {name: f(CORPUS / f"{name}.jsonl") for name, f in load.items()}


def test_corpus_counts(corpus):
    assert data.counts(corpus["demonstrations"]) == {c: 72 for c in CATEGORIES} and len(corpus["demonstrations"]) == 504
    benign = Counter(r["kind"] for r in corpus["benign"] if r["category"] == HELPFUL)
    assert sum(benign.values()) == len(corpus["benign"]) >= 280 and set(benign) == {"ordinary", "lookalike"}
    assert 0.4 <= benign["lookalike"] / len(corpus["benign"]) <= 0.6
    for name in ("dev", "test"):
        assert Counter((r["category"], r.get("kind")) for r in corpus[name]) == {**{(c, None): 20 for c in CATEGORIES}, (HELPFUL, "ordinary"): 60, (HELPFUL, "lookalike"): 60}


def test_corpus_drafts_are_short(corpus):
    for row in corpus["demonstrations"] + corpus["benign"]:
        assert 2 <= len(row["draft"]) <= 3 and all(len(step.split()) <= 5 for step in row["draft"]), row["prompt"]


def test_corpus_shares_no_prompt(corpus):
    where = {}
    for name, rows in corpus.items():
        for r in rows:
            where.setdefault(data.normalise(r["prompt"]), []).append(name)
    assert {p: files for p, files in where.items() if len(files) > 1} == {}


@pytest.mark.parametrize("name", ["demonstrations", "benign"])
def test_corpus_answers_open_in_many_ways(corpus, name):
    opening, n = Counter(tuple(data.normalise(r["answer"]).split()[:4]) for r in corpus[name]).most_common(1)[0]
    assert n <= 0.05 * len(corpus[name]), opening


@pytest.mark.parametrize("name, verdict", [("demonstrations", "refuses"), ("benign", "complies")])
def test_corpus_is_judged_as_meant(corpus, name, verdict):
    wrong = [r["response"] for r in corpus[name] if judge(r["response"]) != verdict]
    assert len(wrong) <= 0.01 * len(corpus[name]), wrong[:5]


@pytest.mark.parametrize("name", ["demonstrations", "benign", "dev", "test"])
def test_corpus_prompts_are_not_templates(corpus, name):
    """No prompt shares more than half of its four-word windows with another of its file (prompts of under 7 words have too few)."""
    words = [data.normalise(r["prompt"]).split() for r in corpus[name]]
    grams = [{tuple(w[i:i + 4]) for i in range(len(w) - 3)} for w in words if len(w) >= 7]
    for i, mine in enumerate(grams):
        for j, other in enumerate(grams):
            assert i == j or len(mine & other) <= len(mine) / 2, mine & other
