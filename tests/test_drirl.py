"""drirl.py and train.sh as a user meets them: the data stage, the run folder, a whole run."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_LLAMA, make_model, rows

import config
import drirl
from config import Config, changed
from data import CATEGORIES, format_draft, route
from encoder import WordEncoder
from support.files import as_json, write
from support.run import Run, likes_bfloat16

SHIPPED = config.SHIPPED["pool"].read_text(encoding="utf-8").splitlines()


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def by_category(n=None):
    """n shipped demonstrations of each category; None: all."""
    known = [json.loads(line) for line in SHIPPED]
    return {c: [r for r in known if r["category"] == c][:n] for c in CATEGORIES}


def run_of(folder, **values):
    keys = {"run.run": str(folder), "run.encoder": "words"}
    return Run(changed(Config(), keys | {k.replace("_", ".", 1): v for k, v in values.items()}))


def data_stage(folder, pool=None, *more):
    """Status of the data stage, on a pool of these rows."""
    argv = ["data", "--encoder", "words", "--run", folder / "run"]
    if pool is not None:
        rows(folder / "pool.jsonl", *pool)
        argv += ["--pool", folder / "pool.jsonl"]
    return drirl.main([str(a) for a in (*argv, *more)])


# ---------------------------------------------------------------------------- mistakes


def test_mistakes_give_one_clear_line(tmp_path, capsys):
    rows(tmp_path / "p.jsonl", {"prompt": "Hello?"})
    make_model(tmp_path / "lost")
    (tmp_path / "lost/tokenizer.json").unlink()
    for name, content in (("empty", None), ("gpt2", {**TINY_LLAMA, "model_type": "gpt2"})):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "config.json").write_text(json.dumps(content))
    prompts, r = ["--prompts", tmp_path / "p.jsonl"], ["--run", tmp_path / "r"]
    order = "run data, sft, irl, grpo, baseline, eval in this order"
    cases = [
        (["eval", "--model", tmp_path / "nowhere", *prompts], "is no model folder"),
        (["eval", "--model", tmp_path / "empty", *prompts], "has no config.json"),
        (["eval", "--model", tmp_path / "gpt2", *prompts], "unsupported architecture 'gpt2'"),
        (["eval", "--model", tmp_path / "lost", *prompts], "lost/tokenizer.json: No such file"),
        (["eval", "--model", tmp_path / "empty", "--prompts", tmp_path / "no.csv"], "cannot read"),
        (["irl", *r], order),
        (["baseline", *r], order),
        (["data", *r, "--encoder", "words", "--per-category", "80"], "and --generate true"),
        (["data", *r, "--encoder", tmp_path / "empty"], "empty is no encoder folder"),
    ]
    for args, text in cases:
        assert drirl.main([str(a) for a in args]) == 2, args
        err = capsys.readouterr().err.strip()
        assert err.startswith("drirl: ") and text in err and "\n" not in err, (args, err)
    assert not (tmp_path / "r").exists()


def test_a_wrong_flag_from_the_shell():
    command = [sys.executable, str(ROOT / "drirl.py"), "sft", "--learning-rate", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("drirl: unrecognized arguments: --learning-rate 1")


# ---------------------------------------------------------------------------- the data stage


def test_the_data_stage(tmp_path, capsys):
    """The shipped pool: a table, 72 of each category, and the same bytes again."""
    assert data_stage(tmp_path) == 0
    said, path = capsys.readouterr().out, tmp_path / "run/data/balanced.jsonl"
    assert "| before | 262 | 128 | 585 | 102 | 72 | 158 | 88 | 1395 | 8.12 |" in said
    assert "| after | 72 | 72 | 72 | 72 | 72 | 72 | 72 | 504 | 1.00 | 1.000 |" in said
    balanced, first = read_lines(path), path.read_bytes()
    assert Counter(r["category"] for r in balanced) == {c: 72 for c in CATEGORIES}
    assert len({r["prompt"] for r in balanced}) == 504
    assert read_json(tmp_path / "run/data/report.json")["after"]["imbalance"] == 1
    assert data_stage(tmp_path) == 0 and path.read_bytes() == first


def test_the_data_stage_routes_what_has_no_category(tmp_path, capsys, monkeypatch):
    """By the whole shipped pool's centroids."""
    seen = []
    monkeypatch.setattr(drirl.data, "route", lambda *a: seen.append(a) or route(*a))
    pool = [r for mine in by_category(4).values() for r in mine]
    for r in pool[::4]:
        del r["category"]
    assert data_stage(tmp_path, [*pool, "no row"], "--per-category", "3") == 2
    assert "pool.jsonl:29: want an object" in capsys.readouterr().err
    assert data_stage(tmp_path, pool, "--per-category", "3") == 0
    said = capsys.readouterr().out
    assert (
        "7 prompts had no category" in said and "| after | 3 | 3 | 3 | 3 | 3 | 3 | 3 | 21 |" in said
    )
    assert read_json(tmp_path / "run/data/report.json")["routed"] == 7
    ((_, known, names),), shipped = seen, [json.loads(line) for line in SHIPPED]
    assert names == [r["category"] for r in shipped]
    torch.testing.assert_close(known, WordEncoder().embed([r["prompt"] for r in shipped]))


