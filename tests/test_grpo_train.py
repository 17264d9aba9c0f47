"""grpo_s.py: the training loop on a tiny transformer."""

import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_LLAMA

import grpo_s
from config import Config, IRLConfig, changed
from data import CATEGORIES, HELPFUL
from encoder import WordEncoder, similarities
from model import Transformer
from reward import RewardModels
from sample import run_blocks
from support import rollout
from support.hf import read_config
from support.resume import Loop
from support.rollout import pick
from support.run import borrow

# ---------------------------------------------------------------------------- a tiny world


class Letters:
    """A chat over the alphabet: token i is the i-th letter, 0 ends the text."""

    eos = (0,)

    def prompt(self, text):
        return [1 + (ord(c) - 97) % 15 for c in text]

    def answer(self, text):
        return self.prompt(text) + [0]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids if i)

    def ended(self, ids):
        return bool(ids) and ids[-1] == 0


class Share:
    """A reward: the share of token 7 in the completion. Expects the reference's states."""

    def __init__(self, reference, below):
        self.reference, self.below = reference, below

    def __call__(self, x, batch, categories):
        assert torch.equal(x, run_blocks(self.reference, batch, stop=self.below))
        assert len(categories) == len(batch.source[0])
        return ((batch.completions == 7) & batch.mask).sum(1) / batch.mask.sum(1)


class ShareByCategory(Share):
    """Worth more the longer the category's name: categories must come with their own prompts."""

    def __call__(self, x, batch, categories):
        worth = torch.tensor([float(len(c)) for c in categories])
        return super().__call__(x, batch, categories) * worth[batch.owner]


SHAPE = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
ROWS = [
    {"prompt": p, "category": c, "response": "abcg"}
    for c in ("crime", "insult", HELPFUL)
    for p in ("abc", "d", "efghi", "jk")
]
SMALL = {"run.max_new_tokens": 6, "grpo.rollouts": 2, "grpo.prompts": 4, "grpo.samples": 4}
SMALL |= {"grpo.blocks": 1, "grpo.lr": 1e-3, "grpo.beta_kl": 0.02, "grpo.std_eps": 0.5}
SMALL |= {"run.temperature": 0.9}


def tiny():
    torch.manual_seed(0)
    return Transformer(read_config({**TINY_LLAMA, **SHAPE}))


def run(reward=Share, below=1, dtype=torch.float32, rows=ROWS, history=(), held=(), **grpo):
    """Trains a new policy: (policy, reference, records)."""
    policy, reference = tiny().to(dtype), tiny().to(dtype).requires_grad_(False)
    c = changed(Config(), {**SMALL, **{f"grpo.{name}": value for name, value in grpo.items()}})
    fixed = (reference, reward(reference, below), Letters(), WordEncoder(16), rows, c, dtype)
    records = []
    loop = Loop("grpo", log=lambda **r: records.append(r))
    grpo_s.train(policy, *fixed, history, loop, held)
    return policy, reference, records


def spied(monkeypatch, *names) -> dict:
    """{name: (arguments, result) of each call} of functions in grpo_s and support.rollout."""
    seen = {name: [] for name in names}

    def watch(name, module):
        real = getattr(module, name)

        def call(*args, **more):
            result = real(*args, **more)
            seen[name].append((args, result))
            return result

        monkeypatch.setattr(module, name, call)

    for name in names:
        for module in (m for m in (grpo_s, rollout) if hasattr(m, name)):
            watch(name, module)
    return seen


# ---------------------------------------------------------------------------- what is drawn


def test_pick():
    rows = [{"category": c, "prompt": f"{c} {i}"} for c in (*CATEGORIES, HELPFUL) for i in range(3)]
    batches = pick(rows, 12, random.Random(0))
    drawn = [next(batches) for _ in range(7)]
    for batch in drawn:
        assert [r["category"] == HELPFUL for r in batch] == [False] * 6 + [True] * 6
        names = [r["category"] for r in batch[:6]]
        assert names == sorted(names)
    assert len({r["category"] for r in drawn[0][:6]}) == 6
    harmful = [r for batch in drawn for r in batch[:6]]  # 42: six turns of seven categories
    assert Counter(r["category"] for r in harmful) == {c: 6 for c in CATEGORIES}
    assert set(Counter(r["prompt"] for r in harmful).values()) == {2}
    again = pick(rows, 12, random.Random(0))
    assert [next(again) for _ in range(7)] == drawn


