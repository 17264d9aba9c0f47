"""Bad input ends in one line that says what to mend, in status 2, and in nothing written.

A full disk leaves what was there.
"""

import ast
import errno
import json
import os
import random
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WORLD, demonstration, flags, make_world, rows
from safetensors.torch import load_file, save_file
from test_files import mutate, mutate_json

import drirl
from config import UserError
from data import CATEGORIES, HELPFUL
from support import files, hf, loaders, resume
from support.chat import load_chat

WEIGHTS, SETTINGS = "model/model.safetensors", "run/config.json"
FLAGS = f"--run W/run {WORLD}" + (
    " --recipe laptop --encoder words --per-category 2 --max-new-tokens 3 --dtype fp32"
    " --sft-steps 2 --sft-batch 4 --irl-prompts 2 --grpo-rollouts 1"
    " --grpo-prompts 8 --grpo-batch 4 --rival true"
)


def edit(path, **changes):
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "gone"}))


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def demonstrations(n, categories=CATEGORIES):
    return [demonstration(c, i) for c in categories for i in range(n)]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A good model, good data and a whole run of them."""
    w = tmp_path_factory.mktemp("good")
    prompts = [{"prompt": "Hello?", "kind": "ordinary"}]
    make_world(w, 3, 8, [*prompts, {"prompt": "Insult me", "category": "insult"}])
    assert drirl.main(["all", *flags(w, FLAGS)]) == 0
    return w


@pytest.fixture
def w(template, tmp_path):
    return shutil.copytree(template, tmp_path / "w")  # keeps the times, which grpo looks at


def tree(folder):
    def content(p):
        return os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None

    return {str(p.relative_to(folder)): content(p) for p in folder.rglob("*")}


def refused(w, argv, capsys, *words):
    """main says one line with these words, returns 2, and writes nothing."""
    before = tree(w)
    capsys.readouterr()
    code, err = drirl.main(flags(w, argv)), capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("drirl: ") and err.count("\n") == 1 and len(err) < 1100, err
    assert all(word in err for word in words), (words, err)
    assert tree(w) == before


# ---------------------------------------------------------------------------- what is wrong

EVAL = "eval --model W/model --prompts W/prompts.jsonl --max-new-tokens 2 --dtype fp32"
ALL, DATA, SFT, IRL, GRPO, BASELINE, RUN_EVAL = (
    f"{stage} {FLAGS}" for stage in ("all", "data", "sft", "irl", "grpo", "baseline", "eval")
)
FOLDER = "sft --run W/run"
LONG, TWO = "more than 64", {"prompt": "a"}
STATE = "unfinished-sft.safetensors: not the state of this run"


def nothing(w):
    pass


def text(name, content):
    return lambda w: (w / name).write_text(content)


def settings(content):
    return text(SETTINGS, content if isinstance(content, str) else json.dumps(content))


def lines(name, *records):
    return lambda w: rows(w / name, *records)


def done(stage, **changes):
    return lambda w: edit(w / f"run/done/{stage}.json", **changes)


def shadow(change):
    """Changes the tensors of one reward model."""

    def make(w):
        state = load_file(w / "run/rewards/crime.safetensors")
        change(state)
        save_file(state, w / "run/rewards/crime.safetensors")

    return make


def cut(name, by):
    return lambda w: rewrite(w / name, lambda b: b[:-by])


CASES = {  # what is done to a good folder, the command, words of the message
    "tokenizer cut off": (
        cut("model/tokenizer.json", 50),
        EVAL,
        "cannot read",
        "model/tokenizer.json",
    ),
    # prompts and demonstrations
    "prompt beyond the context": (
        lines("prompts.jsonl", TWO, {"prompt": "b" * 400}),
        EVAL,
        "prompts.jsonl, row 2: a prompt of",
        "context of 400",
    ),
    "answers beyond the context": (
        nothing,
        EVAL.replace("tokens 2", "tokens 390"),
        "prompts.jsonl, row 1",
        "lower --max-new-tokens",
    ),
    "demonstration beyond the context": (
        lines(
            "benign.jsonl",
            *demonstrations(8, [HELPFUL]),
            {**demonstration(HELPFUL, 9), "answer": "yes " * 99},
        ),
        SFT,
        "benign.jsonl, row 9",
    ),
    "all: prompt beyond the context": (
        lines("prompts.jsonl", {"prompt": "b" * 400}),
        ALL,
        "prompts.jsonl, row 1",
    ),
    "all: benign without harmless": (
        lines("benign.jsonl", demonstration("crime", 1)),
        ALL,
        "benign.jsonl: no demonstrations of category helpful",
    ),
    "all: prompts empty": (text("prompts.jsonl", ""), ALL, "prompts.jsonl: no rows"),
    "all: no model": (lambda w: shutil.rmtree(w / "model"), ALL, "model is no model folder"),
    "unknown kind": (
        lines("prompts.jsonl", {"prompt": "a", "kind": "odd"}),
        EVAL,
        "kind 'odd'; known",
    ),
    "pool all harmless": (
        lambda w: shutil.copy(w / "benign.jsonl", w / "pool.jsonl"),
        DATA,
        "pool.jsonl: no harmful prompts",
    ),
    "pool lacks a category": (
        lines("pool.jsonl", *demonstrations(3, list(CATEGORIES)[1:])),
        DATA,
        "too few demonstrations for insult (2 missing)",
    ),
    "balanced lacks a category": (
        lines("run/data/balanced.jsonl", *demonstrations(3, list(CATEGORIES)[1:])),
        SFT,
        "data/balanced.jsonl: no demonstrations of category insult",
    ),
    "line too long": (
        lines("pool.jsonl", demonstration("crime", 1), {"prompt": "a" * loaders.MAX_LINE}),
        DATA,
        "pool.jsonl:2: a line of 10000",
    ),
    "line too deep": (
        text("pool.jsonl", '{"prompt": "a"}\n{"prompt": "b", "x": ' + "[" * 70 + "]" * 70 + "}\n"),
        DATA,
        f"pool.jsonl:2: not JSON: nested too deep, {LONG}",
    ),
    "pool a folder": (
        nothing,
        DATA.replace("pool.jsonl", "model"),
        "cannot read",
        "Is a directory",
    ),
    "pool without end": (
        nothing,
        DATA.replace("W/pool.jsonl", "/dev/zero"),
        "/dev/zero: larger than",
    ),
    "contrast beyond the data": (
        nothing,
        SFT + " --irl-contrast 9",
        "benign.jsonl: too few rows for --irl-contrast 9",
    ),
    # settings in the run folder
    "settings of a model": (
        lambda w: shutil.copy(w / "model/config.json", w / SETTINGS),
        SFT,
        "run/config.json: not the settings of a run; choose another --run",
    ),
    "all over a model": (
        nothing,
        ALL.replace("W/run", "W/model"),
        "model/config.json: not the settings of a run",
    ),
    "setting a text": (
        settings({"grpo": {"lr": "fast"}}),
        FOLDER,
        "run/config.json: grpo.lr (or --grpo-lr) 'fast': want a number",
    ),
    "setting true": (
        settings({"irl": {"epochs": True}}),
        FOLDER,
        "run/config.json: irl.epochs (or --irl-epochs) True: want a whole number",
    ),
    "setting null": (
        settings({"run": {"model": None}}),
        FOLDER,
        "run/config.json: run.model (or --model) None: want text",
    ),
    "setting with NUL": (
        settings({"run": {"chat_format": "a\0"}}),
        FOLDER,
        "run/config.json: run.chat_format",
    ),
    "setting negative": (
        settings({"sft": {"lr": -1}}),
        FOLDER,
        "run/config.json: sft.lr (or --sft-lr) -1: want 1e-12 to 1000000",
    ),
    "setting of another version": (
        settings({"sft": {"warmup": 3}}),
        SFT,
        "run/config.json: unknown setting sft.warmup",
        "remove it there",
    ),
    "section of another version": (
        settings({"ppo": {"lr": 1}}),
        SFT,
        "run/config.json: unknown setting ppo.lr",
    ),
    "section a number": (settings({"run": 3}), SFT, "run/config.json: not the settings of a run"),
    "settings a list": (settings([]), SFT, "run/config.json: want an object"),
    "settings no JSON": (settings("{"), SFT, "run/config.json as JSON"),
    # what a run wrote before
    "metrics no JSON": (
        lambda w: rewrite(w / "run/metrics.jsonl", lambda b: b"{\n" + b),
        SFT,
        "metrics.jsonl:1: want an object with a stage; delete that line",
    ),
    "metrics without a stage": (
        lambda w: rewrite(w / "run/metrics.jsonl", lambda b: b + b"3\n"),
        RUN_EVAL,
        "metrics.jsonl:",
        "delete that line",
    ),
    "done a list": (text("run/done/data.json", "[]"), ALL, "done/data.json: want an object"),
    "done without seconds": (done("data", seconds="gone"), ALL, "done/data.json", "delete it"),
    "done: settings a text": (done("data", settings="all"), ALL, "done/data.json", "delete it"),
    "done: seconds a text": (done("irl", seconds="long"), BASELINE, "done/irl.json", "delete it"),
    "a run of other settings": (
        nothing,
        f"{ALL} --sft-steps 3 --grpo-clip 0.1",
        "run, data: begun with other settings: ",
        "--grpo-clip 0.2 there, 0.1 here; ",
        "--sft-steps 2 there, 3 here",
        "say the same",
        "--resume false",
    ),
    "a run of another corpus": (
        lines("pool.jsonl", *demonstrations(4)),
        ALL,
        "begun with other settings: ",
        "text of --pool",
    ),
    "state cut off": (text("run/unfinished-sft.safetensors", "x" * 99), SFT, STATE),
    "state without its numbers": (
        lambda w: save_file(
            {"x": torch.ones(2)},
            w / "run/unfinished-sft.safetensors",
            metadata={"state": "{}"},
        ),
        SFT,
        STATE + ": delete it, or say --resume false",
    ),
    "samples of another version": (
        text("run/rewards/samples.json", '[{"prompt": "a"}]'),
        GRPO,
        "rewards/samples.json: want ['category',",
        "run irl again",
    ),
    "rewards cut off": (cut("run/rewards/crime.safetensors", 5), GRPO, "rewards/crime.safetensors"),
    "rewards missing": (
        lambda w: (w / "run/rewards/crime.safetensors").unlink(),
        GRPO,
        "rewards/crime.safetensors",
        "run irl first",
    ),
    "rewards of another shape": (
        shadow(lambda state: state.update({"norm.weight": torch.ones(9)})),
        GRPO,
        "rewards/crime.safetensors",
        "norm.weight: found (9,)",
        "run irl again",
    ),
    "warm start cut off": (cut("run/sft/model.safetensors", 5), IRL, "sft/model.safetensors"),
    "warm start unfinished": (
        lambda w: (w / "run/sft/config.json").unlink(),
        IRL,
        "run/sft is no model folder: it has no config.json",
    ),
    # where a run may lie
    "run in a file": (nothing, SFT.replace("W/run", "W/pool.jsonl"), "pool.jsonl"),
    "run below a file": (
        nothing,
        DATA.replace("W/run", "W/pool.jsonl/run"),
        "cannot write",
        "Not a directory",
    ),
    "run not to be written": (
        nothing,
        DATA.replace("W/run", "/proc/run"),
        "cannot write /proc/run",
    ),
}
FLAG_CASES = {
    "--learning-rate 1": "unrecognized arguments: --learning-rate 1 (all flags",
    "--sft-step 1": "unrecognized arguments: --sft-step 1",  # nothing is abbreviated
    "--sft-steps": "argument --sft-steps: expected one argument",
    "--sft-steps 1.5": "argument --sft-steps: invalid int value: '1.5'",
    "--sft-steps 0": "--sft-steps 0: want 1 to 1000000",
    "--grpo-samples 1": "--grpo-samples 1: want 2 to 1000000",  # nothing to compare it with
    "--sft-steps 1000000000000": "--sft-steps 1000000000000: want 1 to",
    "--sft-lr fast": "argument --sft-lr: invalid float value",
    "--sft-lr nan": "--sft-lr nan: want 1e-12 to 1000000",
    "--sft-lr inf": "--sft-lr inf: want 1e-12 to",
    "--sft-lr -1e-3": "--sft-lr",
    "--sft-lr=-inf": "--sft-lr -inf: want 1e-12 to",
    "--seed " + "9" * 30: "want 0 to 2147483648",
    "--temperature 1e-9": "--temperature 1e-09: want 0.01 to 1000000",
    "--grpo-open-prompts yes": "--grpo-open-prompts: invalid true_or_false value: 'yes'",
    "--grpo-scaling both": "--grpo-scaling both: want one of none, data, model, product, sum",
    "--recipe huge": "--recipe huge: want one of laptop, laptop-few, tiny, gpu",
    "--device gpu": "--device gpu: want cpu or cuda",
    "--device meta": "--device meta: want cpu or cuda",
    "--device cuda:x": "--device cuda:x: want cpu or cuda",
    "--device cpu:": "--device cpu:: want cpu or cuda",
    "--device cuda:99": "--device cuda:99: want cpu or cuda; this torch sees",
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(w, capsys, name):
    change, argv, *words = CASES[name]
    change(w)
    refused(w, argv, capsys, *words)


@pytest.mark.parametrize("given", FLAG_CASES)
def test_bad_flags(tmp_path, capsys, given):
    refused(tmp_path, f"sft --run W/run {given}", capsys, FLAG_CASES[given])


def test_stages(tmp_path, capsys, monkeypatch):
    refused(tmp_path, "", capsys, "stage")
    refused(tmp_path, "fly", capsys, "invalid choice: 'fly'")

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/x\x1b[31m")

    monkeypatch.setattr(drirl, "Run", denied)
    refused(tmp_path, "sft", capsys, "Permission denied", "runs/x")


def test_the_good_folder_is_good(w, capsys):
    assert drirl.main(flags(w, EVAL)) == 0
    with open(w / "run/metrics.jsonl", "a") as f:
        f.write('{"stage": "sf')  # cut off while it was written: left out
    assert drirl.main(flags(w, SFT)) == 0
    records = files.read_records(w / "run/metrics.jsonl")
    assert [r["step"] for r in records if r["stage"] == "sft"] == [1, 2]


# ---------------------------------------------------------------------------- writing


def fail_at(monkeypatch, op, n):
    """The n-th write, flush or rename fails as on a full disk; a write leaves half its bytes.

    Returns the list whose only item is the number of calls.
    """
    calls = [0]

    def count(real, error):
        def call(*args, **kw):
            calls[0] += 1
            if calls[0] != n:
                return real(*args, **kw)
            if op == "write":
                path = next(a for a in args if isinstance(a, Path))
                content = next((a for a in args if isinstance(a, bytes)), b"half a tensor")
                with open(path, "wb") as f:
                    f.write(content[: len(content) // 2])
            raise error

        return call

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if op == "write":
        monkeypatch.setattr(Path, "write_bytes", count(Path.write_bytes, full))
        theirs = files.SafetensorError("No space left on device (os error 28)")
        for module in (hf, resume):
            monkeypatch.setattr(module, "save_file", count(save_file, theirs))
    else:
        monkeypatch.setattr(os, op, count(getattr(os, op), full))
    return calls


MODEL = ("model.safetensors", "tokenizer.json", "config.json")
SHADOWS = [f"{name}.safetensors" for name in (*CATEGORIES, HELPFUL)]
SETS = {  # what a stage leaves: its folder and the files, the last the one that readers look for
    "data": ("data", ("report.json", "balanced.jsonl")),
    "sft": ("sft", MODEL),
    "irl": ("rewards", ("samples.json", "report.json", *SHADOWS)),
    "grpo": ("policy", MODEL),
    "baseline": ("baseline", MODEL),
}


@pytest.mark.parametrize("op", ("write", "fsync", "replace"))
@pytest.mark.parametrize("stage", SETS)
def test_a_full_disk(w, capsys, monkeypatch, op, stage):
    """A write fails, each in turn: one line, no temporary file, the earlier result is whole.

    Only where one of several renames fails may that be refused as unfinished.
    """
    argv = flags(w, f"{stage} {FLAGS} --seed 5 --resume false")
    two = lambda run: {"sft": float(run.c.sft.steps), "irl": 1.0, "grpo": 1.0}  # steps of SFT
    monkeypatch.setattr(drirl.Run, "times", two)
    monkeypatch.setattr(resume, "SAVE_EVERY", 120.0 if stage == "irl" else 0.0)
    run, (name, names) = w / "run", SETS[stage]
    folder = run / name
    old, failures = {name: (folder / name).read_bytes() for name in names}, 0
    for n in range(1, 99):
        with monkeypatch.context() as m:
            calls = fail_at(m, op, n)
            code = drirl.main(argv)
            err = capsys.readouterr().err.rpartition("drirl: ")[2]
        assert not list(run.rglob("*.tmp"))
        if calls[0] < n:
            assert code == 0
            break
        failures += 1
        assert code == 2 and "No space left" in err, err
        assert "cannot write" in err and str(run) in err, err
        now = {p.name: p.read_bytes() for p in folder.iterdir() if p.name in names}
        later = "/done/" in err  # follows the set
        assert now == old or later or op == "replace" and names[-1] not in now, (op, n, err)
        if "config.json" in now:
            hf.load_model(folder)
            load_chat(folder)
        for name in names:  # the next try starts from the earlier result
            (folder / name).write_bytes(old[name])
    assert failures >= 3
    assert stage == "data" or {name: (folder / name).read_bytes() for name in names} != old


def test_a_really_full_disk(w):
    """The system itself refuses more than 4 KB a file: also in the library for tensors."""
    folder, was = w / "run/sft", resource.getrlimit(resource.RLIMIT_FSIZE)
    policy, before = hf.load_model(w / "model"), tree(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, was[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*sft/model.safetensors.*File too large"):
            hf.save_model(policy, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert tree(folder) == before


# ---------------------------------------------------------------------------- fuzzing


def run_of(w):
    return drirl.Run(drirl.parse(flags(w, ALL), drirl.STAGES)[1])


FUZZED = {  # file, how it is mutated, how it is read, how often
    "settings": (
        SETTINGS,
        mutate_json,
        lambda w: drirl.parse(flags(w, FOLDER), drirl.STAGES),
        400,
    ),
    "done": ("run/done/sft.json", mutate_json, lambda w: run_of(w).times(), 150),
    "metrics": (
        "run/metrics.jsonl",
        mutate,
        lambda w: files.read_records(w / "run/metrics.jsonl"),
        100,
    ),
}


@pytest.mark.parametrize("name", FUZZED)
def test_fuzz(w, name):
    """Mutated files are read or refused by a UserError, in bounded time and memory."""
    file, change, read, times = FUZZED[name]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good, rng, refusals = (w / file).read_bytes(), random.Random(name), 0
    read(w)
    for n in range(times):
        (w / file).write_bytes(change(good, rng))
        start = time.process_time()
        try:
            read(w)
        except UserError as e:
            refusals += 1
            assert str(w) in str(e) or str(e).startswith("--"), e
        assert time.process_time() - start < 5, n
    assert times / 10 < refusals < times
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 2**19, "half a GB"


# ---------------------------------------------------------------------------- the source itself

READS_CODE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml")
RUNS_CODE = ("eval", "exec", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load")
FLAGS_CODE = ("shell", "allow_pickle", "trust_remote_code")


def sources():
    aside = {".venv", "models", "runs", ".git"}
    paths = [p for p in ROOT.rglob("*.py") if not aside & set(p.relative_to(ROOT).parts)]
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def unsafe(tree):
    """What could run a stranger's code. A method called eval is none."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in READS_CODE]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            found += [a.name for a in node.names if (module, a.name) == ("torch", "load")]
            found += [module] if module in READS_CODE else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in (*RUNS_CODE, "yaml.load") else []
            given = [k for k in node.keywords if ast.unparse(k.value) != "False"]
            found += [k.arg for k in given if k.arg in FLAGS_CODE]
    return found


def test_nothing_here_runs_what_a_file_says():
    for text in (
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import subprocess as s\ns.run('ls', shell=True)",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
    ):
        assert unsafe(ast.parse(text)), text
    good = "model.eval()\nre.compile('x')\nexecute()\nrun(x, shell=False)"
    assert not unsafe(ast.parse(good))
    trees = sources()
    assert len(trees) > 30
    found = {path: what for path, tree in trees.items() if (what := unsafe(tree))}
    assert found == {"teach/walkthrough.py": ["exec"]}  # of a page's own blocks


def test_whatever_a_stage_writes_goes_through_the_helper():
    """files.write hands out a path `aside`; no other is opened to write or renamed."""
    may_write = {"support/files.py", "support/weights.py", "teach/walkthrough.py", "lab/grid.py"}
    writers = ("write_text", "write_bytes", "copyfile", "rename", "save_file", "savefig")
    for path, tree in sources().items():
        if path in may_write or path.startswith(("tests", "teach/exercises")):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                said = ast.unparse(node)
                if name in writers or "os.replace" in said or name == "open" and len(node.args) > 1:
                    assert re.search(r"\baside\b", said), (path, said)