def test_duplicates_are_no_demonstrations(tmp_path, capsys):
    pool = [r for mine in by_category(3).values() for r in mine]
    louder = [{**r, "prompt": r["prompt"].upper() + " !"} for r in pool]
    assert data_stage(tmp_path, louder + pool, "--per-category", "3") == 0
    said = capsys.readouterr().out
    assert "42 rows, 0 helpful ones left out, 21 duplicates dropped\n21 demonstrations" in said
    same = [r for r in pool[::3] for _ in range(5)]
    assert data_stage(tmp_path, same, "--per-category", "3") == 2
    assert "insult (2 missing)" in capsys.readouterr().err


@pytest.fixture
def scripted(monkeypatch):
    """A model that answers the shipped pool's prompts as the pool does.

    Returns what `balance`, `fill` and `generate` are given.
    """
    known = [r for mine in by_category().values() for r in mine]
    answers = {r["prompt"]: format_draft(r["draft"], r["answer"]) for r in known}
    chat = SimpleNamespace(prompt=lambda text: text, decode=lambda text: text, eos=())
    chat.check = lambda *a: None
    seen, balance, fill = {}, drirl.data.balance, drirl.introspect.fill

    def generate(model, turns, samples, max_new_tokens, temperature, **k):
        seen["generate"] = max_new_tokens, temperature
        return [answers.get(t.rpartition("Request: ")[2], "no form") for t in turns]

    def watched_balance(rows, n, vectors, seed):
        seen["balance"] = rows, vectors
        return balance(rows, n, vectors, seed)

    def watched_fill(model, chat, rows, vectors, *a):
        seen["fill"] = rows, vectors
        return fill(model, chat, rows, vectors, *a)

    monkeypatch.setattr(Run, "load", lambda *a: None)
    monkeypatch.setattr(Run, "chat", lambda *a: chat)
    monkeypatch.setattr(drirl.introspect, "generate", generate)
    monkeypatch.setattr(drirl.data, "balance", watched_balance)
    monkeypatch.setattr(drirl.introspect, "fill", watched_fill)
    return seen