def test_prompts_without_a_demonstration_come_first():
    """In a category with eight of them they alone are drawn, in one with fewer all alike."""
    rows = [{"category": c, "prompt": f"{c} {i}"} for c in ("crime", HELPFUL) for i in range(10)]
    for r in rows[2:10] + rows[13:]:
        r["borrowed"] = True
    drawn = [r["prompt"] for r in next(pick(rows, 20, random.Random(0)))]
    assert set(drawn[:10]) == {f"crime {i}" for i in range(2, 10)}
    assert sorted(drawn[10:]) == [f"{HELPFUL} {i}" for i in range(10)]


def test_borrow():
    """The most similar prompt's demonstration, of the same category."""
    known = (("steal a car", "crime", "1"), ("mock a boy", "crime", "2"))
    known += (("mock a girl", "insult", "3"),)
    rows = [{"prompt": p, "category": c, "response": a} for p, c, a in known]
    bare = (("mock a girl now", "insult"), ("mock a girl", "crime"), ("steal the car", "crime"))
    found = borrow([{"prompt": p, "category": c} for p, c in bare], rows, WordEncoder())
    assert [(r["prompt"], r["response"]) for r in found] == [
        ("mock a girl", "2"),
        ("steal the car", "1"),
        ("mock a girl now", "3"),
    ]
    assert all(r["borrowed"] for r in found)


