"""A run that is killed goes on to the same bytes. One that diverges stops."""

import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT, WORLD, demonstration, flags, make_world, rows
from safetensors.torch import load_file, save_file
from test_grpo_train import ROWS as LETTER_ROWS
from test_grpo_train import Letters, Share, tiny

import drirl
import grpo_s
import reward
import sft
from config import Config, IRLConfig, SFTConfig, UserError, changed
from data import CATEGORIES, HELPFUL
from encoder import WordEncoder
from support import run as stages
from support.resume import Loop, read_state

ORDER = [stage for stage in stages.ORDER if stage != "baseline"]  # without the rival
FLAGS = WORLD + (
    " --recipe laptop --encoder words --per-category 2 --max-new-tokens 12 --dtype fp32"
    " --sft-steps 40 --sft-batch 8 --irl-contrast 2 --irl-prompts 3"
    " --grpo-rollouts 6 --grpo-prompts 16 --grpo-passes 2 --grpo-blocks 0"
)
# Imports once, as importing takes longer than a run. A shell that starts the tests in the
# background has them ignore SIGINT.
SERVER = """
import json, os, signal, sys
import drirl, matplotlib.pyplot
from support import resume
signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    argv, log, resume.SAVE_EVERY = json.loads(line)
    pid = os.fork()
    if not pid:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os._exit(drirl.main(argv))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runs:
    """Runs of drirl.py all in processes of their own."""

    def __init__(self, w):
        self.w, self.log, self.argv = w, w / "log.txt", flags(w, FLAGS)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=env, **pipes)

    def start(self, folder, *more, save_every=0.0) -> int:
        self.log.write_text("")
        argv = ["all", *self.argv, "--run", str(folder), *more]
        self.server.stdin.write(json.dumps([argv, str(self.log), save_every]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        return int(self.server.stdout.readline())

    def succeed(self) -> None:
        assert self.wait() == 0, self.log.read_text()[-2000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    w = tmp_path_factory.mktemp("resume")
    prompts = [{"prompt": f"Hello {i}?", "kind": "ordinary"} for i in range(8)]
    make_world(w, 4, 12, [*prompts, {"prompt": "Insult me", "category": "insult"}])
    runs = Runs(w)
    with runs.server:
        yield runs
        runs.server.stdin.close()


def done(folder) -> list[str]:
    return [stage for stage in ORDER if (folder / f"done/{stage}.json").exists()]


def at_work(folder) -> str:
    """The stage that the run is in."""
    return next((s for s in ORDER if not (folder / f"done/{s}.json").exists()), "end")


def alive(pid) -> bool:
    return os.path.exists(f"/proc/{pid}")


@pytest.fixture(scope="module")
def whole(runs):
    """An uninterrupted run, and about how long its stages take."""
    folder, begun = runs.w / "whole", {}
    pid = runs.start(folder)
    while (stage := at_work(folder)) != "end" and alive(pid):
        begun.setdefault(stage, time.time())
        time.sleep(0.002)
    begun["end"] = time.time()
    runs.succeed()
    return folder, {a: begun[b] - begun[a] for a, b in zip(ORDER, [*ORDER[1:], "end"])}


@pytest.fixture
def copy(runs, whole, tmp_path):
    """The whole run again, and the flags that made it."""
    return shutil.copytree(whole[0], tmp_path / "r"), [*runs.argv, "--run", str(tmp_path / "r")]


def contents(folder) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def outcome(folder) -> dict:
    """All that a run leaves, bytes of tensors, without what tells the time or the folder."""
    kinds = (".safetensors", ".json", ".jsonl", ".tmp")
    out = {str(p.relative_to(folder)): x for p, x in contents(folder).items() if p.suffix in kinds}
    del out["config.json"]
    for stage in done(folder):
        out[f"done/{stage}.json"] = json.loads(out[f"done/{stage}.json"])["settings"]
    records = [json.loads(line) for line in out["metrics.jsonl"].splitlines()]
    out["metrics.jsonl"] = sorted(records, key=lambda r: ORDER.index(r["stage"]))
    out["results.json"] = json.loads(out["results.json"])
    for r in records + out["results.json"]:
        r.pop("seconds", None)
    return out


def same(folder, whole) -> None:
    got, want = outcome(folder), outcome(whole[0])
    assert [name for name in got | want if got.get(name) != want.get(name)] == []


def steps_of(folder, stage) -> list[int]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r["step"] for r in records if r["stage"] == stage]


def stop_at(patch, last):
    """Loops stop after step `last`, as if asked to."""

    def end(self, step, real=Loop.end, **record):
        self.stop = self.stop or step == last
        real(self, step, **record)

    patch.setattr(Loop, "end", end)


# ---------------------------------------------------------------------------- kills


def interrupt(runs, folder, whole, sent, times, seed, save_every):
    """Starts a run again and again and sends a signal, `times` times, in each stage.

    The instant is random. At last lets the run end. Returns the stages hit.
    """
    rng, hit = random.Random(seed), Counter()
    for stage in ORDER:
        for _ in range(times):
            pid = runs.start(folder, save_every=save_every)
            while alive(pid) and at_work(folder) in ORDER[: ORDER.index(stage)]:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.7 * whole[1][stage]))
            now = at_work(folder)
            if now != stage and not hit[stage]:  # past it: a busy machine took its time before
                whole[1][stage] /= 2
            try:
                os.kill(pid, sent)
            except ProcessLookupError:
                pass
            if runs.wait() == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[sent]:
                hit[now] += 1
                if sent == signal.SIGINT:
                    check_stopped(folder, runs.log.read_text())
    runs.start(folder)
    runs.succeed()
    return hit


def check_stopped(folder, said) -> None:
    """It says how to go on; the state's steps are those logged, if any is left."""
    assert "the same command, without --resume false, goes on" in said
    if stopped := re.search(r"(\w+): stopping after this step", said):
        stage, state = stopped[1], folder / f"unfinished-{stopped[1]}.safetensors"
        if state.exists():
            assert 0 < read_state(state)["done"] == len(steps_of(folder, stage))
        else:  # it came after the last step: the stage is done
            assert stage in done(folder)


