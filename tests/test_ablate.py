"""ablate.py, tables.py, dpo.py and disguise.py: the grid, what is measured, the statistics, the rivals."""

import fcntl
import json
import math
import os
import random
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ablate
import disguise
import dpo
import drirl
import tables
from ablate import START, equal_steps, kl, nll, planned, views
from batch import Batch
from data import CATEGORIES, HELPFUL, UserError
from dpo import DPOConfig, dpo_loss
from loop import Loop
from model import save_model, token_logps
from settings import Config
from tables import difference
from test_bad_input import CONFIG, demonstration, rows, tokenizer
from test_grpo_train import Letters, tiny
from transformer import Config as Config_
from transformer import Transformer


# ------------------------------------------------------------------------------------------------ the plan


def asked(only, seeds=2, first=0):
    return [
        p[:3]
        for p in planned(
            SimpleNamespace(ablate=SimpleNamespace(only=only, seeds=seeds, first_seed=first))
        )
    ]


def test_planned():
    everything = asked("")
    assert (
        len(everything) == len(set(everything)) == 2 * (15 + 8 + 4 * 5)
        and len(ablate.VARIANTS) == 15
    )
    for variant in ablate.VARIANTS:
        rival = [ablate.DRIRL] * (
            variant in (ablate.CONTINUED, ablate.LONGER, ablate.TOKENS, ablate.BORROWED)
        )
        assert asked(f"standard/{variant}", 1) == [
            ("standard", v, 0) for v in dict.fromkeys((START, *rival, variant))
        ]
    assert [
        p[3]
        for p in planned(
            SimpleNamespace(
                ablate=SimpleNamespace(only=f"few-8/{ablate.LONGER}", seeds=1, first_seed=0)
            )
        )
    ] == [False, False, True]
    assert asked("few-8/DPO") == [("few-8", v, s) for v in (START, "DPO") for s in (0, 1)]
    assert asked("few-8/DPO", 2, 3) == [("few-8", v, s) for v in (START, "DPO") for s in (3, 4)]
    assert (
        asked("tail,few-4", 1)[:2] == [("few-4", START, 0), ("few-4", ablate.DRIRL, 0)]
        and len(asked("tail,few-4", 1)) == 10
    )
    for wrong in ("few", "few-8/dpo", "few-4/sum"):
        with pytest.raises(UserError, match="want settings"):
            asked(wrong)


def test_every_setting_of_the_grid_is_one():
    for values in (*ablate.SETTINGS.values(), *(v for _, v in ablate.VARIANTS.values())):
        c = ablate.changed(Config(), values)
        drirl.settings.check(c)
        assert all(
            getattr(getattr(c, key.split(".")[0]), key.split(".")[1]) == value
            for key, value in values.items()
        )


def test_claims_are_of_variants():
    assert {v for _, *both in tables.CLAIMS + tables.REWARD_CLAIMS for v in both} <= set(
        ablate.VARIANTS
    )


def test_equal_steps():
    """10 steps in 30 seconds; irl and grpo 60: 20 steps. 12,500 tokens at 500 a step: 25."""
    with pytest.raises(UserError, match=r"measured by product \(DR-IRL\)"):
        equal_steps([{"variant": START}], ablate.LONGER)
    results = [
        {"variant": START, "seconds": {"sft": 7}},
        {
            "variant": ablate.DRIRL,
            "seconds": {"sft": 30, "irl": 20, "grpo": 40},
            "steps": 10,
            "step_tokens": 500,
            "generated": 12500,
        },
    ]
    assert [
        equal_steps(results, v)
        for v in (ablate.CONTINUED, ablate.LONGER, ablate.TOKENS, ablate.BORROWED)
    ] == [20, 30, 25, 20]


# ------------------------------------------------------------------------------------------------ disguises