def test_the_data_stage_generates(tmp_path, capsys, scripted):
    """Two categories lack demonstrations and have prompts; the model writes them.

    Each stands beside its own prompt's embedding.
    """
    by, short = by_category(5), ("crime", "ethics")
    pool = [{"prompt": "help", "category": "helpful", "draft": ["say yes"], "answer": "Yes."}]
    pool += [{k: r[k] for k in ("prompt", "category")} for c in short for r in by[c][1:]]
    pool += [r for c, mine in by.items() for r in mine[: 1 if c in short else 5]]
    pool += [{"prompt": "unknown to the model", "category": "crime"}]
    assert data_stage(tmp_path, pool, "--per-category", "4") == 2
    assert "crime (3 missing), ethics (3 missing)" in capsys.readouterr().err
    assert not (tmp_path / "run/config.json").exists()
    assert data_stage(tmp_path, pool, "--per-category", "4", "--generate", "true") == 0
    said, folder = capsys.readouterr().out, tmp_path / "run/data"
    assert "37 rows, 1 helpful ones left out, 0 duplicates dropped\n" in said
    assert "27 demonstrations, 9 prompts without a draft" in said
    assert "| before | 5 | 5 | 1 | 5 | 5 | 5 | 1 | 27 |" in said
    assert "| after | 4 | 4 | 4 | 4 | 4 | 4 | 4 | 28 |" in said
    report = read_json(folder / "report.json")["generated"]
    assert set(report) == set(short)
    for c, n in report.items():
        assert n["kept"] >= 3 and n["asked"] == n["kept"] + n["form"]
        faults = f"form {n['form']}, length 0, draft 0, compliance 0, copy 0, duplicate 0"
        assert f"generated for {c}: asked {n['asked']}, kept {n['kept']}, {faults}\n" in said
    made, balanced = (read_lines(folder / f"{n}.jsonl") for n in ("generated", "balanced"))
    assert len(made) == sum(n["kept"] for n in report.values())
    assert all(r["generated"] for r in made)
    chosen = [r for r in balanced if r.get("generated")]
    assert chosen == [r for r in made if r in balanced] and len(chosen) >= 6
    told = {key: f.metadata["help"] for key, f, _ in config.settings()}  # flags don't reach it
    for key, value in zip(("run.max_new_tokens", "run.temperature"), scripted["generate"]):
        assert f"--generate true: {value})" in told[key]
    for name, n in (("fill", 36), ("balance", 27 + len(made))):
        given, vectors = scripted[name]
        prompts = [r["prompt"] for r in given]
        assert len(given) == n and "help" not in prompts
        assert torch.equal(vectors, WordEncoder().embed(prompts))


def test_a_failed_data_stage_keeps_the_folder_and_what_was_generated(tmp_path, capsys, scripted):
    by, run = by_category(3), tmp_path / "run"
    good = [r for mine in by.values() for r in mine]
    assert data_stage(tmp_path, good, "--per-category", "3") == 0
    names = ("config.json", "data/balanced.jsonl", "data/report.json")
    before = {name: (run / name).read_bytes() for name in names}
    short = [r for r in good if r not in by["crime"][1:]]
    short += [{k: by["crime"][1][k] for k in ("prompt", "category")}]
    assert data_stage(tmp_path, short, "--per-category", "3", "--generate", "true") == 2
    assert "crime (1 missing)" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in names} == before
    want = {k: by["crime"][1][k] for k in ("prompt", "category", "draft", "answer")}
    assert read_lines(run / "data/generated.jsonl") == [{**want, "generated": True}]


# ---------------------------------------------------------------------------- the run folder


def test_a_stage_clears_its_own_and_later_records(tmp_path):
    run = run_of(tmp_path)
    for stage in ("sft", "irl", "grpo", "irl"):
        run.log(stage=stage, step=1)
    with run.work("irl", []) as loop:
        loop.log(stage="irl", step=2)
    kept = [{"stage": "sft", "step": 1}, {"stage": "irl", "step": 2}]
    assert read_lines(tmp_path / "metrics.jsonl") == kept