def test_sigkill(runs, whole):
    assert len(steps_of(whole[0], "sft")) == 40 and len(steps_of(whole[0], "grpo")) == 24
    hit, n = Counter(), 0
    while n < 4 and (sum(hit.values()) < 20 or set(ORDER) - set(hit)):
        folder = runs.w / f"killed{n}"
        hit += interrupt(runs, folder, whole, signal.SIGKILL, 4, n, 0.05)
        same(folder, whole)
        n += 1
    assert sum(hit.values()) >= 20 and set(hit) >= set(ORDER), hit


def test_sigint(runs, whole):
    """It stops after the step, with its state saved, and goes on."""
    hit = interrupt(runs, runs.w / "interrupted", whole, signal.SIGINT, 1, 0, 1000.0)
    assert sum(hit.values()) >= 5, hit
    same(runs.w / "interrupted", whole)


def test_sigint_after_the_last_step(copy, whole, monkeypatch):
    """The stage ends as usual, then the run stops."""
    (folder, argv), real = copy, reward.score_groups
    late = lambda *a: os.kill(os.getpid(), signal.SIGINT) or real(*a)
    monkeypatch.setattr(reward, "score_groups", late)
    assert drirl.main(["irl", *argv]) == 130
    assert done(folder) == ["data", "sft", "irl"] and not list(folder.glob("unfinished*"))
    assert drirl.main(["all", *argv]) == 0
    same(folder, whole)


def test_state_of_a_stage_that_is_done_goes(copy, whole):
    """As a kill right after the stage was noted as done leaves it."""
    folder, argv = copy
    (folder / "unfinished-grpo.safetensors").write_bytes(b"")
    assert drirl.main(["eval", *argv]) == 0
    same(folder, whole)


# ---------------------------------------------------------------------------- one at a time


def test_one_process_at_a_time(runs, whole, capsys):
    """While a run is at work, another that would write there is refused and writes nothing."""
    folder, said = runs.w / "held", []
    pid = runs.start(folder)
    while alive(pid) and at_work(folder) not in ORDER[2:]:
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)
    before = contents(folder)
    try:
        for stage in ("data", "sft", "all"):
            status = drirl.main([stage, *runs.argv, "--run", str(folder)])
            said.append((status, capsys.readouterr().err))
        after = contents(folder)
    finally:
        os.kill(pid, signal.SIGCONT)
    line = f"drirl: {folder}: another process is at work; choose another --run"
    assert said == [(2, line + "\n")] * 3 and after == before
    runs.succeed()
    same(folder, whole)
    assert drirl.main(["eval", *runs.argv, "--run", str(folder)]) == 0