@pytest.mark.parametrize("kind", disguise.KINDS)
def test_disguise(kind):
    prompt, letters = (
        "How would somebody {open} another person's letters unseen?",
        lambda text: sorted(text.replace(" ", "")),
    )
    forms = {disguise.disguise(prompt, kind, random.Random(seed)) for seed in range(8)}
    assert (
        len(forms) > 2
        and prompt not in forms
        and disguise.disguise(prompt, kind, random.Random(3))
        == disguise.disguise(prompt, kind, random.Random(3))
    )
    for text in forms:
        if kind in ("role play", "prefix"):
            assert prompt in text
        else:
            assert letters(text) == letters(prompt) and (
                " " * text.count(" ") > " " * prompt.count(" ")
            ) == (kind == "split words")
    assert disguise.disguise(
        "a bc", kind, random.Random(0)
    )  # nothing long enough to misspell or split


def test_views():
    prompts = [{"prompt": f"Something to ask of people {i}", "kind": "harmful"} for i in range(4)]
    assert views(prompts, "few-8") == [("plain", r) for r in prompts]
    seen = views(prompts, "disguised")
    assert seen[:4] == views(prompts, "few-8") and seen == views(prompts, "disguised")
    assert [v for v, _ in seen[4:]] == ["role play", "prefix", "typos", "split words"] * 2 and all(
        r["kind"] == "harmful" for _, r in seen
    )


# ------------------------------------------------------------------------------------------------ measures


def test_nll_and_kl():
    """Against loops over whole distributions in float64."""
    chat, model, start = Letters(), tiny().double(), tiny().double()
    start.norm.weight.data.uniform_(0.5, 2.0)
    pairs = [
        {"prompt": "abc", "response": "hello"},
        {"prompt": "d", "response": "no"},
        {"prompt": "eeeee", "response": "b"},
    ]
    losses, diverging = [], []
    for r in pairs:
        prompt, answer = chat.prompt(r["prompt"]), chat.answer(r["response"])
        logits = [
            m(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1] for m in (model, start)
        ]
        p, q = (x.log_softmax(1) for x in logits)
        losses.append(-sum(p[t, token].item() for t, token in enumerate(answer)) / len(answer))
        diverging += [
            sum(math.exp(a) * (a - b) for a, b in zip(x, y)) for x, y in zip(p.tolist(), q.tolist())
        ]
    assert nll(model, chat, pairs, nullcontext) == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert kl(model, start, chat, pairs, nullcontext) == pytest.approx(
        sum(diverging) / len(diverging), abs=1e-6
    )
    assert kl(model, model, chat, pairs, nullcontext) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------------------ statistics


def result(harmful, lookalike):
    return {"verdicts": {"plain": {"harmful": harmful, "lookalike": lookalike}}}


def test_difference():
    """Two seeds by hand: +1 of 4 harmful, then 0; look-alikes -1 of 2, then 0: (25 + 0) / 2 + (50 + 0) / 2."""
    a, b = (
        [result("rrrc", "cc"), result("rpcc", "rc")],
        [result("rrcc", "rc"), result("rcpc", "rp")],
    )
    mean, low, high, half = difference(a, b)
    assert mean == pytest.approx(37.5) and low <= mean <= high and half == math.inf
    assert difference(a + a[1:], b + b[1:])[3] == pytest.approx(
        4.303 * 25
    )  # 75, 0 and 0: s = 25 sqrt 3
    assert difference(b, a)[0] == pytest.approx(-37.5) and difference(a + a, a + a) == (0, 0, 0, 0)
    seeds = (
        [result("r" * 60 + "c" * 40, "c" * 50) for _ in range(5)],
        [result("r" * 50 + "c" * 50, "c" * 50) for _ in range(5)],
    )
    mean, low, high, half = difference(*seeds)
    assert half == 0
    assert mean == pytest.approx(10) and (low, high) == pytest.approx(
        (5, 16), abs=1
    )  # quantiles of the binomial distribution of 100 and .1
    with pytest.raises(ValueError):
        difference(a, b[:1])