def test_numbers_that_are_not_finite_are_null_in_files(tmp_path):
    run = run_of(tmp_path)
    run.log(stage="sft", step=1, loss=float("nan"), alpha=[1.0, float("inf")])
    write({tmp_path / "report.json": as_json({"entropy": float("-inf")})})
    assert read_lines(tmp_path / "metrics.jsonl")[0] == {
        "stage": "sft", "step": 1, "loss": None, "alpha": [1.0, None]
    }  # fmt: skip
    assert read_json(tmp_path / "report.json") == {"entropy": None}
    path, old = tmp_path / "metrics.jsonl", '{"stage": "sft", "step": 1, "loss": NaN}'
    path.write_text(old + "\n")
    run.begin("irl")
    assert path.read_text() == old.replace("NaN", "null") + "\n"
    assert drirl.as_lines([{"prompt": "é", "answer": float("inf")}]) == (
        '{"prompt": "é", "answer": null}\n'
    )


def test_what_was_read_as_what_is_said_once(tmp_path, capsys, monkeypatch):
    """Of the user's own files: by the data stage, and by what eval and all look at first."""
    pool = [r for mine in by_category(3).values() for r in mine]
    said = (
        f"{tmp_path / 'pool.jsonl'}: 21 rows; prompt from 'prompt'; kind from 'category': 21 harm"
    )
    for n in (1, 0):
        assert data_stage(tmp_path, pool, "--per-category", "3") == 0
        assert capsys.readouterr().out.count(said) == n
    prompts, benign = tmp_path / "p.jsonl", tmp_path / "b.jsonl"
    rows(prompts, {"Prompt": "p", "kind": "look-alike"}, {"Prompt": "q", "is_safe": 0})
    rows(benign, *({**r, "category": "safe"} for r in pool))
    run = run_of(tmp_path, run_prompts=str(prompts), run_benign=str(benign))
    chat = SimpleNamespace(check=lambda *a: None)
    monkeypatch.setattr(Run, "base", lambda self: tmp_path)
    monkeypatch.setattr(Run, "chat", lambda *a: chat)
    monkeypatch.setattr("support.run.open_model", lambda folder: None)
    monkeypatch.setattr(drirl, "ORDER", ())
    for _ in range(2):
        drirl.stage_all(run)
    labels = "prompt from 'Prompt'; kind from 'kind', 'is_safe': 1 lookalike, 1 harmful"
    assert [line for line in capsys.readouterr().out.splitlines() if " rows; " in line] == [
        f"{prompts}: 2 rows; {labels}",
        f"{benign}: 21 rows; prompt from 'prompt'; kind from 'category': 21 ordinary",
    ]
    run_of(tmp_path).prompts([])
    rows(prompts, {"prompt": "another"})
    monkeypatch.undo()
    with pytest.raises(config.UserError):  # a mistake is one line
        run.prompts([tmp_path / "no model"])
    assert capsys.readouterr().out == ""


def test_all_estimates_its_time(tmp_path, capsys, monkeypatch):
    """SFT took 312 seconds, 21% of the recipe laptop: 1,486 s. Nothing is said without a recipe."""
    monkeypatch.setattr(drirl, "timed", lambda name, run: setattr(run, "seconds", 312.0))
    monkeypatch.setattr(drirl, "ORDER", ("data", "sft", "irl"))
    monkeypatch.setattr(Run, "prompts", lambda *a: ([], [None]))
    monkeypatch.setattr(Run, "demonstrations", lambda *a: None)
    for recipe in ("laptop", ""):
        drirl.stage_all(run_of(tmp_path, run_recipe=recipe, run_encoder="words"))
        said = capsys.readouterr().out
        assert said.count("[all]") == said.count("[all] about 25 minutes") == (recipe == "laptop")


def test_a_finished_stage_leaves_its_record(tmp_path, capsys):
    """done/STAGE.json: settings with digests of the input, code, seconds."""
    assert data_stage(tmp_path) == 0
    run = run_of(tmp_path / "run", sft_steps=3)
    with run.work("sft", []):
        assert run.done("sft") is None and run.done("data")
    run.finish("sft")
    record = read_json(tmp_path / "run/done/sft.json")
    assert record.keys() == {"settings", "code", "seconds"} and record["seconds"] >= 0
    settings = record["settings"]
    assert settings["--sft-steps"] == 3 and "--run" not in settings
    assert {"text of --pool", "text of --benign", "weights of --model"} <= settings.keys()
    assert run.done("sft") == record and run.times().keys() == {"data", "sft"}
    assert data_stage(tmp_path) == 0 and run.done("sft") is None and run.done("data")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "data", "done"}