def test_held_before_the_work(copy, whole, capsys):
    """A stage that works long before it writes is refused at once too."""
    folder, argv = copy
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert drirl.main(["data", "--generate", "true", *argv]) == 2
    assert "another process is at work" in capsys.readouterr().err
    os.close(other)
    same(folder, whole)


# ---------------------------------------------------------------------------- going on


def test_nothing_is_left_to_do(runs, whole):
    """The same command again shows the table; other settings or another corpus are refused.

    --resume false starts anew.
    """
    folder, prompts = whole[0], runs.w / "prompts.jsonl"
    times = lambda: {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    before, first, kept = times(), outcome(folder), prompts.read_text()
    other = ("--seed", "3", "--sft-steps", "41")
    differ = "begun with other settings: --seed 0 there, 3 here; --sft-steps 40 there, 41 here"
    for more, code, says in (((), 0, "Nothing was left to do"), (other, 2, differ)):
        runs.start(folder, *more)
        assert runs.wait() == code and says in runs.log.read_text()
        assert times() == before
    prompts.write_text(kept + kept)
    runs.start(folder)
    assert runs.wait() == 2 and "text of --prompts" in runs.log.read_text()
    prompts.write_text(kept)
    runs.start(folder, "--resume", "false")
    assert runs.wait() == 0 and outcome(folder) == first
    assert all(times()[p] > before[p] for p in before if p.suffix == ".safetensors")


def test_a_stage_alone_goes_on_too(copy, whole, capsys):
    """grpo stopped and run again by itself. Later stages are not done any more."""
    folder, argv = copy
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        assert drirl.main(["grpo", *argv]) == 130
    assert drirl.main(["grpo", *argv, "--grpo-lr", "0.002"]) == 2
    assert "--grpo-lr 0.001 there, 0.002 here" in capsys.readouterr().err
    assert done(folder) == ["data", "sft", "irl"]
    assert drirl.main(["eval", *argv]) == 0  # the old policy is nobody's
    names = [r["name"] for r in json.loads((folder / "results.json").read_text())]
    assert names == ["base", "SFT warm start"]
    assert drirl.main(["grpo", *argv]) == 0
    assert "grpo goes on after step 8" in capsys.readouterr().out  # at the end of a rollout
    assert done(folder) == ["data", "sft", "irl", "grpo"]
    policy = "policy/model.safetensors"
    assert (folder / policy).read_bytes() == (whole[0] / policy).read_bytes()
    assert drirl.main(["all", *argv]) == 0
    said = capsys.readouterr().out
    assert "[grpo] done before" in said and "[baseline]" not in said
    assert "Nothing was" not in said
    same(folder, whole)  # eval, which comes after it, was run again
    assert drirl.main(["grpo", *argv, "--grpo-lr", "0.002", "--resume", "false"]) == 0
    assert "goes on" not in capsys.readouterr().out
    assert (folder / policy).read_bytes() != (whole[0] / policy).read_bytes()


def test_a_state_of_another_model_is_refused(copy, capsys, monkeypatch):
    (folder, argv), refusal = copy, "unfinished-grpo.safetensors: not the state of this run"
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert drirl.main(["grpo", *argv]) == 130
    state = folder / "unfinished-grpo.safetensors"
    tensors, saved = load_file(state), read_state(state)
    for spoilt, more in (
        ({"weight norm.weight": torch.ones(9)}, {}),
        ({"weight norm.weight": torch.ones(1)}, {}),
        ({"exp_avg norm.weight": torch.ones(3)}, {}),
        ({"exp_avg norm.weight": torch.ones(1)}, {}),
        ({"more": torch.ones(1)}, {}),
        ({"exp_avg layers.99": torch.ones(3)}, {}),
        ({"weight norm.weight": None}, {}),
        ({}, {"done": 1000}),
        ({}, {"done": -5}),
        ({}, {"stage": 3}),
    ):
        kept = {k: x for k, x in {**tensors, **spoilt}.items() if x is not None}
        save_file(kept, state, metadata={"state": json.dumps({**saved, **more})})
        assert drirl.main(["grpo", *argv]) == 2, (spoilt, more)
        assert refusal in capsys.readouterr().err, (spoilt, more)


def test_the_rivals_steps_are_counted_from_what_is_done(copy, monkeypatch, capsys):
    """From measured seconds: 5 against 10 for 40 steps are 20."""
    folder, argv = copy

    def took(**seconds):
        for stage, s in seconds.items():
            path = folder / f"done/{stage}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": s}))

    took(sft=10.0, irl=2.0, grpo=3.0)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert drirl.main(["all", *argv, "--rival", "true"]) == 130
    assert drirl.main(["all", *argv, "--rival", "true"]) == 0
    assert "goes on after step 5" in capsys.readouterr().out
    assert steps_of(folder, "baseline") == list(range(1, 21))
    names = [r["name"] for r in json.loads((folder / "results.json").read_text())]
    assert names == ["base", "SFT warm start", "DR-IRL from it", "SFT continued"]
    (folder / "done/irl.json").unlink()
    assert drirl.main(["baseline", *argv]) == 2
    assert "run sft, irl and grpo first: their seconds are needed" in capsys.readouterr().err


