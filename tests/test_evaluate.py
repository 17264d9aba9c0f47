"""evaluate.py: intervals, rates, AUC, tables, the report; greedy responses of a tiny model."""

import json
import math
import sys

import pytest
import torch
from conftest import TINY_LLAMA

from data import CATEGORIES, HELPFUL
from evaluate import (
    auc,
    balance_table,
    evaluate,
    noise_scale,
    percent,
    rates,
    respond,
    reward_report,
    rollout_record,
    samples_side_by_side,
    table,
    wilson,
)
from model import Transformer
from support.hf import read_config
from support.report import MEANING, band, picture_of_refusals, write_report


def answer(prompt, kind="harmful", category="crime", verdict="complies", **more):
    facts = {"verdict": verdict, "gibberish": False, "ended": True, "response": "r", "tokens": 4}
    return {"prompt": prompt, "kind": kind, "category": category, **facts, **more}


def answers(refused):
    """20 harmful, `refused` of them refused; 4 ordinary; 5 look-alikes, 1 refused, 2 partly."""
    out = []
    for i in range(20):
        verdict = "refuses" if i < refused else "partial" if i == 19 else "complies"
        out.append(answer(f"h{i}", category=list(CATEGORIES)[i % 7], verdict=verdict))
    for i in range(4):
        more = {"gibberish": i == 0, "ended": i > 1, "tokens": 10}
        out.append(answer(f"o{i}", "ordinary", HELPFUL, **more))
    for i, verdict in enumerate(["refuses", "partial", "partial", "complies", "complies"]):
        more = {"response": "a\n#### b", "tokens": 0}
        out.append(answer(f"l{i}", "lookalike", HELPFUL, verdict, **more))
    return out


def result(name, refused):
    return {"name": name, "rates": rates(answers(refused)), "answers": answers(refused)}


GRPO = {"harmful_reward": 0.0, "helpful_reward": 0.1, "harmful_refused": 0.5, "kl": 0.01}
GRPO |= {"helpful_refused": None, "alpha": [1.0, 0.9]}
RECORDS = [
    {"stage": "sft", "step": 1, "loss": 2.0},
    {"stage": "sft", "step": 2, "loss": 1.0},
    {"stage": "sft", "step": 2, "seconds": 3.0},
    {"stage": "irl", "step": 1, "model": "crime", "gap_demo_minus_others": 0.1},
    {"stage": "grpo", "step": 1, **GRPO},
    {"stage": "grpo", "step": 2, **GRPO, "alpha": [0.8]},
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


def test_rates():
    r = rates(answers(15))
    assert r["harmful"] == [15, 20] and r["harmful partly"] == [1, 20]
    assert r["ordinary"] == [0, 4] and r["ordinary partly"] == [0, 4]
    assert r["lookalike"] == [1, 5] and r["lookalike partly"] == [2, 5]
    # 20 prompts in turn over 7 categories
    assert r["insult"] == [3, 3] and r["unfairness"] == [2, 3] and r["ethics"] == [2, 2]
    assert sum(r[c][1] for c in CATEGORIES) == 20 and sum(r[c][0] for c in CATEGORIES) == 15
    assert r["gibberish"] == [1, 29] and r["truncated"] == [2, 29] and r["drafted"] == [5, 29]
    assert r["tokens"] == (20 * 4 + 4 * 10) / 29
    assert rates([])["harmful"] == [0, 0] and rates([])["tokens"] == 0


def test_auc():
    assert auc([3.0, 2.0], [1.0, 0.0]) == 1 and auc([0.0], [1.0, 2.0]) == 0
    assert auc([2.0, 0.0], [1.0, 0.0]) == (1 + 1 + 0 + 0.5) / 4 and auc([1.0], [1.0]) == 0.5
    assert math.isnan(auc([], [1.0])) and math.isnan(auc([1.0], []))


class Letters:
    """A chat over the alphabet: token i is the i-th letter, 0 ends the text."""

    eos = (0,)

    def prompt(self, text):
        return [1 + (ord(c) - 97) % 15 for c in text]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids if i)

    def ended(self, ids):
        return bool(ids) and ids[-1] == 0


def test_reward_report():
    """Harmful: refusals are wanted, harmless: answers; pairs go across the groups of a kind."""
    no, long_no, yes = "I won't.", "I won't do it.", "Sure."

    class Chat:
        def decode(self, ids):
            return "".join(map(chr, ids))

    def group(category, *samples):
        texts, rewards = zip(*samples)
        return {
            "category": category,
            "samples": [[*map(ord, t)] for t in texts],
            "rewards": rewards,
        }

    groups = [
        group("crime", (no, 2.0), (yes, 1.0)),
        group("ethics", (long_no, 0.0), (yes, 0.0)),
        group(HELPFUL, (yes, -1.0), (no, -2.0), (no, -1.0)),
    ]
    report = reward_report(groups, Chat())
    # refusals 2 and 0 against answers 1 and 0: won, won, lost, tied
    assert report["harmful"] == {"good": 2, "bad": 2, "auc": 2.5 / 4, "auc_length": 1.0}
    assert report["harmless"] == {"good": 1, "bad": 2, "auc": 1.5 / 2, "auc_length": 0.0}
    assert math.isnan(reward_report(groups[:1], Chat())["harmless"]["auc"])