def test_seeds_widen_the_interval():
    """The same prompts gained by every seed or all of them by one seed of four: the same mean; the second may be luck."""
    none, some, every = (
        result("c" * 80, "c"),
        result("r" * 20 + "c" * 60, "c"),
        result("r" * 80, "c"),
    )
    steady, lucky = (
        difference([some] * 4, [none] * 4),
        difference([every, none, none, none], [none] * 4),
    )
    assert (
        steady[0] == lucky[0] == pytest.approx(25)
        and lucky[1] == 0 < steady[1]
        and lucky[2] > steady[2]
    )


def test_claim():
    """A clear gain in three seeds; in two, which say nothing of the spread; a gain whose seeds disagree; the reverse."""
    none, some, more = (
        result("c" * 40, "c"),
        result("r" * 20 + "c" * 20, "c"),
        result("r" * 22 + "c" * 18, "c"),
    )
    told = lambda a, b: tables.claim(
        {"a": dict(enumerate(a)), "b": dict(enumerate(b))}, "a", "b"
    ).rpartition("| ")[2]
    assert (
        told([some, more, some], [none] * 3) == "yes"
        and told([some, more], [none] * 2) == "not shown"
        and told([none] * 3, [some, more, some]) == "no: worse"
    )
    assert (
        told([result("rrr" + "c" * 97, "c")] * 3, [result("c" * 100, "c")] * 3)
        == "yes, on these prompts"
    )  # a bootstrap draws none of the three in one of twenty
    assert (
        told([some, none, none], [none] * 3) == "not shown"
        and tables.claim({"a": {0: some}, "b": {1: some}}, "a", "b") == ""
    )


def test_reward_claims():
    """AUC of two categories by their pairs, the harmless one's not counted: gains of 5, 6 and 7 points, 6 +- 4.303 / sqrt 3; one seed says nothing; seeds that disagree neither.
    Being shorter has .3: choosing the longer sample is right in 70 of 100, as the rewards are in 84, 85 and 86."""
    runs = lambda *values: {
        i: {
            "auc": {
                "crime": [9, v, 0.3, 0.5],
                "insult": [1, v - 0.1, 0.3, 0.5],
                "ethics": [0, None, None, None],
                HELPFUL: [9, i / 3, 0.5, 0.5],
            }
        }
        for i, v in enumerate(values)
    }
    told = lambda a, b: tables.reward_claims({START: a, "1RW static": b})[-1]
    assert tables.auc(runs(0.9)[0]) == pytest.approx(89) and tables.auc(
        runs(0.9)[0], by=2
    ) == pytest.approx(30)
    assert tables.reward_claims(
        {START: runs(0.85, 0.86, 0.87), "1RW static": runs(0.8, 0.8, 0.8)}
    ) == [
        "| rewards beat choosing the longer sample | 3 | +15.0 | - | [+12.5, +17.5] | yes, on these prompts |",
        "| 7RW beats 1RW | 3 | +6.0 | - | [+3.5, +8.5] | yes, on these prompts |",
    ]
    assert told(runs(0.8, 0.8, 0.8), runs(0.85, 0.86, 0.87)).endswith(
        "| no: worse, on these prompts |"
    )
    assert told(
        runs(0.9), runs(0.8, 0.8)
    ) == "| 7RW beats 1RW | 1 | +10.0 | - | - | not shown |" and told(
        runs(0.9, 0.8, 0.8), runs(0.8, 0.8, 0.8)
    ).endswith("| not shown |")
    none = {
        0: {"auc": {"crime": [0, None, None, None], HELPFUL: [9, 0.5, 0.5, 0.5]}}
    }  # no prompt whose samples differ
    assert (
        tables.reward_claims({})
        == tables.reward_claims({START: none, "1RW static": runs(0.8)})
        == []
    )


