"""grpo_s.py: the training loop on a tiny transformer."""

import math
import random
from collections import Counter

import pytest
import torch
from conftest import TINY_LLAMA

import grpo_s
import sample
from config import Config, IRLConfig, changed
from data import CATEGORIES, HELPFUL
from encoder import WordEncoder, similarities
from grpo_s import learnt_members, pick
from model import Transformer
from reward import RewardModels
from sample import run_blocks
from support.hf import read_config
from support.resume import Loop
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


def run(reward=Share, below=1, dtype=torch.float32, rows=ROWS, history=(), **grpo):
    """Trains a new policy: (policy, reference, records)."""
    policy, reference = tiny().to(dtype), tiny().to(dtype).requires_grad_(False)
    c = changed(Config(), {**SMALL, **{f"grpo.{name}": value for name, value in grpo.items()}})
    fixed = (reference, reward(reference, below), Letters(), WordEncoder(16), rows, c, dtype)
    records = []
    loop = Loop("grpo", log=lambda **r: records.append(r))
    grpo_s.train(policy, *fixed, history, loop)
    return policy, reference, records


def spied(monkeypatch, *names) -> dict:
    """{name: (arguments, result) of each call} of functions in grpo_s."""
    seen = {name: [] for name in names}

    def watch(name, real):
        def call(*args, **more):
            result = real(*args, **more)
            seen[name].append((args, result))
            return result

        monkeypatch.setattr(grpo_s, name, call)

    for name in names:
        watch(name, getattr(grpo_s, name))
    return seen


# ---------------------------------------------------------------------------- what is drawn


def test_pick():
    rows = [{"category": c, "prompt": f"{c} {i}"} for c in (*CATEGORIES, HELPFUL) for i in range(3)]
    batches = pick(rows, 10, 0.4, random.Random(0))
    drawn = [next(batches) for _ in range(7)]
    for batch in drawn:
        assert [r["category"] == HELPFUL for r in batch] == [False] * 6 + [True] * 4
        names = [r["category"] for r in batch[:6]]
        assert names == sorted(names)
    assert len({r["category"] for r in drawn[0][:6]}) == 6
    harmful = [r for batch in drawn for r in batch[:6]]  # 42: six turns of seven categories
    assert Counter(r["category"] for r in harmful) == {c: 6 for c in CATEGORIES}
    assert set(Counter(r["prompt"] for r in harmful).values()) == {2}
    again = pick(rows, 10, 0.4, random.Random(0))
    assert [next(again) for _ in range(7)] == drawn


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


# ---------------------------------------------------------------------------- what is learnt from


def group(spread: float, demo: float, category: str, **more):
    """Rewards of two samples with this std and of the demonstration; the demonstration's row."""
    return [0.0, 2 * spread, demo], {"category": category, **more}


def members(*groups, imitate, keep):
    scores, part = zip(*groups)
    learnt = learnt_members(torch.tensor(scores), list(part), imitate, keep)
    return ["".join(map(str, row)) for row in learnt.int().tolist()]


def test_groups_of_the_largest_spread_are_learnt_from():
    """The share `keep` of harmful and of harmless ones each, rounded up."""
    groups = [group(1, 0, "crime"), group(4, 0, "insult")]
    groups += [group(spread, 0, HELPFUL) for spread in (0.1, 0.3, 0.2)]
    assert members(*groups, imitate=False, keep=0.5) == ["000", "110", "000", "110", "110"]
    assert members(*groups, imitate=True, keep=0.5) == ["000", "111", "000", "111", "111"]
    assert members(*groups, imitate=False, keep=1.0) == ["110"] * 5
    assert members(*groups[:2], imitate=False, keep=0.1) == ["000", "110"]


def test_demonstrations_count_in_the_spread_if_all_are_learnt_from():
    """A borrowed one is not; the groups are then compared by their samples."""
    far, wide = group(1, 20, "crime"), group(2, 2, "crime")
    assert members(far, wide, imitate=True, keep=0.5) == ["111", "000"]
    assert members(far, wide, imitate=False, keep=0.5) == ["000", "110"]
    far[1]["borrowed"] = True
    assert members(far, wide, imitate=True, keep=0.5) == ["000", "111"]
    assert members(far, wide, imitate=True, keep=1.0) == ["110", "111"]