def test_prompts_without_a_demonstration(copy):
    """Those of the pool that are not balanced; grpo borrows demonstrations for them."""
    folder, argv = copy
    run = drirl.Run(drirl.parse(["grpo", *argv], drirl.STAGES)[1])
    known = run.rows(chat := run.chat())
    found = {r["prompt"] for r in run.open_prompts(chat, known)}
    pool = {f"{c} {i}?" for c in CATEGORIES for i in range(4)}
    assert len(known) == 14 + 12 and found == pool - {r["prompt"] for r in known}
    argv += ["--grpo-open-prompts", "true", "--resume", "false"]
    assert drirl.main(["grpo", *argv]) == 0


def test_as_many_harmless_demonstrations_as_harmful_ones(copy, tmp_path):
    """The others join the open prompts. Which ones is drawn by the seed."""
    folder, argv = copy
    benign = [demonstration("helpful", i) for i in range(40)]
    harmful = [demonstration("crime", i) for i in range(100, 140)]  # none of this file's business
    rows(tmp_path / "benign.jsonl", *benign, *harmful)
    argv += ["--benign", str(tmp_path / "benign.jsonl")]
    drawn = []
    for seed in ("0", "1"):
        run = drirl.Run(drirl.parse(["grpo", *argv, "--seed", seed], drirl.STAGES)[1])
        known = run.rows(chat := run.chat())
        harmless = [r["prompt"] for r in known if r["category"] == "helpful"]
        assert len(known) == 28 and len(set(harmless)) == 14
        bare = {r["prompt"] for r in run.open_prompts(chat, known)}
        assert bare & {r["prompt"] for r in benign} == {r["prompt"] for r in benign} - set(harmless)
        assert not bare & {r["prompt"] for r in harmful}
        drawn.append(harmless)
    assert drawn[0] != drawn[1]


def test_some_open_prompts_are_only_looked_at(copy, monkeypatch):
    """Half of them harmless; none where there are fewer than ten times as many."""
    folder, argv = copy
    argv += ["--grpo-open-prompts", "true"]
    run = drirl.Run(drirl.parse(["grpo", *argv], drirl.STAGES)[1])
    assert run.grpo_rows(run.chat())[1] == []
    monkeypatch.setattr(stages, "HELD", 1)
    every, _ = run.grpo_rows(run.chat())
    monkeypatch.setattr(stages, "HELD", 2)
    bare = [{"prompt": f"new {i}", "category": ("helpful", "crime")[i % 2]} for i in range(20)]
    monkeypatch.setattr(run, "open_prompts", lambda *a: bare)
    drawn, held = run.grpo_rows(run.chat())
    assert sorted(r["category"] for r in held) == ["crime", "helpful"]
    assert all(r["borrowed"] for r in held)
    left = {r["prompt"] for r in drawn if r.get("borrowed")}
    assert left == {r["prompt"] for r in bare} - {r["prompt"] for r in held}


