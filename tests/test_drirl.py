"""drirl.py and train.sh as a user meets them: one clear line for a mistake, and a whole run of the tiny model."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import drirl
import settings

ROOT = Path(__file__).parent.parent


def parse(argv):
    return settings.parse(argv, drirl.STAGES)


def command(*args, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "drirl.py"), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def folder(path, **config):
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 8,
                "hidden_size": 4,
                "intermediate_size": 4,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                **config,
            }
        )
    )
    return path


def test_mistakes_give_one_clear_line(tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\nHello?\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (["eval", "--model", tmp_path / "nowhere", "--prompts", prompts], "is no model folder"),
        (["eval", "--model", empty, "--prompts", prompts], "has no config.json"),
        (
            ["eval", "--model", folder(tmp_path / "gpt2", model_type="gpt2"), "--prompts", prompts],
            "unsupported architecture 'gpt2'",
        ),
        (["eval", "--model", empty, "--prompts", tmp_path / "no.csv"], "cannot read"),
        (
            ["sft", "--run", tmp_path / "r", "--model", empty, "--dtype", "fp64"],
            "want one of auto, fp32, bf16",
        ),
        (
            ["sft", "--run", tmp_path / "r", "--scaling", "both"],
            "want one of none, data, model, product, sum, spread",
        ),
        (["sft", "--run", tmp_path / "r", "--estimator", "exact"], "want one of importance"),
        (["sft", "--run", tmp_path / "r", "--integration", "sum"], "want one of categorized"),
        (["sft", "--run", tmp_path / "r", "--device", "gpu"], "want cpu or cuda"),
        (["sft", "--run", tmp_path / "r", "--steps", "0"], "--steps 0: too small"),
        (["sft", "--run", tmp_path / "r", "--temperature", "0"], "--temperature 0.0: too small"),
        (["sft", "--run", tmp_path / "r", "--temperature", "nan"], "--temperature nan: too small"),
        (["sft", "--run", tmp_path / "r", "--drop", "1"], "--drop 1.0: too large"),
        (["sft", "--run", tmp_path / "r", "--keep", "0"], "--keep 0.0: too small"),
        (["irl", "--run", tmp_path / "r", "--rounds", "2"], "choose --estimator linear"),
        (["irl", "--run", tmp_path / "r"], "run the stages in order"),
        (["baseline", "--run", tmp_path / "r"], "run the stages in order"),
        (
            ["data", "--run", tmp_path / "r", "--encoder", "words", "--per-category", "80"],
            "missing): --per-category asks for 80 of each; --generate true has the model write",
        ),
        (
            ["drafts", "--run", tmp_path / "r", "--prompts", prompts],
            "prompts.csv: no prompt has a harm category",
        ),
        (
            ["route", "--run", tmp_path / "r", "--prompts", prompts],
            "prompts.csv: no prompt has a harm category",
        ),
        (["data", "--run", tmp_path / "r", "--encoder", empty], "no text-encoder folder"),
    ]
    for args, text in cases:
        assert drirl.main([str(a) for a in args]) == 2, args
        err = capsys.readouterr().err.strip()
        assert err.startswith("drirl: ") and text in err and "\n" not in err, (args, err)


def test_the_data_stage(tmp_path, capsys, monkeypatch):
    """The shipped pool: table, picture, 72 of each; the same bytes again, with embeddings from the cache."""
    args = ["data", "--encoder", "words", "--run", str(tmp_path)]
    assert drirl.main(args) == 0
    said, first = capsys.readouterr().out, (tmp_path / "data/balanced.jsonl").read_bytes()
    rows = [json.loads(line) for line in first.decode().splitlines()]
    assert (
        "| before | 262 | 128 | 585 | 102 | 72 | 158 | 88 | 1395 | 8.12 |" in said
        and "| after | 72 | 72 | 72 | 72 | 72 | 72 | 72 | 504 | 1.00 | 1.000 |" in said
    )
    assert (
        Counter(r["category"] for r in rows) == {c: 72 for c in drirl.data.CATEGORIES}
        and len({r["prompt"] for r in rows}) == 504
    )
    assert (tmp_path / "data/balance.png").stat().st_size > 5000 and json.loads(
        (tmp_path / "data/report.json").read_text()
    )["after"]["imbalance"] == 1
    monkeypatch.setattr(drirl.encoder.WordEncoder, "embed", None)
    assert drirl.main(args) == 0 and (tmp_path / "data/balanced.jsonl").read_bytes() == first


def test_the_data_stage_routes_what_has_no_category(tmp_path, capsys):
    known = [
        json.loads(line)
        for line in Path(settings.SHIPPED["pool"]).read_text(encoding="utf-8").splitlines()
    ]
    by = {c: [r for r in known if r["category"] == c][:4] for c in drirl.data.CATEGORIES}
    rows = [r for mine in by.values() for r in mine]
    pool = tmp_path / "pool.jsonl"
    pool.write_text(
        "".join(
            json.dumps({k: v for k, v in r.items() if k != "category" or i % 4}) + "\n"
            for i, r in enumerate(rows)
        )
        + "broken\n"
    )
    args = [
        "data",
        "--encoder",
        "words",
        "--run",
        str(tmp_path / "r"),
        "--pool",
        str(pool),
        "--per-category",
        "3",
    ]
    assert drirl.main(args) == 2 and "pool.jsonl:29: not JSON" in capsys.readouterr().err
    assert drirl.main([*args, "--skip-bad", "true"]) == 0
    said = capsys.readouterr().out
    assert (
        "1 rows skipped" in said
        and "7 prompts had no category" in said
        and "| after | 3 | 3 | 3 | 3 | 3 | 3 | 3 | 21 |" in said
    )


def by_category(n):
    """n shipped demonstrations of each category."""
    known = [
        json.loads(line)
        for line in Path(settings.SHIPPED["pool"]).read_text(encoding="utf-8").splitlines()
    ]
    return {c: [r for r in known if r["category"] == c][:n] for c in drirl.data.CATEGORIES}


def write_pool(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def scripted(monkeypatch):
    """A model that answers each prompt of the shipped pool as the pool does; `balance` and `fill` tell what they were given."""
    answers = {
        r["prompt"]: drirl.data.format_draft(r["draft"], r["answer"])
        for rows in by_category(None).values()
        for r in rows
    }
    chat = SimpleNamespace(prompt=lambda text: text, decode=lambda text: text, eos=())
    seen, balance, fill = {}, drirl.data.balance, drirl.introspect.fill
    monkeypatch.setattr(
        drirl.Run, "load", lambda *a: SimpleNamespace(c=SimpleNamespace(context=10**6))
    )
    monkeypatch.setattr(drirl.Run, "chat", lambda *a: chat)
    monkeypatch.setattr(
        drirl.introspect,
        "generate",
        lambda model, turns, *a, **k: SimpleNamespace(
            rows=lambda: [answers.get(t.rpartition("Request: ")[2], "no form") for t in turns]
        ),
    )
    monkeypatch.setattr(
        drirl.data,
        "balance",
        lambda rows, n, vectors, seed: (
            seen.update(balance=(rows, vectors)) or balance(rows, n, vectors, seed)
        ),
    )
    monkeypatch.setattr(
        drirl.introspect,
        "fill",
        lambda model, chat, rows, vectors, *a: (
            seen.update(fill=(rows, vectors)) or fill(model, chat, rows, vectors, *a)
        ),
    )
    return seen


def test_the_data_stage_generates(tmp_path, capsys, scripted):
    """Two categories lack demonstrations and have prompts; the model writes them, each beside its own prompt's embedding."""
    by = by_category(5)
    bare = [
        {k: r[k] for k in ("prompt", "category")} for c in ("crime", "ethics") for r in by[c][1:]
    ]
    help_ = {"prompt": "help", "category": "helpful", "draft": ["say yes"], "answer": "Yes."}
    rows = [
        help_,
        *bare,
        *(r for c, mine in by.items() for r in mine[: 1 if c in ("crime", "ethics") else 5]),
        {"prompt": "unknown to the model", "category": "crime"},
    ]
    args = [
        "data",
        "--encoder",
        "words",
        "--run",
        str(tmp_path),
        "--pool",
        write_pool(tmp_path / "pool.jsonl", rows),
        "--per-category",
        "4",
    ]
    assert (
        drirl.main(args) == 2
        and "crime (3 missing), ethics (3 missing)" in capsys.readouterr().err
        and not (tmp_path / "config.json").exists()
    )
    assert drirl.main([*args, "--generate", "true"]) == 0
    said, phi = capsys.readouterr().out, drirl.encoder.WordEncoder()
    assert (
        "pool.jsonl: 37 rows, 1 helpful ones left out, 0 duplicates dropped; 27 demonstrations, 9 prompts without a draft"
        in said
    )
    assert (
        "| before | 5 | 5 | 1 | 5 | 5 | 5 | 1 | 27 |" in said
        and "| after | 4 | 4 | 4 | 4 | 4 | 4 | 4 | 28 |" in said
    )
    report = json.loads((tmp_path / "data/generated.json").read_text())
    assert set(report) == {"crime", "ethics"} and all(
        n["kept"] >= 3 and n["asked"] == n["kept"] + sum(n[f] for f in drirl.introspect.FILTERS)
        for n in report.values()
    )
    assert all(
        f"generated for {c}: {n['kept']} of {n['asked']} kept; turned down: form {n['form']}, length 0, draft 0, compliance 0, copy 0; 0 prompts"
        in said
        for c, n in report.items()
    )
    generated = [
        json.loads(line)
        for line in (tmp_path / "data/generated.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(generated) == sum(n["kept"] for n in report.values()) and all(
        r["generated"] for r in generated
    )
    balanced = [
        json.loads(line)
        for line in (tmp_path / "data/balanced.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [r for r in balanced if r.get("generated")] == [
        r for r in generated if r in balanced
    ] and sum(r.get("generated", False) for r in balanced) >= 6
    for name, n in (("fill", 36), ("balance", 27 + len(generated))):
        given, vectors = scripted[name]
        assert len(given) == n and "help" not in [r["prompt"] for r in given]
        assert torch.equal(vectors, phi.embed([r["prompt"] for r in given]))


def test_a_failed_data_stage_leaves_the_folder_as_it_was_but_keeps_what_was_generated(
    tmp_path, capsys, scripted
):
    by = by_category(3)
    good = write_pool(tmp_path / "good.jsonl", [r for rows in by.values() for r in rows])
    short = write_pool(
        tmp_path / "short.jsonl",
        [r for c, rows in by.items() for r in (rows if c != "crime" else rows[:1])]
        + [{k: by["crime"][1][k] for k in ("prompt", "category")}],
    )
    run = tmp_path / "r"
    args = ["data", "--encoder", "words", "--run", str(run), "--per-category", "3", "--pool"]
    assert drirl.main([*args, good]) == 0
    before = {
        name: (run / name).read_bytes()
        for name in ("config.json", "data/balanced.jsonl", "data/report.json")
    }
    assert (
        drirl.main([*args, short, "--generate", "true"]) == 2
        and "crime (1 missing)" in capsys.readouterr().err
    )
    assert {name: (run / name).read_bytes() for name in before} == before
    (made,) = [
        json.loads(line)
        for line in (run / "data/generated.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert made == {
        **{k: by["crime"][1][k] for k in ("prompt", "category", "draft", "answer")},
        "generated": True,
    }
    assert json.loads((run / "data/generated.json").read_text())["crime"]["kept"] == 1


def test_duplicates_are_no_demonstrations(tmp_path, capsys):
    rows = [r for mine in by_category(3).values() for r in mine]
    args = [
        "data",
        "--encoder",
        "words",
        "--run",
        str(tmp_path / "r"),
        "--per-category",
        "3",
        "--pool",
    ]
    assert (
        drirl.main(
            [
                *args,
                write_pool(
                    tmp_path / "a",
                    [{**r, "prompt": r["prompt"].upper() + " !"} for r in rows] + rows,
                ),
            ]
        )
        == 0
    )
    assert (
        "42 rows, 0 helpful ones left out, 21 duplicates dropped; 21 demonstrations, 0 prompts"
        in capsys.readouterr().out
    )
    assert (
        drirl.main([*args, write_pool(tmp_path / "b", [r for r in rows[::3] for _ in range(5)])])
        == 2
        and "insult (2 missing)" in capsys.readouterr().err
    )


def test_embeddings_are_those_of_texts_and_encoder_and_made_again_if_broken(tmp_path, monkeypatch):
    run = lambda name: drirl.Run(
        settings.Config(run=settings.RunConfig(run=str(tmp_path), encoder=name))
    )
    first, path = run("words").embedded(["a", "b"]), tmp_path / "data/embeddings.safetensors"
    whole = path.read_bytes()
    for rest in (whole[:-5], whole[:20], b"", whole[:8] + b"x" * 300):
        path.write_bytes(rest)
        assert torch.equal(run("words").embedded(["a", "b"]), first) and path.read_bytes() == whole
    assert torch.equal(run("words").embedded(["b", "a"]), first.flip(0))
    (other := tmp_path / "other").mkdir()
    for width in (8, 9):  # another encoder, then other weights in its folder
        (other / "model.safetensors").write_bytes(bytes(width))
        monkeypatch.setattr(
            drirl.encoder,
            "load_encoder",
            lambda folder, device: drirl.encoder.WordEncoder(width=width),
        )
        assert run(str(other)).embedded(["b", "a"]).shape == (2, width)


def test_centroids_are_of_the_whole_shipped_pool_and_embedded_once(tmp_path, monkeypatch):
    run = drirl.Run(settings.Config(run=settings.RunConfig(run=str(tmp_path), encoder="words")))
    rows = [r for mine in by_category(None).values() for r in mine]
    want = drirl.data.centroids(
        drirl.encoder.WordEncoder().embed([r["prompt"] for r in rows]),
        [r["category"] for r in rows],
    )
    torch.testing.assert_close(run.centres(), want)
    run.embedded(["a pool of one"])
    monkeypatch.setattr(drirl.encoder.WordEncoder, "embed", None)
    torch.testing.assert_close(run.centres(), want)


def test_the_help_tells_the_limits_of_introspection():
    """--max-new-tokens and --temperature don't reach it."""
    text = {flag: text for _, _, flag, text in settings.settings()}
    tokens = [
        inspect.signature(f).parameters["max_new_tokens"].default
        for f in (drirl.introspect.fill, drirl.introspect.compare)
    ]
    assert "--generate true: {}, in drafts: {}".format(*tokens) in text["--max-new-tokens"]
    assert (
        f"--generate true: {inspect.signature(drirl.introspect.grow).parameters['temperature'].default}"
        in text["--temperature"]
    )


def test_a_wrong_flag_and_a_missing_tokenizer(tmp_path):
    wrong = command("sft", "--learning-rate", "1")
    assert (
        wrong.returncode == 2
        and "unrecognized arguments: --learning-rate" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )
    from model import Config, Transformer, save_model

    path = folder(tmp_path / "m")
    torch.manual_seed(0)
    save_model(Transformer(Config.from_dict(json.loads((path / "config.json").read_text()))), path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello?"}\n')
    lost = command("eval", "--model", path, "--prompts", tmp_path / "p.jsonl")
    assert lost.returncode == 2 and lost.stderr.strip() == f"drirl: {path} has no tokenizer.json"


def test_settings_come_from_flags_then_the_run_folder(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"sft": {"lr": 0.5, "steps": 3}, "run": {"seed": 4}})
    )
    _, c, _ = parse(
        [
            "sft",
            "--run",
            str(tmp_path),
            "--sft-lr",
            "0.25",
            "--per-sample",
            "true",
            "--reward-blocks",
            "0",
        ]
    )
    assert (c.sft.lr, c.sft.steps, c.run.seed, c.grpo.per_sample, c.irl.reward_blocks) == (
        0.25,
        3,
        4,
        True,
        0,
    )
    _, c, _ = parse(
        ["all", "--run", str(tmp_path), "--seed", "2"]
    )  # a whole run takes flags and defaults
    assert (c.sft, c.run.seed) == (settings.SFTConfig(), 2)
    with pytest.raises(drirl.data.UserError, match="--per-sample: want true or false, got 'yes'"):
        parse(["sft", "--per-sample", "yes"])
    (tmp_path / "config.json").write_text(json.dumps({"sft": {"lrr": 0.5}}))
    with pytest.raises(drirl.data.UserError, match="unknown setting sft.lrr"):
        parse(["sft", "--run", str(tmp_path)])


def test_every_setting_has_a_flag_and_a_help_text():
    flags = [flag for _, _, flag, _ in settings.settings()]
    assert len(flags) == len(set(flags)) and {
        "--reward-models",
        "--reward-blocks",
        "--encoder",
        "--device",
        "--scaling",
        "--integration",
    } <= set(flags)
    missing = [flag for _, _, flag, text in settings.settings() if not text]
    assert not missing


def test_the_core_imports_only_the_card():
    """Nothing but the seven packages, the standard library and ourselves; gguf and matplotlib only inside functions."""
    ours = {p.stem for p in ROOT.glob("*.py")} | {"kernels"}
    allowed = (
        ours
        | set(sys.stdlib_module_names)
        | {"torch", "numpy", "tokenizers", "safetensors", "triton", "tqdm"}
    )
    for path in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert {n.split(".")[0] for n in names} <= allowed, path


def test_train_sh_tiny(tmp_path):
    """The whole main job on a model made on the spot, in a copy of the project: table, pictures, saved policy."""
    for name in [*(p.name for p in ROOT.glob("*.py")), "train.sh", "setup.sh", "kernels", "corpus"]:
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("train.sh", "setup.sh"):  # they cd to where they lie
        (tmp_path / name).unlink()
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        ["bash", str(tmp_path / "train.sh"), "tiny"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs/tiny"
    results = json.loads((run / "results.json").read_text())
    assert [r["name"] for r in results] == [
        "base",
        "SFT warm start",
        "DR-IRL from it",
        "SFT continued",
    ]
    base, warm = (r["rates"] for r in results[:2])
    assert (
        base["harmful"][0] <= 0.05 * base["harmful"][1]
        and warm["harmful"][0] > 0.5 * warm["harmful"][1]
    )
    assert all(
        r["rates"]["harmful"][1] == 140 and r["rates"]["lookalike"][1] == 60 for r in results
    )
    assert (
        (run / "refusals.png").stat().st_size > 10000
        and (run / "curves.png").exists()
        and "| DR-IRL from it |" in (run / "report.md").read_text()
    )
    stages = [
        json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert {"sft", "irl", "grpo", "baseline"} == set(stages)
    assert (run / "policy/tokenizer.json").exists() and len(
        list((run / "rewards").glob("*.safetensors"))
    ) == 8


def test_a_stage_clears_its_own_and_later_records(tmp_path):
    run = drirl.Run(settings.Config(run=settings.RunConfig(run=str(tmp_path))))
    for stage in ("sft", "irl", "grpo", "irl"):
        run.log(stage=stage, step=1)
    with run.work("irl", []) as loop:
        loop.log(stage="irl", step=2)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"stage": "sft", "step": 1},
        {"stage": "irl", "step": 2},
    ]


def test_a_users_folder_called_tiny_is_not_remade(tmp_path):
    """bash train.sh FOLDER/tiny aligns that folder; only the word tiny makes a model."""
    for name in ("train.sh", "setup.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "drirl.py").write_text("import sys; print(sys.argv[1:3])")
    done = subprocess.run(
        ["bash", str(tmp_path / "train.sh"), "/models/tiny"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.stdout == "['all', '--run']\n", done.stderr


def test_rewards_older_than_their_warm_start(tmp_path, capsys):
    for name, age in (
        ("rewards/crime.safetensors", 100),
        ("sft/model.safetensors", 0),
        ("sft/config.json", 0),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert (
        drirl.main(["grpo", "--run", str(tmp_path)]) == 2
        and "run irl again" in capsys.readouterr().err
    )
