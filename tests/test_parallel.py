"""Two processes on CPU do what one does: same losses, same weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import drirl
import parallel
from model import save_model
from test_ablate import world  # noqa: F401 (a fixture: model and corpus)
from test_grpo_train import SMALL, ShareByCategory, run, start

CONFIG = replace(
    SMALL,
    prompts=5,
    samples=3,
    rollouts=3,
    iterations=2,
    keep=0.6,
    imitate=True,
    helpful_share=0.4,
    beta_kl=0.1,
)
CASES = {
    "blocks": {"blocks": 1},
    "whole model": {"blocks": 0},
    "one group a pass": {"blocks": 0, "tokens_per_batch": 40},
    "one group in all": {"blocks": 0, "keep": 0.2, "helpful_share": 0.0},
    "sharded": {"blocks": 0, "shard": True},
    "sharded, in parts": {"blocks": 1, "shard": True, "tokens_per_batch": 40},
    "sharded, recomputed": {"blocks": 0, "shard": True, "recompute": True},
    "sharded, float32": {"blocks": 0, "shard": True, "single": True},
}


def work(folder: Path, case: str) -> None:
    """One training run in however many processes; the first writes what came of it."""
    torch.set_num_threads(1)
    policy, rewards = start()
    more = dict(CASES[case])
    if not more.pop("single", False):
        policy, rewards.trunk[0] = policy.double(), rewards.trunk[0].double()
    records = run(
        policy, ShareByCategory(rewards.trunk[0], 1), replace(CONFIG, **more), more.pop("blocks")
    )
    assert any(map(parallel.is_sharded, policy.parameters())) == (
        "sharded" in case and parallel.world() > 1
    )
    save_model(policy, folder)
    if not parallel.rank():
        (folder / "records.json").write_text(json.dumps(records))


def worker(rank: int, port: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    parallel.start("cpu")
    for case in CASES:
        work(folder / case, case)
    os._exit(
        0
    )  # all is written; torch's own threads sometimes abort a process that takes the group apart


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(two, tmp_path, case):
    work(tmp_path, case)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, two / case))
    limit = 1e-4 if "float32" in case else 1e-9
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=limit, msg=name)
    for a, b in zip(
        *(json.loads((folder / "records.json").read_text()) for folder in (tmp_path, two / case)),
        strict=True,
    ):
        a.pop("seconds"), b.pop("seconds")
        assert b == {
            k: pytest.approx(v, rel=10 * limit, abs=limit) if isinstance(v, (float, list)) else v
            for k, v in a.items()
        }
        assert a["step"] == 1 or a["kl"] > 0


def test_torchrun(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The command of parallel.py: torchrun's two processes leave the policy of one."""
    flags = [
        *world[1 : world.index("--seeds")],
        "--per-category",
        "3",
        "--max-new-tokens",
        "12",
        "--steps",
        "3",
        "--irl-prompts",
        "2",
        "--rollouts",
        "2",
        "--grpo-lr",
        "1e-2",
        "--grpo-blocks",
        "0",
    ]
    for stage in ("data", "sft", "irl"):
        assert drirl.main([stage, *flags, "--run", str(tmp_path / "one")]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with monkeypatch.context() as m:
        m.setattr(parallel, "world", lambda: 65)
        assert (
            drirl.main(["grpo", *flags, "--run", str(tmp_path / "one")]) == 2
            and "--grpo-prompts 64: fewer than the 65 processes" in capsys.readouterr().err
        )
    assert drirl.main(["grpo", *flags, "--run", str(tmp_path / "one")]) == 0
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--",
            drirl.__file__,
            "grpo",
            *flags,
            "--run",
            str(tmp_path / "two"),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ours, theirs = (
        load_file(tmp_path / f"{name}/policy/model.safetensors") for name in ("one", "two")
    )
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-4, msg=name)
    before = load_file(tmp_path / "one/sft/model.safetensors")
    assert max((ours[name] - before[name]).abs().max() for name in ours) > 1e-3
    steps = [
        [
            json.loads(line)["step"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if '"grpo"' in line
        ]
        for name in ("one", "two")
    ]
    assert steps[0] == steps[1] == [1, 2]