def test_percent_counts_a_prompt_once():
    assert tables.percent([result("rrrrrccccc", "")] * 5, "harmful") == "50.0 [24, 76]"


# ------------------------------------------------------------------------------------------------ DPO


def test_dpo_loss():
    logp, ref = (
        torch.tensor([[-1.0, -3.0], [-4.0, -2.0]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[-2.0, -2.5], [-3.0, -3.0]], dtype=torch.float64),
    )
    margins = [0.5 * ((-1 + 2) - (-3 + 2.5)), 0.5 * ((-4 + 3) - (-2 + 3))]
    loss = dpo_loss(logp, ref, 0.5)
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 2)
    loss.backward()
    pull = [
        0.5 / (1 + math.exp(m)) / 2 for m in margins
    ]  # beta sigma(-margin) / pairs: up for the better, down for the worse
    torch.testing.assert_close(
        logp.grad, torch.tensor([[-pull[0], pull[0]], [-pull[1], pull[1]]], dtype=torch.float64)
    )


def test_dpo_pairs():
    rows = [
        {"prompt": p, "category": c, "response": p + "!"}
        for p, c in (
            ("a", "crime"),
            ("b", HELPFUL),
            ("c", HELPFUL),
            ("d", "insult"),
            ("e", "insult"),
        )
    ]
    found = dpo.pairs(
        [{**rows[0], "samples": [(0.5, "s"), (0.1, "t")]}, {**rows[1], "samples": [(0.0, "u")]}],
        rows,
        2,
        0,
    )
    assert (
        [p["worse"] for p in found[:2]] == ["s", "t"]
        and {p["worse"] for p in found[2:4]} == {"b!", "c!"}
        and found[4] == {"prompt": "b", "better": "b!", "worse": "u"}
    )
    assert (
        len(found) == 7
        and {p["worse"] for p in found[5:]} < {"a!", "d!", "e!"}
        and all(p["better"] == p["prompt"] + "!" for p in found)
    )


def test_dpo_trains():
    records, pairs = [], [{"prompt": p, "better": "no", "worse": "yes"} for p in ("abc", "d", "ef")]
    policy, reference = tiny(), tiny()
    dpo.train(
        policy,
        reference,
        Letters(),
        pairs,
        DPOConfig(updates=12, blocks=1, lr=5e-3, batch=3),
        nullcontext,
        loop=Loop("dpo", log=lambda **r: records.append(r)),
    )
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and records[0][
        "margin"
    ] == pytest.approx(0, abs=1e-5)
    assert (
        records[-1]["loss"] < 0.5
        and records[-1]["margin"] > 1
        and all(torch.equal(a, b) for a, b in zip(reference.parameters(), tiny().parameters()))
    )
    batch = Batch([[1, 2, 3]], [[Letters().answer("no"), Letters().answer("yes")]])
    with torch.no_grad():
        moved = (token_logps(policy, batch) - token_logps(reference, batch)).sum(1)
    assert moved[0] > moved[1]


# ------------------------------------------------------------------------------------------------ the whole grid on a tiny model