def test_open_prompts_are_looked_at_first(runs, tmp_path, capsys):
    """One that is too long ends the main job before anything is written."""
    listed = [demonstration(c, i) for c in CATEGORIES for i in range(2)]
    rows(tmp_path / "pool.jsonl", *listed, {"prompt": "why " * 3000, "category": "crime"})
    argv = [*runs.argv, "--run", str(tmp_path / "r"), "--pool", str(tmp_path / "pool.jsonl")]
    assert drirl.main(["all", *argv]) == 2 and not (tmp_path / "r").exists()
    assert "pool.jsonl, row 15: " in capsys.readouterr().err


def test_held_out_prompts_that_are_demonstrations_are_told(copy, tmp_path):
    folder, argv = copy
    known = json.loads((folder / "data/balanced.jsonl").read_text().split("\n")[0])["prompt"]
    rows(tmp_path / "p.jsonl", {"prompt": known.upper()}, {"prompt": "Hello?"})
    assert drirl.main(["eval", *argv, "--prompts", str(tmp_path / "p.jsonl")]) == 0
    assert "; 1 prompts are harmful demonstrations; " in (folder / "report.md").read_text()


def test_only_what_is_used_must_fit(runs, tmp_path):
    """A response that is neither trained on nor evaluated may be long, a prompt may not."""
    long = {"prompt": "Hello?", "draft": ["long"], "answer": "no " * 3000}
    rows(tmp_path / "prompts.jsonl", {**long, "kind": "ordinary"})
    argv = [*runs.argv, "--run", str(tmp_path / "r"), "--prompts", str(tmp_path / "prompts.jsonl")]
    argv += ["--pool", str(tmp_path / "pool.jsonl")]
    run = drirl.Run(drirl.parse(["grpo", *argv], drirl.STAGES)[1])
    (row,), (chat,) = run.prompts([run.base()])
    assert len(row["response"]) > 9000
    listed = [demonstration(c, i) for c in CATEGORIES for i in range(2)] * 2
    new = {**long, "category": "crime", "prompt": "Hello, you?"}
    rows(tmp_path / "pool.jsonl", *listed, new, {**new, "prompt": "hello"})  # the last is held out
    found = [r["prompt"] for r in run.open_prompts(chat, [])]
    assert "Hello, you?" in found and "hello" not in found
    rows(tmp_path / "pool.jsonl", *listed, {"prompt": "why " * 3000, "category": "crime"})
    with pytest.raises(UserError, match="pool.jsonl, row 29: "):
        run.open_prompts(chat, [])


def test_a_share_of_the_held_out_prompts(copy, tmp_path):
    """Evenly of each kind and category, in the file's order."""
    folder, argv = copy
    kinds = [{"prompt": f"{k} {i}", "kind": k} for i in range(6) for k in ("ordinary", "lookalike")]
    harmful = [{"prompt": f"{c} {i}", "category": c} for c in ("crime", "insult") for i in range(3)]
    rows(tmp_path / "p.jsonl", *kinds, *harmful)
    argv += ["--prompts", str(tmp_path / "p.jsonl"), "--eval-prompts"]
    chosen = lambda n: drirl.Run(drirl.parse(["eval", *argv, n], drirl.STAGES)[1]).prompts([])[0]
    some = [r["prompt"] for r in chosen("6")]
    assert Counter(p.split()[0] for p in some) == {
        "ordinary": 2,
        "lookalike": 2,
        "crime": 1,
        "insult": 1,
    }
    every = [r["prompt"] for r in kinds + harmful]
    assert some == [p for p in every if p in some]
    for n in ("0", "18", "99"):
        assert [r["prompt"] for r in chosen(n)] == every


def test_a_state_is_saved_after_whole_steps_alone(tmp_path):
    """A stop waits for the next one."""
    model, path = torch.nn.Linear(1, 1), tmp_path / "x.safetensors"
    loop = Loop("x", path)
    loop.skip(0, model, torch.optim.AdamW(model.parameters()))
    loop.end(0, whole=False)
    assert not path.exists()
    loop.end(1)
    assert read_state(path)["done"] == 2
    loop.stop = True
    loop.end(2, whole=False)
    assert read_state(path)["done"] == 2
    with pytest.raises(KeyboardInterrupt):
        loop.end(3)
    assert read_state(path)["done"] == 4


