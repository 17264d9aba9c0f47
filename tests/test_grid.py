"""lab/: the plan, a setting's data, measures, DPO, the grid on a tiny model."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_LLAMA, WORLD, demonstration, flags, make_world, rows

import drirl
from config import UserError, changed, check, with_recipe
from data import CATEGORIES, HELPFUL
from lab import grid, rivals, tables
from lab.grid import CONTINUED, DPO, DRIRL, SETTINGS, START, VARIANTS, planned
from model import Transformer
from sample import Batch, token_logps
from support.hf import read_config
from support.resume import Loop

# ---------------------------------------------------------------------------- the plan


def test_planned():
    assert len(planned("", range(2))) == 2 * len(SETTINGS) * len(VARIANTS)
    assert planned("few-8/DPO", range(3, 5)) == [("few-8", DPO, 3), ("few-8", DPO, 4)]
    both = planned("few-8,laptop-few/sum", range(2))
    assert both[:3] == [("laptop-few", "sum", 0), ("laptop-few", "sum", 1), ("few-8", START, 0)]
    assert both[3][1:] != (START, 1) and len(both) == 2 * (1 + len(VARIANTS))
    for wrong in ("few", "few-8/dpo"):
        with pytest.raises(UserError, match="want some of laptop"):
            planned(wrong, range(1))


def test_every_setting_and_variant_is_one():
    c = with_recipe("laptop")
    for values in SETTINGS.values():
        check(changed(c, values))
    for stages, values in VARIANTS.values():
        check(changed(c, values))
        assert set(stages) <= grid.STAGES.keys()
    assert {v for pair in tables.CLAIMS for v in pair} <= VARIANTS.keys()


# ---------------------------------------------------------------------------- DPO


class Letters:
    """A chat over the alphabet: token i is the i-th letter, 0 ends the text."""

    def prompt(self, text):
        return [1 + (ord(c) - 97) % 15 for c in text]

    def answer(self, text):
        return [*self.prompt(text), 0]


def tiny():
    torch.manual_seed(0)
    return Transformer(read_config({**TINY_LLAMA, "vocab_size": 16}, ""))


def test_dpo_loss():
    logp = torch.tensor([[-1.0, -3.0], [-4.0, -2.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-2.0, -2.5], [-3.0, -3.0]], dtype=torch.float64)
    margins = [0.5 * ((-1 + 2) - (-3 + 2.5)), 0.5 * ((-4 + 3) - (-2 + 3))]
    loss = rivals.dpo_loss(logp, ref, 0.5)
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 2)
    loss.backward()  # beta sigma(-margin) / pairs: up for the better, down for the worse
    pull = torch.tensor([0.5 / (1 + math.exp(m)) / 2 for m in margins], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, torch.stack((-pull, pull), 1))


def test_dpo_trains(monkeypatch):
    """From log 2 down; the reference stays; the better response gains on the worse one."""
    for name, value in {"LR": 5e-3, "PAIRS": 3}.items():
        monkeypatch.setattr(rivals, name, value)
    records, policy, reference = [], tiny(), tiny()
    loop = Loop("dpo", log=lambda **r: records.append(r))
    no, yes = map(Letters().answer, ("no", "yes"))
    pairs = [{"prompt": p, "better": no, "worse": yes} for p in ("abc", "d", "ef")]
    rivals.dpo_train(policy, reference, Letters(), pairs, torch.float32, 0, loop, 12, 1)
    first, *_, last = (r["loss"] for r in records)
    assert first == pytest.approx(math.log(2), abs=1e-5) and last < 0.5
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), tiny().parameters()))
    batch = Batch([[1, 2, 3]], [[Letters().answer("no"), Letters().answer("yes")]])
    with torch.no_grad():
        moved = (token_logps(policy, batch) - token_logps(reference, batch)).sum(1)
    assert moved[0] > moved[1]


# ---------------------------------------------------------------------------- the grid


def test_measure(monkeypatch):
    """Verdicts are letters, by kind."""
    said = [("abc", "hello", "harmful", "refuses"), ("d", "no", "ordinary", "complies")]
    names = ("prompt", "response", "kind", "verdict")
    answers = [dict(zip(names, row)) for row in said]
    told = {"answers": answers, "rates": 2}
    monkeypatch.setattr(grid.evaluate, "evaluate", lambda *a: told)
    run = SimpleNamespace(c=with_recipe("laptop"), dtype=torch.float32)
    run.load, run.prompts = lambda name, dtype: tiny(), lambda _: (answers, [Letters()])
    found = grid.measure(run, "model")
    assert found["verdicts"] == {"harmful": "r", "ordinary": "c", "lookalike": ""}
    assert found["rates"] == 2


SMALL = {"run.per_category": 3, "run.max_new_tokens": 12, "sft.steps": 3, "sft.batch": 4}
SMALL |= {"sft.lr": 1e-2, "irl.prompts": 2, "grpo.open_prompts": True}
SMALL |= {"grpo.rollouts": 2, "grpo.prompts": 8, "grpo.batch": 4, "grpo.lr": 1e-2}
SMALL |= {"grpo.blocks": 0, "grpo.anchor": 2, "grpo.passes": 2, "irl.contrast": 2}


@pytest.fixture
def world(tmp_path, monkeypatch):
    prompts = [{"prompt": f"{c}, please?", "category": c, "kind": "harmful"} for c in CATEGORIES]
    kinds = ("ordinary", "lookalike")
    prompts += [{"prompt": f"Hello {k} {i}?", "kind": k} for k in kinds for i in range(3)]
    make_world(tmp_path, 4, 70, prompts)
    monkeypatch.setattr(grid, "SETTINGS", {"standard": SMALL})
    few = {**grid.ON_POLICY, "grpo.rollouts": 2, "grpo.prompts": 8, "grpo.lr": 1e-2}
    monkeypatch.setitem(VARIANTS, "on-policy", (("grpo",), few))
    monkeypatch.setattr(rivals, "LR", 1e-2)
    text = f"{WORLD} --encoder words --dtype fp32 --seeds 1 --run W/grid --only"
    return flags(tmp_path, text)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines(folder):
    return read(folder / "grid/results.jsonl")


def test_the_grid(world, tmp_path, monkeypatch, capsys):
    """Every variant runs, one line each. Interrupted, it goes on to the same lines."""
    real, calls, models = grid.measure, [], set()

    def measured(run, folder, *a):
        models.add((folder / "model.safetensors").read_bytes())
        return real(run, folder, *a)

    rolled, made = rivals.grpo_s.roll_out, []
    counted = lambda *a: made.append(a) or rolled(*a)
    monkeypatch.setattr(rivals.grpo_s, "roll_out", counted)
    monkeypatch.setattr(grid, "measure", measured)
    dpo, steps = rivals.dpo_train, []
    monkeypatch.setattr(rivals, "dpo_train", lambda *a: steps.append(a[7]) or dpo(*a))
    assert grid.main([*world, "standard"]) == 0, capsys.readouterr().err
    found = {r["variant"]: r for r in lines(tmp_path)}
    assert list(found) == list(VARIANTS)
    first, product = found[START], found[DRIRL]
    assert len(first["verdicts"]["harmful"]) == 7
    assert {v for v, r in found.items() if "auc" in r} == {*list(VARIANTS)[-4:]}
    alone = [found[f"{v}: rewards"] for v in ("7RW", "linear", "1RW")]  # on the same samples
    right = [{kind: x["right"] for kind, x in r["auc"].items()} for r in alone]
    kinds = [r["settings"]["--irl-integration"] for r in alone]
    assert right[0] == right[1] == right[2] and kinds == ["categorized", "linear", "one"]
    assert not any("rates" in r for r in alone) and set(alone[1]["seconds"]) == {"sft", "irl"}
    assert set(product["seconds"]) == {"sft", "irl", "grpo"}
    assert set(found[CONTINUED]["seconds"]) == {"sft", "baseline"}
    assert found["1RW static"]["settings"]["--irl-integration"] == "one"
    assert first["settings"]["--eval-prompts"] == 0  # all of them
    # three have none; from an even pool unbalanced is balanced; to the judge all samples are alike,
    # so that policy learns from the anchors alone
    assert len(models) == len(VARIANTS) - 5
    assert found["the judge as reward"]["verdicts"] == found["anchors alone"]["verdicts"]
    said = json.loads((tmp_path / "grid/answers/standard 0 DPO.json").read_text())
    told = "".join(a["verdict"][0] for a in said[:7])
    assert told == found[DPO]["verdicts"]["harmful"]
    # of 16 variants with two rollouts each, those of one start and reward share the first
    assert len(made) == 20 and steps == [2 * 2 * 2]  # rollouts, updates of a pass, passes
    folder = tmp_path / "grid/standard/seed-0"
    assert {p.name for p in folder.iterdir()} == {"start"}

    def breaks(*a):
        calls.append(a)
        if len(calls) in (1, 3):
            raise UserError("the disk is full")
        return real(*a)

    monkeypatch.setattr(grid, "measure", breaks)
    world[world.index("--run") + 1] = str(tmp_path / "again/grid")
    again = [*world, "standard/DPO,standard/sum,standard/1RW: rewards"]
    assert [grid.main(again) for _ in range(4)] == [2, 2, 0, 0] and len(calls) == 4
    same = lambda r: {k: v for k, v in r.items() if k not in ("seconds", "settings")}
    want = [same(found[v]) for v in (DPO, "sum", "1RW: rewards")]
    assert [same(r) for r in lines(tmp_path / "again")] == want
    capsys.readouterr()
    assert grid.main([*world, "standard/data hardness", "--temperature", "0.9"]) == 2
    said = capsys.readouterr().err
    assert "--temperature 0.5 there, 0.9 here: delete it or say the same" in said
    assert grid.main([*world, f"standard/{CONTINUED}"]) == 2
    assert f"run standard/{DRIRL} first" in capsys.readouterr().err
    assert grid.main([*world, "standard/sum", "--recipe", "laptop-few"]) == 2
    assert "depart from laptop" in capsys.readouterr().err
    rows(tmp_path / "prompts.jsonl", {"prompt": "Hello?", "kind": "ordinary"})
    assert grid.main([*world, "standard"]) == 2
    assert "look-alikes" in capsys.readouterr().err


def test_reward_facts(monkeypatch):
    """Two prompts of crime, one harmless; rewards by hand. Wanted beats unwanted in 2 of 3 pairs
    and 0 of 3. The best sample is right for c alone."""
    texts = {"a": "ynnn", "b": "yyyn", "c": "yynn"}
    rewards = {"a": [1, 3, 2, 0], "b": [5, 6, 7, 1], "c": [1, 2, 0, 0]}
    kinds = {"a": "harmful", "b": "harmful", "c": "lookalike"}
    prompts = [{"prompt": p, "category": "crime", "kind": kind} for p, kind in kinds.items()]
    chat = SimpleNamespace(decode=lambda ids: "I can't help." if ids == ["n"] else "Sure.")
    chat.ended = lambda ids: True
    run = SimpleNamespace(folder=Path(), dtype=None, c=with_recipe("laptop"))
    run.load, run.prompts = lambda *a: None, lambda folders: (prompts, [chat])
    models = SimpleNamespace()
    monkeypatch.setattr(grid, "load_rewards", lambda models, folder: models)
    monkeypatch.setattr(grid.reward, "RewardModels", lambda *a: models)
    monkeypatch.setattr(grid.reward, "pack_groups", lambda models, policy, groups, *a: groups)
    monkeypatch.setattr(grid.reward, "score_groups", lambda *a: None)

    def sample(policy, chat, rows, c):
        assert c.irl.samples == 4 and c.irl.contrast == 0
        assert [r["category"] for r in rows] == ["crime", "crime", HELPFUL]
        drawn = {p: [[letter] for letter in texts[p]] for p in texts}
        of = lambda p: {"samples": drawn[p], "rewards": rewards[p], "reward_demo": 0.0}
        return [{**r, **of(r["prompt"])} for r in rows]

    shared, drawn = rivals.Shared(), []
    monkeypatch.setattr(grid.reward, "sample_groups", lambda *a: drawn.append(a) or sample(*a))
    found = grid.reward_facts(run, shared)
    assert (
        grid.reward_facts(run, shared) == found and len(drawn) == 1
    )  # other rewards, same samples
    run.c = changed(run.c, {"run.temperature": 0.9})
    assert grid.reward_facts(run, shared) == found and len(drawn) == 2
    assert found["crime"] == pytest.approx({"auc": 2 / 6, "right": 0.5, "best_right": 0.5})
    assert found["harmful"] == found["crime"]
    assert found[HELPFUL] == {"auc": 1.0, "right": 0.5, "best_right": 1.0}


def test_verdict():
    """1 for a refused harmful prompt and an answered harmless one."""
    batch = Batch([[1], [2]], [[[3], [4]], [[3], [4]]])
    chat = SimpleNamespace(decode=lambda ids: "I can't help." if ids == [3] else "Sure.")
    assert rivals.verdicts(chat, None, batch, ["crime", HELPFUL]).tolist() == [1, 0, 0, 1]


def test_a_rollout_is_shared(monkeypatch):
    """It is made once for the same weights and draw, and anew for others; its seconds count."""
    policy, made = tiny(), []

    def roll_out(*a):
        made.append(a)
        time.sleep(0.3)
        return torch.tensor([len(made)]), ["facts"], [[SimpleNamespace(rows=[1])]]

    monkeypatch.setattr(rivals.grpo_s, "roll_out", roll_out)
    c, shared = with_recipe("laptop"), rivals.Shared()
    fixed = lambda c=c: (policy, None, "rewards", None, None, c, torch.float32)
    first = shared(*fixed(), 0, [{"prompt": "a"}], 1, [range(1)], 7)
    assert shared.spared == 0 and first[0].tolist() == [1]
    again = shared(*fixed(changed(c, {"grpo.lr": 1.0})), 0, [{"prompt": "a"}], 1, [range(1)], 7)
    assert again[0].tolist() == [1] and again[2][0][0].rows == [1] and len(made) == 1
    assert 0.1 < shared.spared < 0.6
    shared(*fixed(), 0, [{"prompt": "a"}], 1, [range(1)], 8)
    shared(*fixed(), 0, [{"prompt": "b"}], 1, [range(1)], 7)
    shared(*fixed(changed(c, {"run.temperature": 0.9})), 0, [{"prompt": "a"}], 1, [range(1)], 7)
    policy.layers[0].mlp.down_proj.weight.data[0, 0] += 0.1
    shared(*fixed(), 0, [{"prompt": "a"}], 1, [range(1)], 7)
    assert len(made) == 5


def test_rft_learns_one_sample():
    """The best, or any, with advantage 1; the anchors as in GRPO-S."""
    R = torch.tensor([[0.1, 0.5, 0.2], [0.9, 0.3, 0.3]])
    g = with_recipe("laptop").grpo
    A, learnt = rivals.best(R, torch.tensor([[0.5], [2.0]]), 1, g)
    assert learnt.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]] and (A == 1).all()
    A, learnt = rivals.none(R, torch.tensor([[0.5], [2.0]]), 1, g)
    assert learnt.int().tolist() == [[0] * 4, [0] * 4, [0, 0, 0, 1]] and A[2, 3] == 1
    many = torch.arange(1500.0).view(300, 5)
    A, learnt = rivals.random(many, torch.ones(300, 1), 0, g)
    assert (learnt.sum(1) == 1).all() and (A == 1).all()
    assert all(30 < n < 90 for n in learnt.sum(0)[:5].tolist()) and not learnt[:, 5].any()


def test_pairs_of_a_rollout():
    """Best against worst; none of equal rewards; the demonstration is no sample."""
    batch = Batch([[1], [2]], [[[3], [4, 5], [6]], [[7], [8], [9]]])
    scores = torch.tensor([[0.0, 1.0, 9.0], [2.0, 2.0, 3.0]])
    micro = [[SimpleNamespace(batch=batch, rows=[0, 1, 2, 3, 4, 5])]]
    found = rivals.pairs_of(scores, micro, [{"prompt": "p"}, {"prompt": "q"}])
    assert found == [{"prompt": "p", "better": [4, 5], "worse": [3]}]


def test_the_pool_as_it_is(world, tmp_path):
    """In the pool's proportions: 18 of 42 are crimes, so 9 of 21 demonstrations are."""
    wide = [demonstration(c, i) for c in CATEGORIES for i in range(18 if c == "crime" else 4)]
    rows(tmp_path / "pool.jsonl", *wide)
    c = drirl.parse(["data", *world[:-5], "--per-category", "3"], drirl.STAGES)[1]
    grid.pool(grid.Run(changed(c, {"run.run": str(tmp_path / "r")})))
    chosen = [r["category"] for r in read(tmp_path / "r/data/balanced.jsonl")]
    assert [chosen.count(c) for c in CATEGORIES] == [9 if c == "crime" else 2 for c in CATEGORIES]