def test_other_settings_or_input_are_refused_and_other_code_is_warned_of(tmp_path, capsys):
    run_of(tmp_path).finish("sft")
    run_of(tmp_path).refuse_others()
    assert capsys.readouterr().out == ""
    path = tmp_path / "done/sft.json"
    path.write_text(json.dumps({**read_json(path), "code": "0" * 12}))
    run_of(tmp_path).refuse_others()
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and "sft: done by other code" in said
    free = {"grpo_tokens_per_batch": 9, "run_rival": True}
    run_of(tmp_path, run_recipe="laptop", **free).refuse_others()
    rows(tmp_path / "p.jsonl", {"prompt": "Hello?"})
    for other, words in (
        ({"irl_epochs": 7}, "--irl-epochs 2 there, 7 here"),
        ({"run_prompts": str(tmp_path / "p.jsonl")}, "text of --prompts"),
    ):
        with pytest.raises(config.UserError, match=words):
            run_of(tmp_path, **other).refuse_others()
        run_of(tmp_path, **other, run_resume=False).refuse_others()


@pytest.mark.parametrize("device, current", [("cuda", []), ("cuda:1", [1])])
def test_a_numbered_gpu_becomes_the_current_one(monkeypatch, device, current):
    """A CUDA graph is recorded there. torch.cuda.set_device refuses a device without a number."""
    found = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    run = Run(changed(Config(), {"run.device": device, "run.dtype": "fp32"}))
    assert found == current and run.device == torch.device(device)


def test_several_processes_share_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("support.parallel.start", lambda kind: None)
    monkeypatch.setattr("support.parallel.world", lambda: 2)
    with pytest.raises(config.UserError, match="--device cuda:1: all processes on one"):
        Run(changed(Config(), {"run.device": "cuda:1", "run.dtype": "fp32"}))


@pytest.mark.parametrize("seconds, steps", [((30.0, 20.0, 40.0), 20), ((30.0, 0.0, 0.1), 1)])
def test_the_baseline_takes_as_long_as_irl_and_grpo(monkeypatch, tmp_path, seconds, steps):
    """10 steps in 30 seconds; irl and grpo took 60: 20 steps. At least one."""
    trained, nothing = [], lambda *a: None
    c = config.changed(config.Config(), {"sft.steps": 10})
    parts = {"stage_folder": nothing, "load": nothing, "chat": nothing, "rows": nothing}
    run = SimpleNamespace(c=c, folder=tmp_path, dtype=None, **parts)
    run.work = lambda *a: contextlib.nullcontext()
    monkeypatch.setattr(drirl.sft, "train", lambda a, b, rows, c, *more: trained.append(c.steps))
    monkeypatch.setattr(drirl, "save_model", nothing)
    times = dict(zip(("sft", "irl", "grpo"), seconds))
    drirl.stage_baseline(run, times)
    run.times = lambda: times
    drirl.stage_baseline(run)
    assert trained == [steps, steps]


def test_chat_shows_no_thoughts(monkeypatch, capsys):
    said = {"<think>\nHm.\n</think>\n\nNo:\nhe would mind.": True, "<think>\nLet me": False}
    said |= {"Cut": False, "": True, "</think>": True, "Plain": True}
    given, typed = list(said), ["a", "b", "c", ""]
    monkeypatch.setattr("builtins.input", lambda _: typed.pop(0))
    answer = lambda *_: [{"response": given[0], "ended": said[given.pop(0)]}]
    monkeypatch.setattr(drirl.evaluate, "respond", answer)
    chat, path = SimpleNamespace(check=lambda *_: None), lambda *_: None
    run = SimpleNamespace(base=path, stage_folder=path, load=path, c=Config(), dtype=None)
    run.chat = lambda _: chat
    drirl.stage_chat(run)
    want = ["    base> No:", "          he would mind.", " aligned> (still thinking)"]
    want += ["    base> Cut ...", " aligned> ", "    base> ", " aligned> Plain"]
    assert capsys.readouterr().out.split("\n") == [*want, ""]


