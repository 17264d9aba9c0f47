"""grpo_s.py: the training loop on a tiny transformer."""
import math
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import grpo_s
from data import CATEGORIES, HELPFUL
from encoder import WordEncoder
from grpo_s import GRPOConfig, pick
from model import Config, Transformer, generate, run_blocks
from reward import IRLConfig, RewardModels


def test_pick():
    rows = [{"category": c, "prompt": f"{c} {i}"} for c in (*CATEGORIES, HELPFUL) for i in range(3)]
    batches = pick(rows, GRPOConfig(prompts=10, helpful_share=0.4), random.Random(0))
    drawn = [next(batches) for _ in range(7)]
    assert all([r["category"] == HELPFUL for r in b] == [False] * 6 + [True] * 4 for b in drawn)
    harmful = [r for b in drawn for r in b[:6]]                                # 42: six turns of seven categories
    for i in range(0, 42, 7):
        assert {r["category"] for r in harmful[i:i + 7]} == set(CATEGORIES)
    assert set(Counter(r["prompt"] for r in harmful).values()) == {2}
    again = pick(rows, GRPOConfig(prompts=10, helpful_share=0.4), random.Random(0))
    assert [next(again) for _ in range(7)] == drawn


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
    """A reward: the share of token 7 in the completion."""

    def __init__(self, trunk, below):
        self.trunk, self.below = [trunk], below

    def hidden(self, batch, x=None, start=0):
        with torch.no_grad():
            return run_blocks(self.trunk[0], batch, x, start, self.below)

    def __call__(self, x, batch, categories):
        assert len(categories) == int(batch.owner.max()) + 1
        return ((batch.completions == 7) & batch.mask).sum(1) / batch.mask.sum(1)


CONFIG = {"model_type": "llama", "vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = [{"prompt": p, "category": c, "response": "abcg"} for c in ("crime", "insult", HELPFUL) for p in ("abc", "d", "efghi", "jk")]


def tiny():
    torch.manual_seed(0)
    return Transformer(Config.from_dict(CONFIG))


def run(policy, rewards, c, blocks=1, **more):
    records = []
    grpo_s.train(policy, Letters(), rewards, WordEncoder(16), ROWS, c, blocks, nullcontext, 1.0, 6, next(policy.parameters()).dtype, log=lambda **r: records.append(r), **more)
    return records


def start(below=1):
    return tiny(), Share(tiny().requires_grad_(False), below)


SMALL = GRPOConfig(updates=2, prompts=4, samples=4, lr=1e-3, helpful_share=0.5)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("blocks, below", [(1, 1), (1, 0), (2, 1), (0, 1)])
def test_train_changes_only_the_top_blocks(updates, blocks, below):
    policy, rewards = start(below)
    records = run(policy, rewards, replace(SMALL, updates=updates), blocks)
    before = rewards.trunk[0].state_dict()
    assert all(torch.equal(v, before[k]) for k, v in tiny().state_dict().items())          # the reference stays
    changed = {k.rsplit(".", 1)[0] if not k.startswith("layers") else k[:8] for k, v in policy.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == ({"layers.1", "norm"} if blocks == 1 else {"layers.0", "layers.1", "norm", "embed_tokens", "lm_head"})
    assert [r["step"] for r in records] == list(range(1, updates + 1))
    wanted = {"stage", "loss", "grad_norm", "kl", "clipped", "harmful_reward", "helpful_reward", "harmful_refused", "helpful_refused", "reward_std", "similarity", "alpha", "length", "ended"}
    assert wanted <= set(records[0]) and len(records[0]["alpha"]) == 4
    assert abs(records[0]["loss"]) < 1e-6 and records[0]["kl"] < 1e-9 and records[0]["grad_norm"] > 0


def test_train_with_shadow_rewards():
    policy, trunk = tiny(), tiny().requires_grad_(False)
    rewards = RewardModels(trunk, IRLConfig(reward_blocks=1)).requires_grad_(False)
    for shadow in rewards.shadows.values():
        torch.nn.init.normal_(shadow.value.weight)
    records = run(policy, rewards, SMALL)
    assert all(math.isfinite(r["loss"]) and r["reward_std"] > 0 for r in records)


def test_micro_batches_do_not_change_training():
    done = []
    for micro in (16, 1, 3):
        policy, rewards = start()
        records = run(policy.double(), Share(rewards.trunk[0].double(), 1), replace(SMALL, micro=micro))
        done.append((policy.state_dict(), records))
    for state, records in done[1:]:
        assert all(torch.allclose(v, done[0][0][k], atol=1e-7) for k, v in state.items())
        for key in ("loss", "kl", "clipped", "grad_norm", "harmful_reward"):
            assert [r[key] for r in records] == pytest.approx([r[key] for r in done[0][1]], abs=1e-7), key


def test_reused_samples_are_dealt_evenly():
    groups = [{"category": c, "n": i} for c in ("crime", "insult", HELPFUL) for i in range(8)]
    random.Random(0).shuffle(groups)
    steps = grpo_s.reused(groups, 6)
    assert len(steps) == 4 and all(Counter(g["category"] for g in s) == {"crime": 2, "insult": 2, HELPFUL: 2} for s in steps)
    assert sorted((g["category"], g["n"]) for s in steps for g in s) == sorted((g["category"], g["n"]) for g in groups)
    assert grpo_s.reused([], 6) == []


def test_reused_samples_come_first_and_weigh_as_new_ones():
    """At the first step pi_theta is pi_ref: reused samples give the update that a rollout of them would give."""
    done = []
    for reuse in (True, False):
        policy, rewards = start()
        policy, rewards, chat = policy.double(), Share(rewards.trunk[0].double(), 1), Letters()
        rng = random.Random(0)                                               # as train draws: prompts, then the rollout's seed
        picked = next(pick(ROWS, SMALL, rng))
        tokens = generate(policy, [chat.prompt(r["prompt"]) for r in picked], 4, 6, 1.0, seed=rng.randrange(2 ** 31), eos=(0,)).rows()
        share = lambda o: o.count(7) / len(o)
        drawn = [{**r, "samples": tokens[4 * i:4 * i + 4], "rewards": [share(o) for o in tokens[4 * i:4 * i + 4]], "reward_demo": share(chat.answer(r["response"]))} for i, r in enumerate(picked)]
        done.append(run(policy, rewards, replace(SMALL, reuse=reuse), drawn=drawn))
    first, second = done
    assert [r["new"] for r in first] == [False, True] and [r["new"] for r in second] == [True, True]
    for key in ("loss", "grad_norm", "harmful_reward", "helpful_reward", "gap_demo_minus_sample", "similarity", "advantage_abs", "length"):
        assert first[0][key] == pytest.approx(second[0][key], abs=1e-6), key
    assert sorted(first[0]["alpha"]) == pytest.approx(sorted(second[0]["alpha"]), abs=2e-4)


def test_training_increases_what_the_reward_counts():
    policy, rewards = start(0)
    records = run(policy, rewards, GRPOConfig(updates=30, prompts=4, samples=8, lr=1e-2, helpful_share=0.5, beta_kl=0.0), blocks=0)
    share = [(r["harmful_reward"] + r["helpful_reward"]) / 2 for r in records]
    assert sum(share[:3]) / 3 < 0.25 and sum(share[-3:]) / 3 > 0.6