# ---------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("rollouts", [1, 2])
@pytest.mark.parametrize("blocks, below", [(1, 1), (1, 0), (2, 1), (0, 1)])
def test_train_changes_only_the_top_blocks(rollouts, blocks, below):
    """The reference stays as it was."""
    policy, reference, records = run(below=below, rollouts=rollouts, blocks=blocks)
    before = tiny().state_dict()
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())
    changed = {k for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    top = {k for k in before if k.startswith(("layers.1", "norm"))}
    assert changed == (top if blocks == 1 else before.keys())
    assert [r["step"] for r in records] == list(range(1, rollouts + 1))
    wanted = "stage loss grad_norm kl entropy clipped_low harmful_reward helpful_reward agree "
    wanted += "harmful_refused helpful_right harmful_auc reward_std similarity alpha ended seconds"
    missing = set(wanted.split()) - records[0].keys()
    assert missing <= {"harmful_auc"} and len(records[0]["alpha"]) == 4
    assert abs(records[0]["loss"]) < 1e-6 and records[0]["kl"] < 1e-9
    assert records[0]["grad_norm"] > 0


@pytest.mark.parametrize("factor", (0, 2))
def test_training_differentiates_loss(monkeypatch, factor):
    """A factor of grpo_s.loss is one of the gradient. There is no other objective."""
    *_, (plain,) = run(rollouts=1, tokens_per_batch=40, anchor=2)
    real, calls = grpo_s.loss, []

    def scaled(*args):
        value, info = real(*args)
        calls.append(args)
        return factor * value, {**info, "kl": 1.0, "clipped_low": 2.0}

    monkeypatch.setattr(grpo_s, "loss", scaled)
    policy, reference, (record,) = run(rollouts=1, tokens_per_batch=40, anchor=2)
    for name in ("loss", "grad_norm"):
        assert record[name] == pytest.approx(factor * plain[name], rel=1e-5)
    assert plain["grad_norm"] > 0 and len(calls) > 1
    assert (record["kl"], record["clipped_low"]) == (len(calls), 2 * len(calls))
    same = [torch.equal(a, b) for a, b in zip(policy.parameters(), reference.parameters())]
    assert all(same) == (factor == 0)


def test_train_with_shadow_rewards():
    def shadows(reference, below):
        rewards = RewardModels(reference, IRLConfig(reward_blocks=1)).requires_grad_(False)
        for shadow in rewards.shadows.values():
            torch.nn.init.normal_(shadow.value.weight)
        return rewards

    *_, records = run(shadows)
    assert all(math.isfinite(r["loss"]) and r["reward_std"] > 0 for r in records)


@pytest.mark.parametrize(
    "more",
    [
        {"clip": 0.3},
        {"members": "ends"},
        {"anchor": 3, "clip_high": 0.0},
        {"members": "ends", "anchor": 1, "batch": 2, "prompts": 6, "passes": 2},
    ],
    ids=["all", "ends", "anchors", "several updates"],
)
def test_what_an_update_is_made_of(monkeypatch, more):
    """Rewards, gaps, similarities, advantages and the log of a rollout: each by hand."""
    names = "generate", "difficulty", "completion_logps", "loss"
    seen = spied(monkeypatch, *names)
    rows = rows_of_all = [{**r, "response": r["prompt"] + "g"} for r in ROWS]
    *_, records = run(rows=rows, rollouts=1, tokens_per_batch=40, **more)
    record, losses = records[0], [args for args, _ in seen["loss"]]
    (_, prompts, G, _, temperature), tokens = seen["generate"][0]
    assert temperature == 0.9 and all(len(args) == 3 for args, _ in seen["completion_logps"])
    (W, gaps, categories), alpha = seen["difficulty"][0]
    chat, P = Letters(), len(prompts)
    response = {tuple(chat.prompt(r["prompt"])): r["response"] for r in rows}
    share = lambda ids: ids.count(7) / len(ids)
    K = P // more.get("batch", P)
    places = [p for u in range(K) for p in range(u, P, K)]  # generate meets update after update
    wanted, close = Counter(), lambda a: round(a, 5) + 0.0  # how often which advantage is learnt
    for i, p in enumerate(places):
        prompt, samples = prompts[i], tokens[G * i : G * i + G]
        demo = response[tuple(prompt)]
        R, R_demo = torch.tensor([share(o) for o in samples]), share(chat.answer(demo))
        torch.testing.assert_close(gaps[p], R_demo - R)
        texts = [chat.decode(o) for o in samples]
        torch.testing.assert_close(W[p], similarities(WordEncoder(16), [texts], [demo])[0])
        A = alpha[p] * (R - R.mean()) / (R.std(correction=0) + 0.5)
        for k in range(G):
            if "members" in more and (A[k] == 0 or R[k] not in (R.max(), R.min())):
                continue
            wanted[tuple(samples[k]), close(A[k].item())] += 1
    passes, found = more.get("passes", 1), Counter()
    last = [args for args, _ in seen["completion_logps"]][-len(losses) :]  # loss by loss
    for (_, _, batch), args in zip(last, losses):
        rows = [tuple(ids[m].tolist()) for ids, m in zip(batch.completions, batch.mask)]
        found.update(zip(rows, map(close, args[3].tolist())))
    anchors = found - Counter({pair: passes * n for pair, n in wanted.items()})
    assert sum(found.values()) == passes * sum(wanted.values()) + sum(anchors.values())
    demos = {tuple(chat.answer(r["response"])) for r in rows_of_all}
    assert all(a == 1.0 and text in demos for text, a in anchors)
    assert sum(anchors.values()) == more.get("anchor", 0) * K * passes
    S = sum(wanted.values()) + sum(anchors.values()) // passes
    limits = (more.get("clip", 0.2), more.get("clip_high", 0.2), 0.02)
    assert {args[5:8] for args in losses} == {limits}
    assert sum(len(args[3]) / args[8] for args in losses) == pytest.approx(K * passes)
    assert K > 1 or {args[8] for args in losses} == {S}
    assert record["length"] == pytest.approx(sum(map(len, tokens)) / len(tokens))
    assert record["ended"] == pytest.approx(sum(ids[-1] == 0 for ids in tokens) / len(tokens))
    assert record["gap_demo_minus_sample"] == pytest.approx(gaps.mean().item(), abs=1e-6)
    assert record["alpha"] == pytest.approx(alpha[:, 0].tolist(), abs=1e-4)
    assert len(records) == K * passes and all("alpha" not in r for r in records[1:])


def test_running_means_start_from_history(monkeypatch):
    """W of "ab" to "ab" is 1, of "jk" a cosine; gaps are 0.4 and 0.3. A batch's means blend in."""
    old = {"response": "ab", "reward_demo": 0.5, "samples": [[0.1, "ab"], [0.2, "jk"]]}
    history = [{**old, "category": c} for c in ("crime", "insult", HELPFUL)]
    seen = spied(monkeypatch, "difficulty", "start_means")
    run(rollouts=1, history=history)
    (W, gaps, categories), _ = seen["difficulty"][0]
    means = seen["start_means"][0][1]  # train goes on with these
    a, b = WordEncoder(16).embed(["ab", "jk"])
    delta = 1 - (1 + (a @ b).item()) / 2
    assert {"crime", "insult", HELPFUL} == set(categories)
    for name in set(categories):
        mine = [p for p, x in enumerate(categories) if x == name]
        new_delta, new_gap = (1 - W[mine]).mean().item(), gaps[mine].mean().item()
        assert means["deltas"][name] == pytest.approx((delta + new_delta) / 2, abs=1e-6)
        assert means["gap_means"][name] == pytest.approx((0.35 + new_gap) / 2, abs=1e-6)


# ---------------------------------------------------------------------------- invariants


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"members": "ends", "passes": 2, "batch": 3},
        {"batch": 2, "passes": 2, "anchor": 1, "clip_high": 0.0},
        {"batch": 3, "members": "ends", "anchor": 2, "blocks": 0},
    ],
    ids=["plain", "ends, twice", "small updates", "whole model"],
)
def test_micro_batches_do_not_change_training(more):
    done = []
    for tokens in (4096, 1, 50):
        values = {"tokens_per_batch": tokens, "prompts": 6, **more}
        policy, _, records = run(ShareByCategory, dtype=torch.float64, **values)
        done.append((policy.state_dict(), records))
    (first, first_records), *others = done
    for state, records in others:
        assert all(torch.allclose(v, first[k], rtol=0, atol=1e-10) for k, v in state.items())
        for r, want in zip(records, first_records, strict=True):
            for key in ("loss", "kl", "clipped_low", "grad_norm", "entropy"):
                assert r[key] == pytest.approx(want[key], rel=1e-10, abs=1e-10), key