def test_a_chat_goes_on_after_a_prompt_that_is_too_long(monkeypatch, capsys):
    def check(rows, *_):
        if rows[0]["prompt"] == "long":
            raise config.UserError("your prompt: too long")

    typed = ["long", "a", ""]
    monkeypatch.setattr("builtins.input", lambda _: typed.pop(0))
    monkeypatch.setattr(drirl.evaluate, "respond", lambda *_: [{"response": "Yes.", "ended": True}])
    path = lambda *_: None
    run = SimpleNamespace(base=path, stage_folder=path, load=path, c=Config(), dtype=None)
    run.chat = lambda _: SimpleNamespace(check=check)
    drirl.stage_chat(run)
    want = ["your prompt: too long", "    base> Yes.", " aligned> Yes."]
    assert capsys.readouterr().out.split("\n") == [*want, ""]


def test_a_stage_wants_those_before_it_done_anew(tmp_path):
    """Once data has run again, what older stages made counts no more."""
    run = run_of(tmp_path)
    for stage, folder in (("data", "data"), ("sft", "sft"), ("irl", "rewards"), ("grpo", "policy")):
        (tmp_path / folder).mkdir()
        run.finish(stage)
    assert [run.stage_folder(x).name for x in ("sft", "rewards", "policy")]
    run.begin("irl")
    assert run.stage_folder("sft").exists()
    for name in ("rewards", "policy"):
        with pytest.raises(config.UserError, match=f"{name}: not done, or not since"):
            run.stage_folder(name)


def test_what_is_taken_from_the_folder(tmp_path):
    """all and tiny begin anew. A stage refuses another recipe than the folder's."""
    saved = {"run": {"recipe": "laptop", "seed": 3}, "grpo": {"lr": 0.5}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    argv = ["--run", str(tmp_path), "--recipe"]
    stages = {**drirl.STAGES, "tiny": None}
    assert drirl.parse(["irl", *argv, "laptop"], stages)[1].run.seed == 3
    for stage in ("all", "tiny"):
        c = drirl.parse([stage, *argv, "gpu"], stages)[1]
        assert (c.run.recipe, c.run.seed, c.grpo.lr) == ("gpu", 0, Config().grpo.lr)
    for had, name in (("laptop", "gpu"), ("laptop", ""), ("", "laptop")):
        (tmp_path / "config.json").write_text(json.dumps({"run": {"recipe": had}}))
        with pytest.raises(config.UserError, match=f"recipe {had or 'none'}: choose another"):
            drirl.parse(["irl", *argv, name], stages)


def test_an_eval_of_other_prompts_is_done_again(tmp_path):
    """It is no reason to refuse the run."""
    rows(tmp_path / "p.jsonl", {"prompt": "Hello?"})
    run = run_of(tmp_path, run_prompts=str(tmp_path / "p.jsonl"))
    run.finish("eval")
    run.refuse_others()
    assert run.done("eval")
    run_of(tmp_path).refuse_others()
    assert run.done("eval") is None


def test_a_models_texts_are_input_too(tmp_path):
    """Another chat template, and everything that was done is of another model."""
    make_model(tmp_path / "m")
    facts = [run_of(tmp_path, run_model=str(tmp_path / "m")).identity]
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages[0].content }}")
    facts.append(run_of(tmp_path, run_model=str(tmp_path / "m")).identity)
    assert {k for k in facts[0] if facts[0][k] != facts[1][k]} == {"weights of --model"}


