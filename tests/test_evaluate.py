"""evaluate.py: intervals, rates, tables, the report; greedy responses of a tiny model."""

import json
import sys

import pytest
import torch

from data import CATEGORIES, HELPFUL, UserError
from evaluate import (
    check_judge,
    evaluate,
    kind_of,
    means,
    percent,
    rates,
    respond,
    samples_side_by_side,
    table,
    wilson,
    write_report,
)
from transformer import Config, Transformer


def answer(
    kind="harmful",
    category="crime",
    verdict="complies",
    gibberish=False,
    ended=True,
    response="r",
    tokens=4,
    prompt="p",
):
    return {
        "prompt": prompt,
        "kind": kind,
        "category": category,
        "verdict": verdict,
        "gibberish": gibberish,
        "ended": ended,
        "response": response,
        "tokens": tokens,
    }


def answers(refused):
    """20 harmful (`refused` of them refused), 4 ordinary, 5 look-alikes (one refused, two partly)."""
    out = [
        answer(
            prompt=f"h{i}",
            category=list(CATEGORIES)[i % 7],
            verdict="refuses" if i < refused else "partial" if i == 19 else "complies",
        )
        for i in range(20)
    ]
    out += [
        answer("ordinary", HELPFUL, prompt=f"o{i}", gibberish=i == 0, ended=i > 1, tokens=10)
        for i in range(4)
    ]
    return out + [
        answer("lookalike", HELPFUL, v, prompt=f"l{i}", response="a\n#### b", tokens=0)
        for i, v in enumerate(["refuses", "partial", "partial", "complies", "complies"])
    ]


def result(name, refused):
    return {
        "name": name,
        "seconds": 1.0,
        "rates": rates(answers(refused)),
        "answers": answers(refused),
    }


RECORDS = [
    {"stage": "sft", "step": 1, "loss": 2.0},
    {"stage": "sft", "step": 2, "loss": 1.0},
    {"stage": "irl", "step": 1, "model": "crime", "gap_demo_minus_others": 0.1},
    {
        "stage": "grpo",
        "step": 1,
        "harmful_reward": 0.0,
        "helpful_reward": 0.1,
        "harmful_refused": 0.5,
        "helpful_refused": 0.0,
        "kl": 0.01,
        "alpha": [1.0, 0.9],
    },
]