@pytest.mark.parametrize("blocks", (0, 1))
def test_training_in_bfloat16(blocks):
    """As the stages train: a float32 policy under autocast, a bfloat16 reference.

    The weights stay float32 and learn what bfloat16 can't hold; at first pi is all but pi_ref.
    """
    policy, reference, records = tiny(), tiny().bfloat16().requires_grad_(False), []
    c = changed(Config(), {**SMALL, "grpo.blocks": blocks, "grpo.beta_kl": 0.1})
    fixed = (reference, Share(reference, 1), Letters(), WordEncoder(16), ROWS, c, torch.bfloat16)
    grpo_s.train(policy, *fixed, loop=Loop("grpo", log=lambda **r: records.append(r)))
    assert abs(records[0]["kl"]) < 0.01 and all(r["grad_norm"] > 0 for r in records)
    pairs = zip(policy.parameters(), tiny().parameters())
    moved = [p for p, before in pairs if not torch.equal(p, before)]
    assert moved and not any(torch.equal(p, p.bfloat16().float()) for p in moved)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_learning_rates(monkeypatch):
    """Linear to zero over the rollouts, each update at the middle of its share; passes alike."""
    seen = []
    monkeypatch.setattr(grpo_s, "set_lr", lambda optimizer, *args: seen.append(args))
    run(rollouts=2, passes=3, batch=2, lr=0.5)
    order = [0, 1] * 3 + [2, 3] * 3
    assert seen == [(0.5, pytest.approx((k + 0.5) / 4)) for k in order]


def test_a_rollout_serves_several_steps():
    """From the second step on the ratio to the policy that sampled leaves 1, and the clip acts."""
    found = run(rollouts=1, lr=0.05, batch=1)[2]
    first, *_, last = found
    assert first["clipped_low"] == first["clipped_high"] == 0 and abs(first["loss"]) < 1e-6
    assert max(r["clipped_low"] + r["clipped_high"] for r in found) > 0
    assert last["kl"] != 0 and abs(last["loss"]) > 1e-3 and last["step"] == 4


