"""A run that is killed goes on to the same bytes: SIGKILL and SIGINT at random instants of every stage. And updates that aren't finite."""

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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import drirl
import grpo_s
import model
import reward
import settings
import sft
from data import CATEGORIES, HELPFUL, UserError
from encoder import WordEncoder
from files import hold, release
from loop import Loop, read_state
from runfolder import ORDER
from test_bad_input import CONFIG, demonstration, rows, tokenizer
from test_grpo_train import ROWS as GRPO_ROWS
from test_grpo_train import SMALL, Letters, Share, start, tiny
from transformer import Config, Transformer

FLAGS = (
    "--model W/model --pool W/pool.jsonl --benign W/benign.jsonl --prompts W/prompts.jsonl --encoder words --per-category 2 --max-new-tokens 12 --dtype fp32 --save-every 0 "
    "--steps 40 --sft-batch 8 --baseline-steps 40 --irl-prompts 3 --helpful-prompts 8 --irl-batch 1 --rollouts 12 --grpo-prompts 16"
)
SERVER = """
import json, os, signal, sys
import drirl, matplotlib.pyplot                       # once: importing takes longer than a run
signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell that starts the tests in the background has them ignore it
for line in sys.stdin:
    argv, log = json.loads(line)
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
        self.w, self.log = w, w / "log.txt"
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(drirl.__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, folder, *more) -> int:
        self.log.write_text("")
        argv = ["all", *FLAGS.replace("W/", f"{self.w}/").split(), "--run", str(folder), *more]
        self.server.stdin.write(json.dumps([argv, str(self.log)]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    w = tmp_path_factory.mktemp("resume")
    (w / "model").mkdir()
    tokenizer().save(str(w / "model/tokenizer.json"))
    torch.manual_seed(0)
    model.save_model(Transformer(Config.from_dict(CONFIG)), w / "model")
    rows(w / "pool.jsonl", *(demonstration(c, i) for c in CATEGORIES for i in range(4)))
    rows(w / "benign.jsonl", *(demonstration(HELPFUL, i) for i in range(12)))
    rows(
        w / "prompts.jsonl",
        *({"prompt": f"Hello {i}?", "kind": "ordinary"} for i in range(8)),
        {"prompt": "Insult me", "category": "insult"},
    )
    runs = Runs(w)
    with runs.server:
        yield runs
        runs.server.stdin.close()


def at_work(folder) -> str:
    """The stage that the run is in."""
    path = folder / "progress.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    return next((s for s in ORDER if s not in done), "end")


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
    assert runs.wait() == 0, runs.log.read_text()[-2000:]
    return folder, {a: begun[b] - begun[a] for a, b in zip(ORDER, [*ORDER[1:], "end"])}


def outcome(folder) -> dict:
    """Bytes of all that a run leaves, without what tells the time."""
    out = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix in (".safetensors", ".json", ".jsonl", ".tmp")
    }
    for name in ("config.json", "progress.json", "times.json"):  # name the folder, seconds
        out.pop(name)
    records = [json.loads(line) for line in out["metrics.jsonl"].splitlines()]
    results = json.loads(out["results.json"])
    for r in records + results:
        r.pop("seconds", None)
    return {
        **out,
        "metrics.jsonl": sorted(records, key=lambda r: ORDER.index(r["stage"])),
        "results.json": results,
    }


def interrupt(runs, folder, whole, sent, times, seed, *more):
    """Starts a run again and again, sends a signal at a random instant of each stage, `times` times; then lets it end. Returns the stages hit."""
    rng, hit = random.Random(seed), Counter()
    for stage in ORDER:
        for _ in range(times):
            pid = runs.start(folder, *more)
            while alive(pid) and at_work(folder) in ORDER[: ORDER.index(stage)]:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.7 * whole[1][stage]))
            now = at_work(folder)
            if (
                now != stage and not hit[stage]
            ):  # past it: a busy machine took its time over the whole run
                whole[1][stage] /= 2
            try:
                os.kill(pid, sent)
            except ProcessLookupError:
                pass
            if runs.wait() == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[sent]:
                hit[now] += 1
                said = runs.log.read_text()
                assert (
                    sent == signal.SIGKILL or "the same command goes on from what is saved" in said
                )
                if stopped := re.search(r"(\w+): stopping after this step", said):
                    state = folder / f"unfinished-{stopped[1]}.safetensors"
                    if not state.exists():  # it came after the last step: the stage is done
                        assert stopped[1] in json.loads((folder / "progress.json").read_text())
                        continue
                    waiting = read_state(state)["done"]
                    assert waiting > 0 and waiting == sum(
                        json.loads(line)["stage"] == stopped[1]
                        for line in (folder / "metrics.jsonl").read_text().splitlines()
                    )
    runs.start(folder)
    assert runs.wait() == 0, runs.log.read_text()[-2000:]
    return hit


def test_sigkill(runs, whole):
    hit, n, want = Counter(), 0, outcome(whole[0])
    assert (
        len([r for r in want["metrics.jsonl"] if r["stage"] == "sft"]) == 40
        and len([r for r in want["metrics.jsonl"] if r["stage"] == "grpo"]) == 12
    )
    while n < 4 and (sum(hit.values()) < 20 or set(ORDER) - set(hit)):
        hit += interrupt(
            runs, runs.w / f"killed{n}", whole, signal.SIGKILL, 4, n, "--save-every", "0.05"
        )
        got = outcome(runs.w / f"killed{n}")
        assert got.keys() == want.keys() and all(got[name] == want[name] for name in want), [
            name for name in want if got.get(name) != want[name]
        ]
        n += 1
    assert sum(hit.values()) >= 20 and set(hit) >= set(ORDER), hit


def test_state_of_a_stage_that_is_done_goes(runs, whole, tmp_path):
    """As a kill right after the stage was noted as done leaves it."""
    folder, argv = (
        shutil.copytree(whole[0], tmp_path / "r"),
        FLAGS.replace("W/", f"{runs.w}/").split(),
    )
    (folder / "unfinished-baseline.safetensors").write_bytes(b"")
    assert drirl.main(["eval", *argv, "--run", str(folder)]) == 0 and outcome(folder) == outcome(
        whole[0]
    )


def test_sigint(runs, whole):
    """It stops after the step, with its state saved, says how to go on, and goes on."""
    hit, want = (
        interrupt(runs, runs.w / "interrupted", whole, signal.SIGINT, 1, 0, "--save-every", "1000"),
        outcome(whole[0]),
    )
    got = outcome(runs.w / "interrupted")
    assert sum(hit.values()) >= 5, hit
    assert got.keys() == want.keys() and all(got[name] == want[name] for name in want), [
        name for name in want if got.get(name) != want[name]
    ]


def test_sigint_after_the_last_step(runs, whole, tmp_path, monkeypatch):
    """The stage ends as usual, then the run stops."""
    folder, argv = (
        shutil.copytree(whole[0], tmp_path / "r"),
        FLAGS.replace("W/", f"{runs.w}/").split(),
    )
    score = reward.score
    monkeypatch.setattr(
        reward, "score", lambda *a: os.kill(os.getpid(), signal.SIGINT) or score(*a)
    )
    assert drirl.main(["irl", *argv, "--run", str(folder)]) == 130
    assert list(json.loads((folder / "progress.json").read_text())) == [
        "data",
        "sft",
        "irl",
    ] and not list(folder.glob("unfinished*"))
    assert drirl.main(["all", *argv, "--run", str(folder)]) == 0 and outcome(folder) == outcome(
        whole[0]
    )


def test_a_folder_made_again_is_held_again(tmp_path):
    for _ in range(3):
        hold(tmp_path / "run")
        hold(tmp_path / "run")
        other = os.open(tmp_path / "run", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
        shutil.rmtree(tmp_path / "run")
    release()


def test_one_process_at_a_time(runs, whole, capsys):
    """While a run is at work, another process that would write into its folder is refused, and leaves it as it is."""
    folder, argv = runs.w / "held", FLAGS.replace("W/", f"{runs.w}/").split()
    pid = runs.start(folder)
    while alive(pid) and at_work(folder) not in ORDER[2:]:
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)
    before, said = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}, []
    try:
        for stage in ("data", "sft", "all"):
            said.append((drirl.main([stage, *argv, "--run", str(folder)]), capsys.readouterr().err))
        after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (
        said
        == [
            (
                2,
                f"drirl: {folder}: another process is at work there; let it end, or choose another --run\n",
            )
        ]
        * 3
        and after == before
    )
    assert runs.wait() == 0 and outcome(folder) == outcome(whole[0])
    assert drirl.main(["eval", *argv, "--run", str(folder)]) == 0


@pytest.mark.parametrize("argv", (["dpo"], ["data", "--generate", "true"]))
def test_held_before_the_work(argv, runs, whole, tmp_path, capsys):
    """Stages that work long before they write, or that no later one reads, are refused at once too."""
    folder = shutil.copytree(whole[0], tmp_path / "r")
    other, before = os.open(folder, os.O_RDONLY), outcome(folder)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert (
        drirl.main([*argv, *FLAGS.replace("W/", f"{runs.w}/").split(), "--run", str(folder)]) == 2
        and "another process is at work" in capsys.readouterr().err
    )
    os.close(other)
    assert (
        outcome(folder) == before
        and not (folder / "dpo").exists()
        and not (folder / "data/generated.jsonl").exists()
    )


def test_nothing_is_left_to_do(runs, whole):
    """The same command again does nothing and shows the table; other settings, or another corpus, are refused; --resume false starts anew."""
    folder, before = whole[0], {p: p.stat().st_mtime_ns for p in whole[0].rglob("*") if p.is_file()}
    for more, code, says in (
        ((), 0, "Nothing was left to do"),
        (
            ("--seed", "3", "--steps", "41"),
            2,
            "begun with other settings: --seed 0 there, 3 here; --steps 40 there, 41 here",
        ),
    ):
        runs.start(folder, *more)
        assert runs.wait() == code and says in runs.log.read_text()
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    prompts, first = runs.w / "prompts.jsonl", outcome(folder)
    kept = prompts.read_text()
    prompts.write_text(kept + kept)
    runs.start(folder)
    assert runs.wait() == 2 and "text of --prompts" in runs.log.read_text()
    prompts.write_text(kept)
    runs.start(folder, "--resume", "false")
    assert (
        runs.wait() == 0
        and outcome(folder) == first
        and all(
            p.stat().st_mtime_ns > before[p]
            for p in before
            if p.suffix == ".safetensors" and p.stem != "embeddings"
        )
    )


def test_a_stage_alone_goes_on_too(runs, whole, tmp_path, capsys):
    """grpo stopped and run again by itself. With other settings it is refused, and begun anew if asked to. Later stages are not done any more."""
    folder = shutil.copytree(whole[0], tmp_path / "r")
    argv = ["grpo", *FLAGS.replace("W/", f"{runs.w}/").split(), "--run", str(folder)]

    def stopping(self, step, end=Loop.end, **record):
        self.stop = step == 4
        end(self, step, **record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "end", stopping)
        assert drirl.main(argv) == 130
    assert (
        drirl.main([*argv, "--grpo-lr", "0.001"]) == 2
        and "--grpo-lr 0.00015 there, 0.001 here" in capsys.readouterr().err
    )
    assert list(json.loads((folder / "progress.json").read_text())) == ["data", "sft", "irl"]
    assert drirl.main(["eval", *argv[1:]]) == 0 and [
        r["name"] for r in json.loads((folder / "results.json").read_text())
    ] == ["base", "SFT warm start"]  # the old policy is nobody's
    assert drirl.main(argv) == 0 and "grpo goes on after step 5" in capsys.readouterr().out
    assert outcome(folder)["policy/model.safetensors"] == outcome(whole[0])[
        "policy/model.safetensors"
    ] and list(json.loads((folder / "progress.json").read_text())) == ["data", "sft", "irl", "grpo"]
    assert (
        drirl.main(["all", *argv[1:]]) == 0
        and "[grpo] done before" in (said := capsys.readouterr().out)
        and "[baseline] done" not in said
        and "Nothing was" not in said
    )
    assert outcome(folder) == outcome(
        whole[0]
    )  # baseline and eval, which came after it, were run again
    with pytest.MonkeyPatch.context() as patch:  # a state whose tensors are another model's
        patch.setattr(Loop, "end", stopping)
        assert drirl.main(argv) == 130
    state = folder / "unfinished-grpo.safetensors"
    tensors, saved = load_file(state), read_state(state)
    for spoilt, more in (
        ({"weight.norm.weight": torch.ones(9)}, {}),
        ({"weight.norm.weight": torch.ones(1)}, {}),
        ({"moment.0.exp_avg": torch.ones(3)}, {}),
        ({"more": torch.ones(1)}, {}),
        ({"moment.99.exp_avg": torch.ones(3)}, {}),
        ({}, {"done": 1000}),
        ({}, {"done": -5}),
        ({}, {"stage": 3}),
    ):
        save_file({**tensors, **spoilt}, state, metadata={"state": json.dumps({**saved, **more})})
        assert (
            drirl.main(argv) == 2
            and "unfinished-grpo.safetensors: not the state of this run" in capsys.readouterr().err
        ), (spoilt, more)
    save_file(
        {k: x for k, x in tensors.items() if "norm" not in k},
        state,
        metadata={"state": json.dumps(saved)},
    )
    assert drirl.main(argv) == 2 and "not the state of this run" in capsys.readouterr().err
    assert (
        drirl.main(
            [*argv, "--open-prompts", "true", "--helpful-demonstrations", "6", "--resume", "false"]
        )
        == 0
    )  # prompts without a demonstration, too
    run = drirl.Run(settings.parse(argv, drirl.STAGES)[1])
    demonstrations = run.rows(chat := run.chat())
    assert len(demonstrations) == 14 + 6 and {
        r["category"] for r in run.open_prompts(chat, demonstrations)
    } == {*CATEGORIES, HELPFUL}
    assert {r["prompt"] for r in run.open_prompts(chat, demonstrations)} == (
        {f"{c} {i}?" for c in CATEGORIES for i in range(4)} | {f"{HELPFUL} {i}?" for i in range(12)}
    ) - {r["prompt"] for r in demonstrations}
    assert (
        drirl.main([*argv, "--grpo-lr", "0.001", "--resume", "false"]) == 0
        and "goes on" not in capsys.readouterr().out
    )
    assert (
        outcome(folder)["policy/model.safetensors"] != outcome(whole[0])["policy/model.safetensors"]
    )


# ------------------------------------------------------------------------------------------------ numbers that are not finite


def sft_loop(loop):
    policy = tiny()
    sft.train(
        policy,
        Letters(),
        GRPO_ROWS,
        sft.SFTConfig(steps=8, batch=4, blocks=1),
        nullcontext,
        loop=loop,
    )


def irl_loop(loop):
    models = reward.RewardModels(tiny(), reward.IRLConfig(reward_models=1, reward_blocks=1))
    groups = [
        {"category": "crime", "prompt_ids": [1, 2], "demonstration": [i, 4], "samples": [[5, 6]]}
        for i in (3, 7)
    ]
    reward.fit(
        models,
        reward.prepare(models, groups, 1, nullcontext),
        reward.IRLConfig(epochs=4, joint_epochs=0, batch=1),
        nullcontext,
        loop=loop,
    )


def grpo_loop(loop):
    policy, rewards = start()
    grpo_s.train(
        policy,
        Letters(),
        rewards,
        WordEncoder(16),
        GRPO_ROWS,
        replace(SMALL, rollouts=8),
        nullcontext,
        1.0,
        6,
        torch.float32,
        loop=loop,
    )


class Watched(Loop):
    """Keeps what is logged, and the weights after every step."""

    def __init__(self, **how):
        self.records, self.weights = [], []
        super().__init__("x", log=lambda **r: self.records.append(r), **how)

    def end(self, step, **record):
        self.weights.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))
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
    "grpo": (grpo_loop, grpo_s, "grpo_loss"),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_an_update_that_is_not_finite_is_skipped(monkeypatch, name, backward):
    train, module, function = LOSSES[name]
    real, calls, bad = getattr(module, function), [], {3, 5, 6}

    def planted(*a, **k):
        calls.append(1)
        out = real(*a, **k)
        if len(calls) not in bad:
            return out
        return (spoil(out[0], backward), out[1]) if name == "grpo" else spoil(out, backward)

    monkeypatch.setattr(module, function, planted)
    train(loop := Watched(patience=3))
    assert [r.get("skipped") for r in loop.records] == [
        (["grad_norm"] if backward else ["loss", "grad_norm"]) if i in bad else None
        for i in range(1, 9)
    ]
    assert (
        all(
            r["grad_norm"] is None if i in bad else math.isfinite(r["grad_norm"])
            for i, r in enumerate(loop.records, 1)
        )
        and loop.weights[-1].isfinite().all()
    )
    assert [torch.equal(a, b) for a, b in zip(loop.weights, loop.weights[1:])] == [
        i in bad for i in range(2, 9)
    ]
    calls.clear(), bad.add(4)
    with pytest.raises(
        UserError, match="grad_norm not finite at step 5, 3 updates skipped in a row: begin x anew"
    ):
        train(Watched(patience=3))


@pytest.mark.parametrize(
    "what, value",
    [("reward", math.nan), ("reward", -math.inf), ("similarity", math.nan), ("alpha", math.inf)],
)
def test_a_rollout_whose_numbers_are_not_finite_is_skipped(monkeypatch, what, value):
    """And what follows is as if it had brought nothing: the running means see no reward or similarity of it."""
    target, name = {
        "reward": (Share, "__call__"),
        "similarity": (grpo_s, "similarities"),
        "alpha": (grpo_s, "difficulty"),
    }[what]
    real, calls = getattr(target, name), []

    def planted(*a, **k):
        calls.append(1)
        return real(*a, **k) * (value if len(calls) == 2 else 1)

    monkeypatch.setattr(target, name, planted)
    grpo_loop(loop := Watched())
    assert [r.get("skipped", [])[:1] for r in loop.records] == [
        [what] if n == 2 else [] for n in range(1, 9)
    ]
    assert (
        torch.equal(loop.weights[0], loop.weights[1])
        and not torch.equal(loop.weights[1], loop.weights[2])
        and loop.weights[-1].isfinite().all()
    )
    assert all(math.isfinite(x) for means in loop.state.values() for x in means.values()) and all(
        math.isfinite(a) for r in loop.records[2:] for a in r["alpha"]
    )


def test_a_stage_without_a_single_update_fails(monkeypatch):
    monkeypatch.setattr(
        grpo_s,
        "grpo_loss",
        lambda *a, real=grpo_s.grpo_loss: (lambda loss, logp: (loss * math.nan, logp))(*real(*a)),
    )
    with pytest.raises(UserError, match="every update was skipped"), Watched(patience=99) as loop:
        grpo_loop(loop)


def test_irl_alternates(runs, tmp_path, monkeypatch):
    """irl --rounds 3: samples of the warm start, then of policies that GRPO without scaling improved from it against the rewards so far; samples.json holds the last ones."""
    drawn, trained = [], []
    monkeypatch.setattr(
        reward,
        "sample_groups",
        lambda policy, *a, real=reward.sample_groups: (
            drawn.append((policy, real(policy, *a))) or drawn[-1][1]
        ),
    )
    monkeypatch.setattr(
        grpo_s,
        "train",
        lambda *a, real=grpo_s.train: trained.append((a[5].rollouts, a[5].scaling)) or real(*a),
    )
    flags = [
        *FLAGS.replace("W/", f"{runs.w}/").split(),
        "--run",
        str(tmp_path),
        "--estimator",
        "linear",
        "--rounds",
        "3",
        "--policy-steps",
        "2",
    ]
    for stage in ("data", "sft", "irl"):
        assert drirl.main([stage, *flags]) == 0
    warm, *improved = ([p.detach() for p in policy.parameters()] for policy, _ in drawn)
    same = lambda a, b: all(map(torch.equal, a, b))
    assert (
        trained == [(2, "none")] * 2
        and len(improved) == 2
        and same(warm, model.load_model(tmp_path / "sft").parameters())
    )
    assert not same(warm, improved[0]) and not same(warm, improved[1]) and not same(*improved)
    saved = json.loads((tmp_path / "rewards/samples.json").read_text())
    assert [(g["prompt"], g["reward_demo"]) for g in saved] == [
        (g["prompt"], g["reward_demo"]) for g in drawn[2][1]
    ] and "reward_demo" not in drawn[1][1][0]


def test_dpo_without_a_single_update_fails(runs, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole[0], tmp_path / "r")
    monkeypatch.setattr(
        drirl.dpo, "dpo_loss", lambda *a, real=drirl.dpo.dpo_loss: real(*a) * math.nan
    )
    assert (
        drirl.main(["dpo", "--run", str(tmp_path / "r"), "--updates", "3"]) == 2
        and "dpo: every update was skipped" in capsys.readouterr().err
    )
    assert not (tmp_path / "r/dpo").exists()


def test_dpo_again_replaces_its_log(runs, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "r")
    for updates in (3, 2):
        assert drirl.main(["dpo", "--run", str(tmp_path / "r"), "--updates", str(updates)]) == 0
        assert [
            r["step"]
            for r in drirl.read_records(tmp_path / "r/metrics.jsonl")
            if r["stage"] == "dpo"
        ] == list(range(1, updates + 1))
    theirs, ours = ((folder / "metrics.jsonl").read_text() for folder in (whole[0], tmp_path / "r"))
    assert ours.startswith(theirs) and json.loads(
        (tmp_path / "r/config.json").read_text()
    ) == json.loads((whole[0] / "config.json").read_text())


def test_only_what_is_used_must_fit(runs, tmp_path):
    """A response that is neither trained on nor evaluated may be long, a prompt may not; its row is that of the file."""
    rows(
        tmp_path / "prompts.jsonl",
        {"prompt": "Hello?", "kind": "ordinary", "draft": ["long"], "answer": "no " * 3000},
    )
    argv = [
        "grpo",
        "--model",
        str(runs.w / "model"),
        "--pool",
        str(tmp_path / "pool.jsonl"),
        "--benign",
        str(runs.w / "benign.jsonl"),
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
    ]
    run = drirl.Run(settings.parse([*argv, "--run", str(tmp_path / "r")], drirl.STAGES)[1])
    (row,), (chat,) = run.prompts([run.base()])
    assert len(row["response"]) > 9000
    listed = [demonstration(c, i) for c in CATEGORIES for i in range(2)] * 2
    rows(
        tmp_path / "pool.jsonl",
        *listed,
        {"prompt": "Hello?", "category": "crime", "draft": ["long"], "answer": "no " * 3000},
    )
    assert "Hello?" in [r["prompt"] for r in run.open_prompts(chat, [])]
    rows(tmp_path / "pool.jsonl", *listed, {"prompt": "why " * 3000, "category": "crime"})
    with pytest.raises(UserError, match="pool.jsonl, row 29: "):
        run.open_prompts(chat, [])


def test_two_rounds_of_fits_in_one_loop():
    """As irl --rounds 2 has it: the second fit trains too."""
    loop = Watched()
    irl_loop(loop)
    before, n = loop.weights[-1], len(loop.records)
    irl_loop(loop)
    assert (
        len(loop.records) == 2 * n
        and not torch.equal(loop.weights[n], loop.weights[-1])
        and torch.equal(loop.weights[-1], before)
    )  # as the same fit from the same start


def test_equal_groups_and_empty_completions_are_counted(monkeypatch):
    monkeypatch.setattr(Letters, "decode", lambda self, ids: "" if 7 in ids else "a")
    monkeypatch.setattr(
        Share, "__call__", lambda self, x, batch, categories: torch.ones(len(batch.owner))
    )
    generate, drawn = grpo_s.generate, []
    monkeypatch.setattr(
        grpo_s, "generate", lambda *a, **k: drawn.append(generate(*a, **k)) or drawn[-1]
    )
    grpo_loop(loop := Watched())
    assert (
        [r["equal_groups"] for r in loop.records] == [4] * 8
        and [r["empty"] for r in loop.records] == [sum(7 in row for row in d.rows()) for d in drawn]
        and sum(r["empty"] for r in loop.records) > 3
    )