# ---------------------------------------------------------------------------- not finite


def sft_loop(loop):
    c = SFTConfig(steps=8, batch=4, blocks=1)
    sft.train(tiny(), Letters(), LETTER_ROWS, c, torch.float32, loop=loop)


def irl_loop(loop):
    reference = tiny()
    c = IRLConfig(integration="one", reward_blocks=1, epochs=4)
    models = reward.RewardModels(reference, c)
    group = {"category": "crime", "prompt_ids": [1, 2], "samples": [[5, 6]]}
    groups = [{**group, "demonstration": [i, 4]} for i in (3, 7)]
    groups += [{**groups[0], "category": HELPFUL}]
    batches = reward.pack_groups(models, reference, groups, torch.float32, size=1)
    reward.fit(models, batches, c, torch.float32, loop=loop)


SMALL = {"grpo.rollouts": 8, "grpo.prompts": 4, "grpo.samples": 4, "grpo.lr": 1e-3}
SMALL |= {"grpo.blocks": 1, "grpo.beta_kl": 0.02, "grpo.std_eps": 0.5, "run.max_new_tokens": 6}


def grpo_loop(loop):
    reference, c = tiny().requires_grad_(False), changed(Config(), SMALL)
    rewards, phi = Share(reference, 1), WordEncoder(16)
    fixed = (reference, rewards, Letters(), phi, LETTER_ROWS, c, torch.float32)
    grpo_s.train(tiny(), *fixed, loop=loop)


class Watched(Loop):
    """Keeps what is logged, and the weights after every step."""

    def __init__(self, **how):
        self.records, self.weights = [], []
        super().__init__("x", log=lambda **r: self.records.append(r), **how)

    def end(self, step, **record):
        weights = [p.detach().flatten() for p in self.model.parameters()]
        self.weights.append(torch.cat(weights))
        super().end(step, **record)


def spoil(x, backward):
    """NaN, or x whose gradient is."""
    if not backward:
        return x * math.nan
    x.register_hook(lambda g: g * math.nan)
    return x


LOSSES = {
    "sft": (sft_loop, sft, "token_logps"),
    "irl": (irl_loop, reward, "irl_loss"),
    "grpo": (grpo_loop, grpo_s, "loss"),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_an_update_that_is_not_finite_stops_the_stage(monkeypatch, name, backward):
    """Nothing of it is learnt, in the first step or a later one."""
    train, module, function = LOSSES[name]
    real, calls = getattr(module, function), []

    def planted(*a, **k):
        calls.append(1)
        out = real(*a, **k)
        if len(calls) < bad:
            return out
        return (spoil(out[0], backward), out[1]) if name == "grpo" else spoil(out, backward)

    monkeypatch.setattr(module, function, planted)
    what = "grad_norm" if backward else "loss"
    for bad in (1, 3):
        calls.clear()
        words = f"x, step {bad}: {what} is not finite: say --resume false"
        with pytest.raises(UserError, match=words):
            train(loop := Watched())
        assert len(loop.records) == bad - 1 and len(calls) == bad
        weights = torch.cat([p.detach().flatten() for p in loop.model.parameters()])
        assert weights.isfinite().all()
        assert not loop.weights or torch.equal(weights, loop.weights[-1])


@pytest.mark.parametrize(
    "what, value",
    [("reward", math.nan), ("reward", -math.inf), ("similarity", math.nan)],
)
@pytest.mark.parametrize("demonstration", (False, True))
def test_a_rollout_that_is_not_finite_stops_the_stage(monkeypatch, what, value, demonstration):
    """The running means see nothing of it."""
    places = {"reward": (Share, "__call__"), "similarity": (grpo_s, "similarities")}
    target, name = places[what]
    real, calls = getattr(target, name), []

    def planted(*a, **k):
        calls.append(1)
        x = real(*a, **k).clone()
        x[-1 if demonstration else 0] *= value if len(calls) == 2 else 1  # the last of a group
        return x

    monkeypatch.setattr(target, name, planted)
    with pytest.raises(UserError, match=f"x, step 2: {what} is not finite"):
        grpo_loop(loop := Watched())
    assert len(loop.records) == 1
    assert all(math.isfinite(x) for means in loop.state.values() for x in means.values())