def test_a_borrowed_demonstration_is_not_learnt_from(monkeypatch):
    """Its group's samples alone enter the loss; its reward enters the gap."""
    seen = spied(monkeypatch, "learnt_members", "loss", "difficulty")
    rows = [{**r, "borrowed": i % 2 == 0} for i, r in enumerate(ROWS)]
    run(rows=rows, rollouts=1, prompts=8, imitate=True)
    (scores, part, *_), _ = seen["learnt_members"][0]
    borrowed = [r["borrowed"] for r in part]
    members = 8 * 4 + borrowed.count(False)
    assert 0 < sum(borrowed) < 8
    assert all(args[7] == members for args, _ in seen["loss"])
    assert sum(len(args[3]) for args, _ in seen["loss"]) == members
    torch.testing.assert_close(seen["difficulty"][0][0][1], scores[:, -1:] - scores[:, :-1])


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
    wanted = "stage loss grad_norm kl clipped harmful_reward helpful_reward harmful_refused "
    wanted += "helpful_refused reward_std similarity alpha length ended seconds"
    assert set(wanted.split()) <= records[0].keys() and len(records[0]["alpha"]) == 4
    assert abs(records[0]["loss"]) < 1e-6 and records[0]["kl"] < 1e-9
    assert records[0]["grad_norm"] > 0


@pytest.mark.parametrize("factor", (0, 2))
def test_training_differentiates_loss(monkeypatch, factor):
    """A factor of grpo_s.loss is one of the gradient. There is no other objective."""
    *_, (plain,) = run(rollouts=1, tokens_per_batch=40, imitate=True)
    real, calls = grpo_s.loss, []

    def scaled(*args):
        value, info = real(*args)
        calls.append(args)
        return factor * value, {"kl": 1.0, "clipped": 2.0}

    monkeypatch.setattr(grpo_s, "loss", scaled)
    policy, reference, (record,) = run(rollouts=1, tokens_per_batch=40, imitate=True)
    for name in ("loss", "grad_norm"):
        assert record[name] == pytest.approx(factor * plain[name], rel=1e-5)
    assert plain["grad_norm"] > 0 and len(calls) > 1
    assert (record["kl"], record["clipped"]) == (len(calls), 2 * len(calls))
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


@pytest.mark.parametrize("imitate", [False, True])
def test_what_an_update_is_made_of(monkeypatch, imitate):
    """Rewards, gaps, similarities, advantages and the log of a rollout: each by hand."""
    names = "generate", "difficulty", "advantages", "completion_logps", "loss"
    seen, more = spied(monkeypatch, *names), {"clip": 0.3, "imitate": imitate}
    rows = [{**r, "response": r["prompt"] + "g"} for r in ROWS]
    *_, (record,) = run(rows=rows, rollouts=1, tokens_per_batch=40, **more)
    (_, prompts, G, _, temperature), rollout = seen["generate"][0]
    assert {temperature, *(args[3] for args, _ in seen["completion_logps"])} == {0.9}
    (W, gaps, categories), alpha = seen["difficulty"][0]
    scores = seen["advantages"][0][0][0]
    losses = [args for args, _ in seen["loss"]]
    assert len(losses) > 1  # micro-batches
    assert {args[5:] for args in losses} == {(0.3, 0.02, len(prompts) * (G + imitate))}
    A = torch.cat([args[3] for args in losses]).view(-1, G + imitate)
    chat, tokens = Letters(), rollout
    response = {tuple(chat.prompt(r["prompt"])): r["response"] for r in rows}
    share = lambda ids: ids.count(7) / len(ids)
    for p, prompt in enumerate(prompts):
        demo, samples = response[tuple(prompt)], tokens[G * p : G * p + G]
        R, R_demo = torch.tensor([share(o) for o in samples]), share(chat.answer(demo))
        everyone = torch.cat((R, torch.tensor([R_demo])))
        torch.testing.assert_close(scores[p], everyone)
        torch.testing.assert_close(gaps[p], R_demo - R)
        texts = [chat.decode(o) for o in samples]
        torch.testing.assert_close(W[p], similarities(WordEncoder(16), [texts], [demo])[0])
        want = alpha[p] * (R - R.mean()) / (R.std(correction=0) + 0.5)
        torch.testing.assert_close(A[p, :G], want)
        if imitate:
            want = alpha[p, 0] * (R_demo - R.mean()) / (everyone.std(correction=0) + 0.5)
            torch.testing.assert_close(A[p, G], want)
    assert record["length"] == pytest.approx(sum(map(len, tokens)) / len(tokens))
    assert record["ended"] == sum(ids[-1] == 0 for ids in tokens) / len(tokens)
    for name, harmless in (("harmful_reward", False), ("helpful_reward", True)):
        mine = [p for p, category in enumerate(categories) if (category == HELPFUL) == harmless]
        assert record[name] == pytest.approx(scores[mine, :-1].mean().item())
    assert record["gap_demo_minus_sample"] == pytest.approx(gaps.mean().item(), abs=1e-6)