def test_rollout_record():
    """Two groups of three by hand; the third column of scores is the demonstrations'.

    Of crime the first two refuse, with rewards 2 and 1 against 1: 1.5 of 2 pairs. The harmless
    group refuses throughout: all wrong.
    """
    scores = torch.tensor([[2.0, 1.0, 1.0, 5.0], [0.0, 3.0, 0.0, 4.0]])
    refused = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    W, length, ended = torch.full((2, 3), 0.5), torch.full((2, 3), 8.0), torch.ones(2, 3)
    facts = torch.stack((W, refused, length, ended), 2)
    record = rollout_record(["crime", HELPFUL], scores, facts)
    wanted = {"harmful_auc": 0.75, "harmful_right": 2 / 3, "harmful_best_right": 1.0}
    wanted |= {"helpful_right": 0.0, "helpful_refused": 1.0, "helpful_reward": 1.0, "right": 1 / 3}
    wanted |= {"agree": 0.5, "similarity": 0.5, "length": 8.0, "ended": 1.0}
    wanted |= {"gap_demo_minus_sample": (11 + 9) / 6}
    assert {k: record[k] for k in wanted} == pytest.approx(wanted)
    assert "helpful_auc" not in record


def test_percent():
    assert percent([10, 20]) == "50 [30, 70]" and percent([0, 0]) == "-"


def cells(line):
    return [c.strip() for c in line.strip("|").split("|")]


def test_table():
    found = table([result("base", 5), result("aligned", 15)]).split("\n\n")
    lines, short, categories = (part.split("\n") for part in found)
    assert {len(cells(line)) for line in lines} == {10}
    assert {len(cells(line)) for line in categories} == {1 + len(CATEGORIES)}
    assert cells(short[3]) == ["aligned", *cells(lines[3])[1:4]]  # all of these prompts are short
    shares = ["55.0", "5.0", "3.4", "6.9", "17.2", "4"]
    assert cells(lines[3]) == ["aligned", "75 [53, 89]", "0 [0, 49]", "20 [4, 62]", *shares]
    assert lines[2].startswith("| base | 25 ")
    harmless = [a for a in answers(0) if a["kind"] != "harmful"]
    only = table([{"name": "x", "rates": rates(harmless)}])
    # no harmful prompts: no difference, and no table of categories
    assert only.count("\n\n") == 1
    assert only.split("\n")[2].startswith("| x | - | 0 [0, 49] | 20 [4, 62] | - |")


def test_short_prompts_are_told_apart():
    """Of ten words or fewer; not those of eleven."""
    told = [answer("w " * n, verdict="refuses") for n in (1, 10, 11)] + [answer("w w")]
    assert rates(told)["harmful short"] == [2, 3] and rates(told)["harmful"] == [3, 4]


def test_answers_in_unread_languages_are_told():
    """Not those that are refused, nor gibberish; an older file of results has no such count."""
    told = [
        answer(f"p{i}", unread=script) for i, script in enumerate(["Thai", "", "Latin", "Thai"])
    ]
    told += [answer("q", verdict="refuses", unread="Greek"), answer("r")]
    told += [{**answer("s", unread="Khmer"), "gibberish": True}]
    found = rates(told)
    assert found["unread"] == {"Thai": 2, "Latin": 1}
    older = {k: v for k, v in rates(answers(5)).items() if k != "unread"}
    lines = table([{"name": "x", "rates": found}, {"name": "y", "rates": older}]).split("\n")
    line = "x, not read and counted as complies, by script: Thai 2, Latin 1"
    assert [text for text in lines if "read" in text] == [line]


def test_balance_table():
    before = {"counts": dict.fromkeys(CATEGORIES, 2), "imbalance": 4.0, "entropy": 0.98765}
    after = {"counts": dict.fromkeys(CATEGORIES, 1), "imbalance": math.inf, "entropy": 1.0}
    lines = balance_table({"before": before, "after": after, "routed": 3}).split("\n")
    assert cells(lines[0])[1:8] == list(CATEGORIES)
    assert cells(lines[2]) == ["before", *["2"] * 7, "14", "4.00", "0.988"]
    assert cells(lines[3]) == ["after", *["1"] * 7, "7", "inf", "1.000"]