def test_pi_old_is_of_the_rollout(monkeypatch):
    """Also where an earlier update of the same pass has moved the policy."""
    seen = spied(monkeypatch, "loss")
    run(rollouts=1, batch=2, lr=0.05, passes=2, beta_kl=0.0)
    first = {}
    for (logp, old, ref, *_), _ in seen["loss"]:  # the policy begins as the reference
        torch.testing.assert_close(old, ref)
        first.setdefault(tuple(ref.flatten().tolist()), logp.detach())
    logps = [logp for (logp, *_), _ in seen["loss"]]
    assert len(logps) == 4 and len(first) == 2
    assert (logps[1] - seen["loss"][1][0][1]).abs().max() > 1e-3


def test_gradients_do_not_add_up_over_steps():
    """Steps of learning rate 0 all see the same gradient."""
    norms = [r["grad_norm"] for r in run(rollouts=1, lr=0.0, passes=3)[2]]
    assert norms[0] == norms[1] == norms[2] > 0


def test_passes_begin_anew_in_other_orders(monkeypatch):
    """Each pass's first update is on pi_old itself; the orders differ; averages are taken."""
    draws = rollout.plan(
        ROWS, changed(Config(), {"grpo.prompts": 64, "grpo.batch": 2, "grpo.passes": 2})
    )
    _, updates, order, _ = next(draws)
    assert len(updates) == 32 and sorted(order[:32]) == sorted(order[32:]) == list(range(32))
    assert order[:32] != order[32:]
    more = {"rollouts": 1, "batch": 2, "passes": 2, "lr": 0.05, "clip_high": 0.2}
    mean, _, records = run(**more)
    assert records[2]["kl"] == pytest.approx(0, abs=1e-6) and abs(records[1]["kl"]) > 1e-4
    weight = lambda policy: policy.layers[1].mlp.down_proj.weight
    further, *_ = run(**more, extrapolate=0.5)  # half the way from the start once more
    want = weight(mean) + 0.5 * (weight(mean) - weight(tiny()))
    assert torch.allclose(weight(further), want, rtol=0, atol=1e-6)
    assert not torch.allclose(weight(mean), want, rtol=0, atol=1e-3)
    one, *_ = run(**{**more, "passes": 1})
    monkeypatch.setattr(grpo_s, "passes", lambda policy, optimizer, order, g: enumerate(order))
    last, *_ = run(**{**more, "passes": 1})
    assert not torch.equal(weight(last), weight(one))