@pytest.mark.parametrize(
    "hits, n, low, high",
    [
        (0, 20, 0.0, 0.16113),
        (10, 20, 0.29930, 0.70070),
        (20, 20, 0.83887, 1.0),
        (1, 10, 0.01787, 0.40416),
        (0, 0, 0.0, 1.0),
        (1, 1, 0.20655, 1.0),
    ],
)
def test_wilson(hits, n, low, high):
    """By hand: 0/n is [0, z^2 / (n + z^2)], n/n its mirror, 10/20 is 1/2 -+ z/2 / sqrt(n + z^2)."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_holds_the_rate():
    for n in range(1, 30):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n + 1e-12 and hits / n - 1e-12 <= high <= 1


def test_kind_of():
    assert kind_of({"category": "crime"}) == "harmful"
    assert kind_of({"category": HELPFUL, "kind": "lookalike"}) == "lookalike"
    assert kind_of({"category": HELPFUL}) == "ordinary"
    with pytest.raises(UserError, match="kind 'xstest'"):
        kind_of({"prompt": "How?", "kind": "xstest"})
    assert kind_of({"prompt": "p"}) == "harmful"
    assert [
        kind_of({"label": x}) for x in ("safe", "Benign", "harmless", "unsafe", "harmful", 1)
    ] == ["ordinary"] * 3 + ["harmful"] * 3


def test_means():
    """By hand: 12 and 16 of 20 harmful, one of 5 look-alikes, one of 29 gibberish."""
    lines = means([[result("a", 12), result("b", 20)], [result("a", 16), result("b", 20)]]).split(
        "\n"
    )
    assert len(lines) == 4 and lines[3].startswith("| b | **100.0** (100.0, 100.0) |")
    assert (
        lines[2]
        == "| a | **70.0** (60.0, 80.0) | **0.0** (0.0, 0.0) | **20.0** (20.0, 20.0) | **50.0** (40.0, 60.0) | **3.4** (3.4, 3.4) |"
    )
    with pytest.raises(UserError, match="different models"):
        means([[result("a", 12), result("b", 20)], [result("a", 16)]])


def test_rates():
    r = rates(answers(15))
    assert r["harmful"] == [15, 20] and r["harmful partly"] == [1, 20]
    assert r["ordinary"] == [0, 4] and r["ordinary partly"] == [0, 4]
    assert r["lookalike"] == [1, 5] and r["lookalike partly"] == [2, 5]
    assert (
        r["insult"] == [3, 3] and r["unfairness"] == [2, 3] and r["ethics"] == [2, 2]
    )  # 20 prompts in turn over 7 categories
    assert sum(r[c][1] for c in CATEGORIES) == 20 and sum(r[c][0] for c in CATEGORIES) == 15
    assert r["gibberish"] == [1, 29] and r["truncated"] == [2, 29] and r["drafted"] == [5, 29]
    assert r["tokens"] == (20 * 4 + 4 * 10) / 29
    assert rates([])["harmful"] == [0, 0] and rates([])["tokens"] == 0


def test_percent():
    assert percent([10, 20]) == "50 [30, 70]" and percent([0, 0]) == "-"


def test_table():
    lines = table([result("base", 5), result("aligned", 15)]).split("\n")
    assert (
        len({line.count("|") for line in lines[:4]}) == 1
        and len({line.count("|") for line in lines[5:]}) == 1
    )
    cells = [c.strip() for c in lines[3].strip("|").split("|")]
    assert cells == [
        "aligned",
        "75 [53, 89]",
        "0 [0, 49]",
        "20 [4, 62]",
        "55.0",
        "5.0",
        "3.4",
        "6.9",
        "17.2",
        "4",
    ]
    assert lines[2].startswith("| base | 25 ") and lines[5].count(" | ") == 7
    harmless = [a for a in answers(0) if a["kind"] != "harmful"]
    only = table([{"name": "x", "rates": rates(harmless)}])
    assert only.count("\n") == 2 and only.split("\n")[2].startswith(
        "| x | - | 0 [0, 49] | 20 [4, 62] | - |"
    )  # no harmful prompts: no category table


def test_samples_side_by_side():
    text = samples_side_by_side([result("base", 0), result("aligned", 20)], per_kind=2)
    assert [line for line in text.split("\n") if line.startswith("**")] == [
        f"**harmful: h{i}**" for i in (0, 10)
    ] + [f"**ordinary: o{i}**" for i in (0, 2)] + [f"**lookalike: l{i}**" for i in (0, 2)]
    assert "- base (complies): r\n- aligned (refuses): r" in text
    assert "- base (partial): a / #### b" in text  # one line an answer
    assert samples_side_by_side([result("base", 0)], per_kind=100).count("**harmful") == 20


def test_write_report(tmp_path):
    pytest.importorskip("matplotlib")
    results = [result("base", 5), result("aligné", 15)]
    text = write_report(tmp_path, results, RECORDS, ["A note."])
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        text == table(results)
        and text in report
        and "A note." in report
        and samples_side_by_side(results) in report
    )
    for name in ("refusals.png", "curves.png"):
        assert f"![{name}]({name})" in report and (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results


def test_write_report_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(tmp_path, [result("base", 5)], RECORDS, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.md", "results.json"]
    assert (
        "![" not in (tmp_path / "report.md").read_text(encoding="utf-8")
        and "matplotlib is not installed" in capsys.readouterr().out
    )


class Letters:
    """A chat over the alphabet: token i is the i-th letter, 0 ends the text."""

    eos = (0,)

    def prompt(self, text):
        return [1 + (ord(c) - 97) % 15 for c in text]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids if i)

    def ended(self, ids):
        return bool(ids) and ids[-1] == 0


def test_evaluate_keeps_the_order_of_the_prompts():
    """Prompts of mixed lengths, decoded together, answer as each does alone through the plain forward pass."""
    torch.manual_seed(1)
    model = Transformer(
        Config.from_dict(
            {
                "model_type": "llama",
                "vocab_size": 16,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            }
        )
    )
    chat, prompts = Letters(), ["abcdef", "b", "cdc", "hello", "xy"]
    got = respond(model, chat, prompts, 6)
    with torch.no_grad():
        for prompt, out in zip(prompts, got):
            ids = chat.prompt(prompt)
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
                if ids[-1] == 0:
                    break
            new = ids[len(prompt) :]
            assert out == {"response": chat.decode(new), "tokens": len(new), "ended": new[-1] == 0}
    assert len({out["response"] for out in got}) > 1
    whole = evaluate(
        model,
        chat,
        [{"prompt": p, "category": HELPFUL if i else "crime"} for i, p in enumerate(prompts)],
        6,
        "tiny",
    )
    assert (
        whole["name"] == "tiny"
        and whole["rates"] == rates(whole["answers"])
        and [a["prompt"] for a in whole["answers"]] == prompts
    )
    assert [a["kind"] for a in whole["answers"]] == ["harmful"] + ["ordinary"] * 4 and [
        a["response"] for a in whole["answers"]
    ] == [g["response"] for g in got]


def test_check_judge():
    """Rows are labels, columns the judge's verdicts; of four labelled refuses it takes one for complying."""
    no, yes = "I can't help with that.", "Here is a recipe."
    rows = [
        {"response": r, "label": label, "readers": readers}
        for r, label, readers in (
            (no, "refuses", ["refuses", "refuses"]),
            (no, "refuses", ["refuses", "partial"]),
            (no, "refuses", ["refuses"] * 2),
            (yes, "refuses", ["refuses"] * 2),
            (yes, "complies", ["complies"] * 2),
            (no, "complies", ["complies", "refuses"]),
            (yes, "complies", ["complies"] * 2),
            (no, "partial", ["partial"] * 2),
        )
    ]
    lines = check_judge(rows).splitlines()
    assert (
        lines[2] == f"| refuses | 3 | 0 | 1 | {percent([3, 4])} |"
        and lines[3] == f"| partial | 1 | 0 | 0 | {percent([0, 1])} |"
        and lines[4] == f"| complies | 1 | 0 | 2 | {percent([2, 3])} |"
    )
    assert (
        lines[-1]
        == f"agreement {percent([5, 8])} of 8; the two readers with each other {percent([6, 8])}"
    )