def test_logged_advantages_are_of_what_is_learnt_from(monkeypatch):
    seen = spied(monkeypatch, "advantages", "learnt_members")
    *_, (record,) = run(rollouts=1, prompts=8, keep=0.5, imitate=True)
    A, learnt = (seen[name][0][1] for name in ("advantages", "learnt_members"))
    assert learnt.sum() == 4 * 5
    samples, demos = A[:, :-1][learnt[:, :-1]], A[:, -1][learnt[:, -1]]
    assert record["advantage_samples"] == pytest.approx(samples.abs().mean().item())
    assert record["advantage_demonstration"] == pytest.approx(demos.mean().item())


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
    "keep, imitate, iterations", [(1.0, False, 1), (0.5, False, 1), (0.5, True, 2)]
)
def test_micro_batches_do_not_change_training(keep, imitate, iterations):
    done = []
    for tokens, recompute in ((4096, False), (1, False), (50, False), (4096, True)):
        more = {"tokens_per_batch": tokens, "recompute": recompute, "prompts": 6, "keep": keep}
        more |= {"imitate": imitate, "iterations": iterations}
        policy, _, records = run(ShareByCategory, dtype=torch.float64, **more)
        done.append((policy.state_dict(), records))
    (first, first_records), *others = done
    for state, records in others:
        assert all(torch.allclose(v, first[k], rtol=0, atol=1e-10) for k, v in state.items())
        for r, want in zip(records, first_records, strict=True):
            for key in ("loss", "kl", "clipped", "grad_norm", "harmful_reward"):
                assert r[key] == pytest.approx(want[key], rel=1e-10, abs=1e-10), key


def test_recomputation_in_bfloat16(monkeypatch):
    """As the stages train: a float32 policy under autocast, a bfloat16 reference.

    The backward pass is outside autocast, and recomputes under it.
    """
    done, calls, real = [], [], sample.checkpoint
    watch = lambda *args, **more: calls.append(args) or real(*args, **more)
    monkeypatch.setattr(sample, "checkpoint", watch)
    for recompute in (False, True):
        policy, reference, records = tiny(), tiny().bfloat16().requires_grad_(False), []
        values = {"grpo.recompute": recompute, "grpo.blocks": 0, "grpo.iterations": 2}
        c, rewards = changed(Config(), {**SMALL, **values}), Share(reference, 1)
        fixed = (reference, rewards, Letters(), WordEncoder(16), ROWS, c, torch.bfloat16)
        grpo_s.train(policy, *fixed, loop=Loop("grpo", log=lambda **r: records.append(r)))
        numbers = [r[name] for r in records for name in ("loss", "grad_norm")]
        done.append((policy.state_dict(), numbers))
        assert len(calls) == recompute * 2 * 2 * 2  # blocks, iterations, rollouts
    (plain, plain_numbers), (again, numbers) = done
    assert numbers == pytest.approx(plain_numbers, rel=1e-4)
    assert {v.dtype for v in plain.values()} == {torch.float32}
    assert all(torch.allclose(v, again[k], atol=1e-5) for k, v in plain.items())


def test_learning_rates(monkeypatch):
    """Linear to zero over all steps of all rollouts, each at the middle of its share."""
    seen = []
    monkeypatch.setattr(grpo_s, "set_lr", lambda optimizer, *args: seen.append(args))
    run(rollouts=2, iterations=3, lr=0.5)
    assert seen == [(0.5, pytest.approx((k + 0.5) / 6)) for k in range(6)]


def test_a_rollout_serves_several_steps():
    """From the second step on the ratio to the policy that sampled leaves 1, and the clip acts."""
    *_, (first,) = run(rollouts=1, lr=0.05)
    *_, (again,) = run(rollouts=1, lr=0.05, iterations=4)
    assert first["clipped"] == 0 and again["clipped"] > 0
    assert again["kl"] > 0 and abs(again["loss"]) > 1e-3
    assert again["harmful_reward"] == first["harmful_reward"]


def test_gradients_do_not_add_up_over_steps():
    """Steps of learning rate 0 all see the same gradient."""
    norms = [run(rollouts=1, lr=0.0, iterations=n)[2][0]["grad_norm"] for n in (1, 3)]
    assert norms[0] == norms[1] > 0


def test_training_increases_what_the_reward_counts():
    *_, records = run(below=0, rollouts=30, blocks=0, samples=8, lr=1e-2, beta_kl=0.0)
    share = [(r["harmful_reward"] + r["helpful_reward"]) / 2 for r in records]
    assert sum(share[:3]) / 3 < 0.25 and sum(share[-3:]) / 3 > 0.6