def test_code_is_files(monkeypatch, tmp_path):
    """A folder in support/, as Jupyter leaves one, is none."""
    (tmp_path / "support/.ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "support/a.py").write_text("1")
    monkeypatch.setattr("support.run.CORPUS", tmp_path / "corpus")
    first = run_of(tmp_path).code
    (tmp_path / "support/a.py").write_text("2")
    assert run_of(tmp_path).code != first


# ---------------------------------------------------------------------------- train.sh


def train_sh(folder, *args):
    """train.sh in a folder that has copies of the scripts, which cd to where they lie."""
    for name in ("train.sh", "setup.sh"):
        (folder / name).write_text((ROOT / name).read_text())
    command, env = (
        ["bash", str(folder / "train.sh"), *args],
        {**os.environ, "PYTHON": sys.executable},
    )
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_a_users_folder_called_tiny_is_not_remade(tmp_path):
    """bash train.sh FOLDER/tiny aligns that folder; only the word tiny makes a model."""
    (tmp_path / "drirl.py").write_text("import sys; print(sys.argv[1:])")
    done = train_sh(tmp_path, "/models/tiny", "--seed", "1")
    want = ["all", "--recipe", "laptop", "--run", "runs/tiny", "--model", "/models/tiny"]
    assert done.stdout == f"{[*want, '--seed', '1']}\n", done.stderr
    assert f"'--run', 'runs/{Path.cwd().name}'" in train_sh(tmp_path, ".").stdout
    (tmp_path / "teach").mkdir()
    (tmp_path / "teach/tiny.py").write_text("import sys; print(sys.argv[1:])")
    assert "--model" not in train_sh(tmp_path, "-h").stdout
    # another seed's leaves the first in peace
    for seed, base in (("--seed 0", "base"), ("--seed 7", "base-7"), ("--seed=7", "base-7")):
        made, used = train_sh(tmp_path, "tiny", *seed.split()).stdout.splitlines()
        assert f"['runs/tiny/{base}'," in made and f"'runs/tiny/{base}'" in used


def test_train_sh_tiny(tmp_path):
    """The whole main job on a model made on the spot: table, pictures, saved policy."""
    folders = ("kernels", "support", "teach", "corpus")
    for name in ("recipes.json", *folders, *(p.name for p in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)
    done = train_sh(tmp_path, "tiny")
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs/tiny"
    results = read_json(run / "results.json")
    names = ["base", "SFT warm start", "DR-IRL from it"]
    assert [r["name"] for r in results] == names
    base, warm = (r["rates"]["harmful"] for r in results[:2])
    assert base[0] <= 0.05 * base[1] and warm[0] > 0.5 * warm[1]
    for r in results:
        assert r["rates"]["harmful"][1] == 461 and r["rates"]["lookalike"][1] == 322
    assert (run / "refusals.png").stat().st_size > 10000 and (run / "curves.png").exists()
    assert "| DR-IRL from it |" in (run / "report.md").read_text()
    stages = {r["stage"] for r in read_lines(run / "metrics.jsonl")}
    assert stages == {"sft", "irl", "grpo"}
    assert {p.stem for p in (run / "done").iterdir()} == {*drirl.ORDER} - {"baseline"}
    assert (run / "policy/tokenizer.json").exists()
    assert len(list((run / "rewards").glob("*.safetensors"))) == 8


@pytest.mark.parametrize("slow, want", [(torch.float32, True), (torch.bfloat16, False)])
def test_dtype_auto_is_the_faster_one(monkeypatch, slow, want):
    class Matrix:
        def __init__(self, dtype):
            self.dtype = dtype

        def __matmul__(self, other):
            time.sleep(0.02 if self.dtype == slow else 0.001)

    monkeypatch.setattr("support.run.torch.ones", lambda *size, dtype: Matrix(dtype))
    assert likes_bfloat16.__wrapped__("cpu") is want