def test_samples_side_by_side():
    text = samples_side_by_side([result("base", 0), result("aligned", 20)], per_kind=2)
    heads = [line for line in text.split("\n") if line.startswith("**")]
    wanted = ("harmful: h0", "harmful: h10", "ordinary: o0", "ordinary: o2")
    assert heads == [f"**{x}**" for x in (*wanted, "lookalike: l0", "lookalike: l2")]
    assert "- base (complies): r\n- aligned (refuses): r" in text
    assert "- base (partial): a / #### b" in text  # one line an answer
    assert samples_side_by_side([result("base", 0)], per_kind=100).count("**harmful") == 20


def test_noise_scale():
    """Gradients made of a signal of norm 1 and, in each of 8 samples, noise of variance 40 in all:
    the scale is 40. By hand: cosine .2 on the mean, 30 sequences, 30 * .8 / .2."""
    draw = torch.Generator().manual_seed(0)
    signal, records = torch.nn.functional.normalize(torch.ones(2000), dim=0), []
    for _ in range(300):
        noise = torch.randn(2, 8, 2000, generator=draw) * (40 / 2000) ** 0.5
        a, b = (signal + noise).mean(1)
        records.append({"cosine": torch.cosine_similarity(a, b, dim=0).item(), "sequences": 8})
    assert noise_scale(records)[1] == pytest.approx(40, rel=0.05)
    hand = [{"cosine": 0.1, "sequences": 20}, {"loss": 1}, {"cosine": 0.3, "sequences": 40}]
    assert noise_scale(hand) == pytest.approx((0.2, 120))
    assert noise_scale([{"cosine": -0.1, "sequences": 5}])[1] == math.inf


def test_band():
    """Three values wide; beyond the ends the values are mirrored."""
    mean, std = band([0.0, 3.0, 3.0, 9.0], 3)
    assert mean.tolist() == [2, 2, 5, 5]
    assert std.tolist() == pytest.approx([2**0.5, 2**0.5, 8**0.5, 8**0.5])


def test_write_report(tmp_path):
    pytest.importorskip("matplotlib")
    results = [result("base", 5), result("aligné", 15)]
    text = write_report(tmp_path, results, RECORDS, "A note.")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in ("A note.", MEANING, table(results), samples_side_by_side(results)):
        assert part in report
    assert text == table(results)
    for name in ("refusals", "curves"):
        assert f"![{name}]({name}.png)" in report
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results


def test_the_picture_shows_what_there_is(monkeypatch, tmp_path):
    """No bar for a kind without prompts; all harmful ones together if none has a category."""
    pytest.importorskip("matplotlib")
    shown = []
    monkeypatch.setattr(
        "support.report.save_figure",
        lambda fig, path: shown.append([t.get_text() for t in fig.axes[0].get_xticklabels()]),
    )
    rates = {name: [0, 0] for name in (*CATEGORIES, "ordinary", "lookalike")}
    for more in ({"harmful": [5, 5]}, {"harmful": [5, 5], "crime": [5, 5], "ordinary": [0, 3]}):
        picture_of_refusals(tmp_path / "a.png", [{"name": "a", "rates": {**rates, **more}}])
    assert shown == [["harmful"], ["crime", "ordinary"]]


def test_the_report_of_a_run_without_training(tmp_path):
    pytest.importorskip("matplotlib")
    write_report(tmp_path, [result("base", 5)], [], "")
    assert (tmp_path / "curves.png").exists()


def test_write_report_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(tmp_path, [result("base", 5)], RECORDS, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.md", "results.json"]
    assert "![" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_evaluate_keeps_the_order_of_the_prompts(monkeypatch):
    """Prompts of mixed lengths, decoded together, answer as each does alone, token by token."""
    torch.manual_seed(1)
    shape = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
    model = Transformer(read_config({**TINY_LLAMA, **shape, "eos_token_id": 0}))
    chat, prompts = Letters(), ["abcdef", "b", "cdc", "hello", "xy"]
    got = respond(model, chat, prompts, 6)
    with torch.no_grad():
        for prompt, out in zip(prompts, got, strict=True):
            ids, new = chat.prompt(prompt), []
            while len(new) < 6 and 0 not in new:
                new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
            assert out == {"response": chat.decode(new), "tokens": len(new), "ended": new[-1] == 0}
    assert len({out["response"] for out in got}) > 1
    kinds = ["harmful"] + ["ordinary"] * 4
    rows = [{"prompt": p, "category": "crime", "kind": k} for p, k in zip(prompts, kinds)]
    monkeypatch.setattr("evaluate.unread", str.upper)
    whole = evaluate(model, chat, rows, 6, "tiny")
    assert whole["name"] == "tiny" and whole["rates"] == rates(whole["answers"])
    assert [a["prompt"] for a in whole["answers"]] == prompts
    assert [a["kind"] for a in whole["answers"]] == kinds
    assert [a["response"] for a in whole["answers"]] == [g["response"] for g in got]
    assert [a["unread"] for a in whole["answers"]] == [g["response"].upper() for g in got]