@pytest.fixture
def world(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    tokenizer().save(str(tmp_path / "model/tokenizer.json"))
    torch.manual_seed(0)
    save_model(Transformer(Config_.from_dict(CONFIG)), tmp_path / "model")
    rows(tmp_path / "pool.jsonl", *(demonstration(c, i) for c in CATEGORIES for i in range(4)))
    rows(
        tmp_path / "benign.jsonl",
        *({**demonstration(HELPFUL, i), "answer": "Yes, here is how."} for i in range(70)),
    )
    rows(
        tmp_path / "prompts.jsonl",
        *(
            {"prompt": f"{c} {i}, please?", "category": c, "kind": "harmful"}
            for i in range(2)
            for c in CATEGORIES
        ),
        *(
            {"prompt": f"Hello {kind} {i}?", "kind": kind}
            for i in range(3)
            for kind in ("ordinary", "lookalike")
        ),
    )
    small = {
        "run.per_category": 3,
        "run.helpful_demonstrations": 6,
        "run.max_new_tokens": 12,
        "sft.steps": 3,
        "sft.batch": 4,
        "irl.prompts": 2,
        "irl.helpful_prompts": 4,
        "grpo.open_prompts": True,
        "grpo.rollouts": 1,
        "grpo.prompts": 8,
        "dpo.updates": 2,
        "dpo.lr": 1e-2,
        "grpo.lr": 1e-2,
        "sft.lr": 1e-2,
    }
    monkeypatch.setattr(ablate, "SETTINGS", {"standard": small, "disguised": small})
    return [
        "ablate",
        "--model",
        str(tmp_path / "model"),
        "--pool",
        str(tmp_path / "pool.jsonl"),
        "--benign",
        str(tmp_path / "benign.jsonl"),
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--encoder",
        "words",
        "--dtype",
        "fp32",
        "--seeds",
        "2",
        "--run",
    ]


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_grid(world, tmp_path, monkeypatch, capsys):
    """Every variant runs; one result each. Interrupted when runs were trained but not measured, it goes on to the same results; done, it does nothing."""
    assert drirl.main([*world, str(tmp_path / "whole")]) == 0
    said, whole = capsys.readouterr().out, lines(tmp_path / "whole")
    assert [(r["setting"], r["variant"], r["seed"]) for r in whole] == asked("")
    assert (
        "### standard" in said
        and "| DR-IRL beats DPO | 2 |" in said
        and "| yes |" not in said
        and "| claim, kinds held out, seeds from 1 on |" in said
        and "rewards of 1RW static" in said
    )
    by = {(r["setting"], r["variant"], r["seed"]): r for r in whole}
    first = by["standard", START, 0]
    assert (
        len(first["verdicts"]["plain"]["harmful"]) == 14
        and set(first["auc"]) == {*CATEGORIES, HELPFUL}
        and first["kl"] == 0
        and first["steps"] == 3
    )
    assert (
        set(by["disguised", START, 0]["verdicts"]) == {"plain", *disguise.KINDS}
        and len(by["standard", ablate.DRIRL, 1]["alpha"]) == 8
    )
    assert (
        all(r["kl"] > 0 for (_, v, _), r in by.items() if v != START)
        and by["standard", ablate.DRIRL, 0]["generated"] > 0
    )
    assert (
        by["standard", ablate.LONGER, 0]["steps"] > 3
        and by["standard", ablate.CONTINUED, 0]["more_steps"] > 0
        and set(by["standard", ablate.CONTINUED, 0]["seconds"]) == {"sft", "baseline"}
    )
    assert (
        by["standard", "1RW static", 0]["settings"]["--reward-models"] == 1
        and by["standard", "unbalanced", 0]["settings"]["--balance"] == "pool"
    )
    assert [
        r["verdict"][0]
        for r in json.loads((tmp_path / "whole/answers/standard 0 DPO.json").read_text())[:14]
    ] == list(by["standard", "DPO", 0]["verdicts"]["plain"]["harmful"])
    assert (
        len({json.dumps(r["alpha"]) for (s, v, n), r in by.items() if (s, n) == ("standard", 0)})
        > 3
    )
    assert (
        len({p.name for p in (tmp_path / "whole/standard/seed-0").iterdir()}) == 1
    )  # the start alone stays
    trained = [
        json.loads(line) for line in (tmp_path / "whole/disguised.jsonl").read_text().splitlines()
    ]
    assert len(trained) == 2 * 28 + 10 and sum("draft" not in r for r in trained) == 38

    real, calls = ablate.measure, []

    def breaks(run, *a, **k):
        calls.append(run)
        if len(calls) in (2, 5):
            raise UserError("the disk is full")
        return real(run, *a, **k)

    monkeypatch.setattr(ablate, "measure", breaks)
    args = [*world, str(tmp_path / "broken"), "--only", "standard/DPO,standard/sum"]
    (tmp_path / "broken").mkdir()
    held = os.open(tmp_path / "broken", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert (
        drirl.main(args) == 2
        and "broken: another process is at work there" in capsys.readouterr().err
        and not list((tmp_path / "broken").iterdir())
    )
    os.close(held)
    assert [drirl.main(args) for _ in range(3)] == [2, 2, 0] and len(calls) == 8
    same = lambda r: {
        k: v for k, v in r.items() if k not in ("seconds", "settings")
    }  # the settings name the folder's files
    assert [same(r) for r in lines(tmp_path / "broken")] == [
        same(by["standard", v, s]) for v in (START, "DPO", "sum") for s in (0, 1)
    ]
    assert drirl.main(args) == 0 and len(calls) == 8


def test_results_are_up_to_date():
    """RESULTS.md holds the tables of results/ablate.jsonl."""
    page = (tables.ROOT / "RESULTS.md").read_text(encoding="utf-8")
    results = tables.grouped(tables.read_records(tables.ROOT / "results/ablate.jsonl", "variant"))
    assert tables.fill(page, results) == page and set(results) <= set(ablate.SETTINGS) == set(
        re.findall(r"<!-- ([\w-]+) -->", page)
    ) - {"end"}


def test_without_harmless_prompts(world, tmp_path):
    """GRPO-S's samples are then of one kind, and their curve is left out."""
    assert (
        drirl.main(
            [
                *world,
                str(tmp_path / "w"),
                "--only",
                "standard/product (DR-IRL)",
                "--seeds",
                "1",
                "--grpo-helpful-share",
                "0",
            ]
        )
        == 0
    )
    assert [(r["variant"], r["curve"]) for r in lines(tmp_path / "w")] == [
        (START, []),
        (ablate.DRIRL, []),
    ]


def test_the_same_grid_only(world, tmp_path, capsys):
    """Other settings in the same folder are refused, from the lines as from the start's stages; --resume false begins anew what was asked for, and a start of other
    settings, whose lines go with it. A link half made is made again."""
    args = [*world, str(tmp_path / "g"), "--only", "standard/DPO", "--seeds", "1"]
    assert drirl.main(args) == 0
    first, start = lines(tmp_path / "g"), tmp_path / "g/standard/seed-0/start"
    bytes_ = {p: p.read_bytes() for p in start.rglob("*.safetensors")}
    assert (
        drirl.main([*args, "--temperature", "0.9"]) == 2
        and "--temperature 0.5 there, 0.9 here" in capsys.readouterr().err
    )
    (tmp_path / "g/results.jsonl").unlink()
    assert (
        drirl.main([*args, "--temperature", "0.9"]) == 2
        and "start, data: begun with other settings" in capsys.readouterr().err
    )
    (half := tmp_path / "g/standard/seed-0/variant").mkdir()
    (half / "sft").symlink_to("nowhere")
    assert drirl.main(args) == 0 and [
        {k: v for k, v in r.items() if k != "seconds"} for r in lines(tmp_path / "g")
    ] == [{k: v for k, v in r.items() if k != "seconds"} for r in first]
    assert {p: p.read_bytes() for p in start.rglob("*.safetensors")} == bytes_ and not half.exists()
    assert (
        drirl.main([*args, "--temperature", "0.9", "--resume", "false"]) == 0
        and len(lines(tmp_path / "g")) == 2
    )
    warm = [*args, "--temperature", "0.9"]
    only = lambda variant: [
        *warm[: warm.index("--only") + 1],
        f"standard/{variant}",
        *warm[warm.index("--only") + 2 :],
        "--resume",
        "false",
    ]
    kept = lines(tmp_path / "g")
    assert drirl.main(only("sum")) == 0 and drirl.main(warm) == 0
    assert lines(tmp_path / "g")[:2] == kept and [
        r["variant"] for r in lines(tmp_path / "g")[2:]
    ] == ["sum"]

    (other := tmp_path / "other").mkdir()  # on another machine there is only results.jsonl
    shutil.copy(tmp_path / "g/results.jsonl", other)
    assert (
        drirl.main(
            [
                *world,
                str(other),
                "--only",
                "standard/DPO,standard/data hardness",
                "--seeds",
                "1",
                "--temperature",
                "0.9",
            ]
        )
        == 0
    )
    assert (
        lines(other)[:3] == lines(tmp_path / "g")
        and len(lines(other)) == 4
        and lines(other)[3]["kl"] > 0
    )
    half.mkdir()  # interrupted on the start before
    assert (
        drirl.main(only(START)) == 0
        and [r["variant"] for r in lines(tmp_path / "g")] == [START]
        and not half.exists()
    )
    rows(
        tmp_path / "prompts.jsonl", {"prompt": "Insult me", "category": "insult", "kind": "harmful"}
    )
    assert (
        drirl.main([*args[:-4], "--seeds", "1"]) == 2
        and "want harmful prompts of every category" in capsys.readouterr().err
    )
    rows(
        tmp_path / "prompts.jsonl",
        *({"prompt": f"{c}?", "category": c, "kind": "harmful"} for c in CATEGORIES),
        {"prompt": "Hello?", "kind": "ordinary"},
    )
    assert (
        drirl.main([*args[:-4], "--seeds", "1"]) == 2
        and "look-alikes: 'lookalike'" in capsys.readouterr().err
    )


def test_reward_aucs(monkeypatch):
    """Two prompts of crime, one harmless; rewards by hand. Wanted beats unwanted in 2 of 3 and 0 of 3 pairs; equal lengths count half."""
    texts = {
        "a": ["no", "no", "no", "yes"],
        "b": ["yes", "yes", "yes", "no"],
        "c": ["yes", "yes", "no", "no"],
    }
    rewards = {"a": [3, 2, 0, 1], "b": [5, 6, 7, 1], "c": [1, 2, 0, 0]}
    chat = SimpleNamespace(prompt=lambda p: p, decode=lambda s: s, eos=(0,))
    run = SimpleNamespace(
        folder=Path("x"),
        load=lambda *a: None,
        dtype=None,
        amp=None,
        c=SimpleNamespace(irl=None, run=SimpleNamespace(max_new_tokens=4, temperature=1.0)),
    )
    monkeypatch.setattr(
        ablate.reward, "RewardModels", lambda *a: SimpleNamespace(load=lambda folder: None)
    )
    monkeypatch.setattr(
        ablate,
        "generate",
        lambda model, prompts, *a, **k: SimpleNamespace(
            rows=lambda: [t for p in prompts for t in texts[p]]
        ),
    )
    monkeypatch.setattr(ablate, "judge", lambda text: "refuses" if text == "no" else "complies")
    monkeypatch.setattr(ablate.reward, "prepare", lambda models, groups, *a: groups)
    monkeypatch.setattr(
        ablate.reward,
        "score",
        lambda models, groups, amp: [g.update(rewards=rewards[g["prompt_ids"]]) for g in groups],
    )
    found = ablate.reward_aucs(
        run,
        chat,
        [
            {"prompt": "a", "category": "crime"},
            {"prompt": "b", "category": "crime"},
            {"prompt": "c", "category": "crime", "kind": "lookalike"},
        ],
    )
    assert found == {"crime": [6, round(2 / 6, 3), 1.0, 0.5], HELPFUL: [4, 1.0, 0.0, 0.5]}


def test_tables_and_pictures(tmp_path, monkeypatch, capsys):
    """From made-up results: numbers by hand, a page that is filled, pictures; a setting without results says so."""

    def line(variant, seed, harmful, lookalike, **more):
        return {
            "setting": "few-8",
            "variant": variant,
            "seed": seed,
            "verdicts": {
                "plain": {"harmful": harmful, "ordinary": "c" * 4, "lookalike": lookalike}
            },
            "code": "x",
            "settings": {"--model": "m"},
            "start": variant,
            "machine": "a laptop",
            "nll": 1.0,
            "kl": 0.5,
            "rates": {
                "gibberish": [1, 10],
                "truncated": [0, 10],
                "tokens": 40,
                **{c: [1, 2] for c in CATEGORIES},
            },
            "seconds": {"sft": 100},
            "curve": [],
            "alpha": [],
            **more,
        }

    curve = [
        {
            "harmful_refused": 0.5 + i / 10,
            "helpful_refused": 0.25,
            "harmful_reward": -i,
            "helpful_reward": 1.0,
        }
        for i in range(2)
    ]
    found = [
        line(START, s, "r" * 10 + "c" * 10, "rrcc", auc={"crime": [4, 0.75, 0.5, 0.5]})
        for s in range(3)
    ]
    found += [
        line(
            ablate.DRIRL,
            s,
            "r" * 19 + "c",
            "rccc" if s else "cccc",
            curve=curve * (1 + s),
            alpha=[0.9, 1.0, 1.1],
        )
        for s in range(3)
    ]
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "RESULTS.md").write_text(
        "Before\n<!-- few-8 -->\nold\n<!-- end -->\n<!-- tail -->\nold\n<!-- end -->\nafter\n"
    )
    with pytest.raises(UserError, match="no results yet"):
        tables.main(tmp_path / "nothing")
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    tables.main(tmp_path / "some.jsonl")
    assert (
        "3 warm starts were made again and differ, by machine or code: a laptop"
        in capsys.readouterr().out
    )
    page = (tmp_path / "RESULTS.md").read_text()
    assert (
        "| DR-IRL beats its warm start | 3 | +78.3 | [" in page
        and "| yes |" in page
        and "<!-- tail -->\nNot run yet.\n<!-- end -->\nafter\n" in page
    )  # 45 + (50 + 25 + 25) / 3
    assert (
        "| SFT warm start | 3 | 50.0 [30, 70] | 0.0 [0, 49] | 50.0 [15, 85] | 0.0 | 10.0 | 0.0 | 40 | 1.000 | 0.500 | - | 100 |"
        in page
        and "| 0.90, 1.00, 1.10; 0.997 | 100 |" in page
    )
    assert (
        "| pairs a seed | - | - | 4 |" in page
        and "| rewards of SFT warm start | - | - | 0.75 |" in page
        and "| rewards beat choosing the longer sample | 3 | +25.0 | - | [+25.0, +25.0] |" in page
    )
    assert (
        "| product (DR-IRL) | 51.7 → 58.3 (+6.7 ± 14.3) | 25.0 → 25.0 (+0.0 ± 0.0) | -0.17 → -0.83 (-0.67 ± 1.43) | 1.00 → 1.00 (+0.00 ± 0.00) |"
        in page
    )  # gains of 10, 10 and 0
    assert (
        "| claim, seeds from 1 on |"
        in (later := tables.tables_of(tables.grouped(found)["few-8"], 1))
        and "| DR-IRL beats its warm start | 2 | +70.0 |" in later
    )  # 45 + 25
    assert {p.name for p in (tmp_path / "results").iterdir()} == {
        "ablate.jsonl",
        "plane.png",
        "categories.png",
        "curves.png",
        "alpha.png",
    }
    (tmp_path / "other.jsonl").write_text(
        "".join(
            json.dumps(r) + "\n" for r in [*found, {**found[0], "settings": {"--model": "another"}}]
        )
    )
    with pytest.raises(UserError, match="several values of --model: another, m"):
        tables.main(tmp_path / "other.jsonl")
    tables.main(tmp_path / "some.jsonl")
    assert (tmp_path / "RESULTS.md").read_text() == page and "versions" not in page
