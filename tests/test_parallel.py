"""Two processes on CPU do what one does: same losses, same weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import WORLD, flags, make_world
from safetensors.torch import load_file
from test_grpo_train import ROWS, Letters, ShareByCategory, tiny

import drirl
import grpo_s
from config import Config, changed
from encoder import WordEncoder
from support import parallel
from support.hf import save_model
from support.resume import Loop

SMALL = {"run.max_new_tokens": 6, "grpo.prompts": 6, "grpo.samples": 3, "grpo.rollouts": 3}
SMALL |= {"grpo.passes": 2, "grpo.batch": 3, "grpo.members": "ends", "grpo.lr": 1e-3}
SMALL |= {"grpo.anchor": 1, "grpo.clip_high": 0.0, "grpo.extrapolate": 0.5}
SMALL |= {"grpo.beta_kl": 0.1, "grpo.std_eps": 0.5}
CASES = {
    "blocks": {"grpo.blocks": 1},
    "whole model": {},
    "one group a pass": {"grpo.tokens_per_batch": 40},
    "one update": {"grpo.batch": 0, "grpo.passes": 1, "grpo.members": "all", "grpo.anchor": 0},
    "sharded": {"grpo.shard": True},
    "sharded, in parts": {"grpo.blocks": 1, "grpo.shard": True, "grpo.tokens_per_batch": 40},
    "sharded, float32": {"grpo.shard": True},
}


def work(folder: Path, case: str) -> None:
    """One training run in however many processes; the first writes what came of it."""
    torch.set_num_threads(1)
    dtype = torch.float32 if "float32" in case else torch.float64
    policy, reference = tiny().to(dtype), tiny().to(dtype).requires_grad_(False)
    c, records = changed(Config(), {**SMALL, **CASES[case]}), []
    loop = Loop("grpo", log=lambda **r: records.append(r))
    fixed = (reference, ShareByCategory(reference, 1), Letters(), WordEncoder(16), ROWS, c, dtype)
    grpo_s.train(policy, *fixed, loop=loop)
    sharded = any(map(parallel.is_sharded, policy.parameters()))
    assert sharded == ("sharded" in case and parallel.world() > 1)
    save_model(policy, folder)
    if not parallel.rank():
        (folder / "records.json").write_text(json.dumps(records))


def worker(rank: int, port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parallel.start("cpu")
    for case in CASES:
        work(folder / case, case)
    os._exit(0)  # all is written; torch's threads sometimes abort a process that ends its group


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, folder), nprocs=2)
    return folder


def same(ours: Path, theirs: Path, limit: float) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(two, tmp_path, case):
    work(tmp_path, case)
    limit = 1e-4 if "float32" in case else 1e-9
    same(tmp_path, two / case, limit)
    read = lambda folder: json.loads((folder / "records.json").read_text())
    for a, b in zip(read(tmp_path), read(two / case), strict=True):
        a, b = ({**r, "seconds": 0, "stage": 0} for r in (a, b))
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=10 * limit, abs=limit), key
    assert any(r["kl"] != 0 for r in read(tmp_path))


def test_torchrun(tmp_path, monkeypatch, capsys):
    """The command of parallel.py: torchrun's two processes leave the policy of one."""
    make_world(tmp_path, 4, 70, [{"prompt": "Hello?", "kind": "ordinary"}])
    argv = flags(tmp_path, WORLD) + flags(
        tmp_path,
        "--recipe laptop --encoder words --dtype fp32 --per-category 3 --max-new-tokens 12"
        " --sft-steps 3 --sft-batch 4 --sft-lr 1e-2 --irl-prompts 2"
        " --irl-contrast 2 --grpo-rollouts 2 --grpo-prompts 64 --grpo-passes 2"
        " --grpo-lr 1e-2 --grpo-blocks 0",
    )
    one, two = ([*argv, "--run", str(tmp_path / name)] for name in ("one", "two"))
    for stage in ("data", "sft", "irl"):
        assert drirl.main([stage, *one]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with monkeypatch.context() as m:
        m.setattr(parallel, "world", lambda: 9)
        assert drirl.main(["grpo", *one]) == 2
        assert "8 prompts in an update: fewer than 9 processes" in capsys.readouterr().err
        assert drirl.main(["sft", *one]) == 2
        assert "sft runs in one process: torchrun is for grpo" in capsys.readouterr().err
    assert drirl.main(["grpo", *one]) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command = [sys.executable, *torchrun, drirl.__file__, "grpo", *two]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    same(tmp_path / "one/policy", tmp_path / "two/policy", 1e-4)
    before, after = (
        load_file(tmp_path / f"one/{name}/model.safetensors") for name in ("sft", "policy")
    )
    assert max((after[name] - before[name]).abs().max() for name in after) > 1e-3
    for name in ("one", "two"):
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        found = [r["step"] for r in records if r["stage"] == "grpo"]
        assert found == list(range(1, 2 * 2 * 8 + 1))
        assert (tmp_path / name / "done/grpo.json").exists()