def one_weight(updates, **settings):
    """A weight; the states of its AdamW; passes; a step that leaves a value."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    g = SimpleNamespace(**{"updates": updates, "passes": 1, "extrapolate": 0.0, **settings})

    def move(value):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        torch.nn.init.constant_(model.weight, value)

    return model.weight, optimizer.state, grpo_s.passes(model, optimizer, "abcdef", g), move


def test_the_mean_of_a_pass():
    """Of the weights 1, 2 and 4, by hand: decays 1/10, 2/11 and 3/12. One update has none."""
    weight, state, passes, move = one_weight(3)
    for k, value in enumerate((1.0, 2.0, 4.0)):
        assert next(passes) == (k, "abc"[k])
        move(value)
    assert list(passes) == [] and state[weight]["step"] == 3
    assert weight.item() == pytest.approx(1 / 4 * (2 / 11 * 1 + 9 / 11 * 2) + 3 / 4 * 4)
    weight, _, passes, move = one_weight(1)
    assert next(passes) == (0, "a")
    move(8.0)
    assert list(passes) == [] and weight.item() == 8


def test_passes():
    """Each begins with the weight 7 and new moments; they end at 1, 4, 10: mean 5.

    Half the way from 7 to 5 further is 4.
    """
    weight, state, passes, move = one_weight(2, passes=3, extrapolate=0.5)
    move(7.0)
    for end, part in ((1.0, "ab"), (4.0, "cd"), (10.0, "ef")):
        for k in range(2):
            assert next(passes) == (k, part[k])
            assert k or (weight.item() == 7 and not state[weight])
            move(end)
            assert state[weight]["step"] == 1 + k
    assert list(passes) == [] and weight.item() == pytest.approx(4)
    assert torch.is_grad_enabled()


def test_cosine_of_gradients(monkeypatch):
    """By hand; then of the updates' own gradients. A pass's first update has none before it."""
    a = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    b = [torch.zeros(2), torch.tensor([[2.0]])]
    assert grpo_s.cosine(a, b) == pytest.approx(0.8)
    assert grpo_s.cosine(a, [-x for x in a]) == pytest.approx(-1) and grpo_s.cosine(b, b[:0]) == 0
    real, seen = grpo_s.parallel.clip_gradients, []

    def spy(parameters, limit):
        seen.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return real(parameters, limit)

    monkeypatch.setattr(grpo_s.parallel, "clip_gradients", spy)
    *_, records = run(passes=2, batch=2)
    found = [r.get("cosine") for r in records]
    assert len(found) == 8 and found[::2] == [None] * 4
    pairs = zip(seen[::2], seen[1::2])
    want = [torch.cosine_similarity(x, y, dim=0).item() for x, y in pairs]
    assert found[1::2] == pytest.approx(want, abs=1e-5)
    assert [r["sequences"] for r in records] == [8] * 8


def test_margin(monkeypatch):
    """By loops over the samples, whose A is not 1; the first update is on pi_ref itself."""
    seen = spied(monkeypatch, "loss")
    *_, records = run(rollouts=1, batch=2, lr=0.05, anchor=1)
    assert len(seen["loss"]) == len(records) == 2
    for (args, _), record in zip(seen["loss"], records):
        logp, _, ref, A, mask = (x.tolist() for x in args[:5])
        found = []
        for a, *row in zip(A, logp, ref, mask):
            gains = [x - y for x, y, real in zip(*row) if real]
            found += [math.copysign(sum(gains) / len(gains), a * sum(gains))] if a != 1 else []
        assert len(found) == 8
        assert record["margin"] == pytest.approx(sum(found) / 8, abs=1e-6)
    assert abs(records[0]["margin"]) < 1e-6 < abs(records[1]["margin"])


class Fading(Share):
    """Its second call, for an update's samples, finds all of them equal."""

    calls = 0

    def __call__(self, x, batch, categories):
        self.calls += 1
        return super().__call__(x, batch, categories) * (self.calls != 2)


def test_no_cosine_across_an_update_without_sequences():
    *_, records = run(Fading, members="ends", prompts=8, batch=2, rollouts=1, passes=3)
    learnt = [r["sequences"] > 0 for r in records]
    found = ["cosine" in r for r in records]
    assert learnt.count(False) == 3 and found.count(True) < 6  # it isn't the last of each pass
    assert found == [n % 4 > 0 and learnt[n] and learnt[n - 1] for n in range(12)]


def test_an_update_without_sequences(monkeypatch):
    """All rewards are equal, and no anchors: AdamW's momentum must not move the policy."""
    learnt, real = [], Loop.descend

    def descend(loop, **values):
        real(loop, **values)
        learnt.append({name: p.detach().clone() for name, p in loop.learnt.items()})

    monkeypatch.setattr(Loop, "descend", descend)
    policy, reference, records = run(Fading, members="ends", prompts=2)
    assert [r["sequences"] > 0 for r in records] == [True, False]
    after, before = learnt[0], dict(reference.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in after.items())
    assert all(torch.equal(p, dict(policy.named_parameters())[name]) for name, p in after.items())


def test_held_out_prompts_are_looked_at():
    """Always by the same draws. What is learnt does not change by it."""
    held = [{**r, "prompt": "h" + r["prompt"]} for r in ROWS[::3]]
    plain, _, before = run(rollouts=2)
    policy, _, records = run(rollouts=2, held=held)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), policy.parameters()))
    assert "held_right" not in before[0] and records[0]["held_harmful_reward"] >= 0
    *_, still = run(rollouts=2, held=held, lr=0.0)
    assert len({r["held_reward_std"] for r in still}) == 1


def test_training_increases_what_the_reward_counts():
    *_, records = run(below=0, rollouts=30, blocks=0, samples=8, lr=1e-2, beta_kl=0.0)
    share = [(r["harmful_reward"] + r["helpful_reward"]) / 2 for r in records]
    assert sum(share[:3]) / 3 < 0.25 and sum(share[-3:]) / 3 > 0.6
