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
from groups import borrow, most_spread, pick
from grpo_s import GRPOConfig, similarities
from loop import Loop
from model import run_blocks
from reward import IRLConfig, RewardModels
from transformer import Config, Transformer


def test_pick():
    rows = [{"category": c, "prompt": f"{c} {i}"} for c in (*CATEGORIES, HELPFUL) for i in range(3)]
    batches = pick(rows, 10, 0.4, random.Random(0))
    drawn = [next(batches) for _ in range(7)]
    assert all([r["category"] == HELPFUL for r in b] == [False] * 6 + [True] * 4 for b in drawn)
    harmful = [r for b in drawn for r in b[:6]]  # 42: six turns of seven categories
    assert Counter(r["category"] for r in harmful) == {c: 6 for c in CATEGORIES}
    assert all(
        [r["category"] for r in b[:6]] == sorted({r["category"] for r in b[:6]}) for b in drawn[:1]
    )
    assert set(Counter(r["prompt"] for r in harmful).values()) == {2}
    again = pick(rows, 10, 0.4, random.Random(0))
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


CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROWS = [
    {"prompt": p, "category": c, "response": "abcg"}
    for c in ("crime", "insult", HELPFUL)
    for p in ("abc", "d", "efghi", "jk")
]


def tiny():
    torch.manual_seed(0)
    return Transformer(Config.from_dict(CONFIG))


def run(policy, rewards, c, blocks=1, **more):
    records = []
    grpo_s.train(
        policy,
        Letters(),
        rewards,
        WordEncoder(16),
        ROWS,
        replace(c, blocks=blocks),
        nullcontext,
        1.0,
        6,
        next(policy.parameters()).dtype,
        loop=Loop("grpo", log=lambda **r: records.append(r)),
        **more,
    )
    return records


def start(below=1):
    return tiny(), Share(tiny().requires_grad_(False), below)


SMALL = GRPOConfig(
    rollouts=2,
    iterations=1,
    keep=1.0,
    imitate=False,
    blocks=1,
    prompts=4,
    samples=4,
    lr=1e-3,
    helpful_share=0.5,
)


@pytest.mark.parametrize("rollouts", [1, 2])
@pytest.mark.parametrize("blocks, below", [(1, 1), (1, 0), (2, 1), (0, 1)])
def test_train_changes_only_the_top_blocks(rollouts, blocks, below):
    policy, rewards = start(below)
    records = run(policy, rewards, replace(SMALL, rollouts=rollouts), blocks)
    before = rewards.trunk[0].state_dict()
    assert all(
        torch.equal(v, before[k]) for k, v in tiny().state_dict().items()
    )  # the reference stays
    changed = {
        k.rsplit(".", 1)[0] if not k.startswith("layers") else k[:8]
        for k, v in policy.state_dict().items()
        if not torch.equal(v, before[k])
    }
    assert changed == (
        {"layers.1", "norm"}
        if blocks == 1
        else {"layers.0", "layers.1", "norm", "embed_tokens", "lm_head"}
    )
    assert [r["step"] for r in records] == list(range(1, rollouts + 1))
    wanted = {
        "stage",
        "loss",
        "grad_norm",
        "kl",
        "clipped",
        "harmful_reward",
        "helpful_reward",
        "harmful_refused",
        "helpful_refused",
        "reward_std",
        "similarity",
        "alpha",
        "length",
        "ended",
    }
    assert wanted <= set(records[0]) and len(records[0]["alpha"]) == 4
    assert (
        abs(records[0]["loss"]) < 1e-6 and records[0]["kl"] < 1e-9 and records[0]["grad_norm"] > 0
    )


def test_train_with_shadow_rewards():
    policy, trunk = tiny(), tiny().requires_grad_(False)
    rewards = RewardModels(trunk, IRLConfig(reward_blocks=1)).requires_grad_(False)
    for shadow in rewards.shadows.values():
        torch.nn.init.normal_(shadow.value.weight)
    records = run(policy, rewards, SMALL)
    assert all(math.isfinite(r["loss"]) and r["reward_std"] > 0 for r in records)


@pytest.mark.parametrize("imitate", [False, True])
def test_what_an_update_is_made_of(monkeypatch, imitate):
    """W against the own demonstration, gaps demonstration minus sample, alpha from running means that history starts, A = alpha times normalised reward."""
    seen = {}

    def spy(name):
        real = getattr(grpo_s, name)
        monkeypatch.setattr(
            grpo_s,
            name,
            lambda *a, **k: (
                seen.setdefault(name, []).append((a, real(*a, **k))) or seen[name][-1][1]
            ),
        )

    for name in ("generate", "difficulty", "most_spread", "objective_of"):
        spy(name)
    rows = [{**r, "response": r["prompt"] + "g"} for r in ROWS]
    history = [
        {"category": c, "response": "ab", "reward_demo": 0.5, "samples": [[0.1, "ab"], [0.2, "jk"]]}
        for c in ("crime", "insult", HELPFUL)
    ]
    policy, rewards = start()
    c = replace(SMALL, rollouts=1, tokens_per_batch=40, imitate=imitate)
    grpo_s.train(
        policy,
        Letters(),
        rewards,
        WordEncoder(16),
        rows,
        c,
        nullcontext,
        1.0,
        6,
        torch.float32,
        history=history,
    )
    (_, prompts, G, *_), rollout = seen["generate"][0]
    (W, gaps, categories, deltas, gap_means, _), alpha = seen["difficulty"][0]
    spread = seen["most_spread"][0][0][0]  # what decides which groups are learnt from
    share = lambda ids: ids.count(7) / len(ids)
    chat, tokens = Letters(), rollout.rows()
    by_prompt = {
        tuple(chat.prompt(r["prompt"])): r for r in rows
    }  # prompts are the same in each category, and so are responses
    for p, prompt in enumerate(prompts):
        demo, group = by_prompt[tuple(prompt)]["response"], tokens[G * p : G * p + G]
        R = torch.tensor([share(o) for o in group])
        torch.testing.assert_close(gaps[p], share(chat.answer(demo)) - R)
        torch.testing.assert_close(
            W[p], similarities(WordEncoder(16), [[chat.decode(o) for o in group]], [demo])[0]
        )
        A = torch.cat([call[0] for call, _ in seen["objective_of"]]).view(-1, G + imitate)[p]
        of_demo = share(chat.answer(demo))
        torch.testing.assert_close(
            A[:G],
            torch.zeros(G)
            if (R == R[0]).all()
            else alpha[p, 0] * (R - R.mean()) / (R.std(correction=0) + c.std_eps),
        )
        everyone = torch.cat((R, torch.tensor([of_demo])))
        if imitate:
            torch.testing.assert_close(
                A[G], alpha[p, 0] * (of_demo - R.mean()) / (everyone.std(correction=0) + c.std_eps)
            )
        assert spread[p] == pytest.approx(
            (everyone if imitate else R).std(correction=0).item(), abs=1e-6
        )
    assert len(seen["objective_of"]) > 1  # micro-batches
    assert all(
        (o.weight > 0).all() and call[6] == len(prompts) * (G + imitate)
        for call, o in seen["objective_of"]
    )
    W0 = WordEncoder(16).embed(["ab", "jk"])  # history: W of "ab" to "ab" is 1, of "jk" this cosine
    delta0 = 1 - (1 + (W0[0] @ W0[1]).item()) / 2
    for name in set(categories):
        mine = [p for p, x in enumerate(categories) if x == name]
        assert deltas[name] == pytest.approx((delta0 + (1 - W[mine]).mean().item()) / 2, abs=1e-6)
        assert gap_means[name] == pytest.approx((0.35 + gaps[mine].mean().item()) / 2, abs=1e-6)


def test_borrow():
    """The most similar prompt's demonstration, of the same category."""
    rows = [
        {"prompt": p, "category": c, "response": a}
        for p, c, a in (
            ("steal a car", "crime", "1"),
            ("mock a boy", "crime", "2"),
            ("mock a girl", "insult", "3"),
        )
    ]
    prompts = [
        {"prompt": p, "category": c}
        for p, c in (
            ("mock a girl now", "insult"),
            ("mock a girl", "crime"),
            ("steal the car", "crime"),
        )
    ]
    assert [
        (r["prompt"], r["response"], r["borrowed"]) for r in borrow(prompts, rows, WordEncoder())
    ] == [("mock a girl", "2", True), ("steal the car", "1", True), ("mock a girl now", "3", True)]


def test_a_borrowed_demonstration_is_not_learnt_from(monkeypatch):
    """Its group's samples alone enter the loss, and the choice of groups; its reward enters the gap."""
    seen, real = (
        {},
        {name: getattr(grpo_s, name) for name in ("prepare", "most_spread", "difficulty")},
    )
    for name in real:
        monkeypatch.setattr(
            grpo_s,
            name,
            lambda *a, name=name, **k: seen.setdefault(name, []).append(a) or real[name](*a, **k),
        )
    rows = [{**r, "borrowed": i % 2 == 0} for i, r in enumerate(ROWS)]
    policy, rewards = start()
    drawn, draw = [], grpo_s.pick
    monkeypatch.setattr(
        grpo_s, "pick", lambda *a: map(lambda part: drawn.append(part) or part, draw(*a))
    )
    grpo_s.train(
        policy,
        Letters(),
        rewards,
        WordEncoder(16),
        rows,
        replace(SMALL, rollouts=1, prompts=8, imitate=True),
        nullcontext,
        1.0,
        6,
        torch.float32,
    )
    borrowed, (_, _, _, _, learnt, advantage, sequences, *_), (spread, *_), (_, gaps, *_) = (
        [r["borrowed"] for r in drawn[0]],
        seen["prepare"][0],
        seen["most_spread"][0],
        seen["difficulty"][0],
    )
    assert 0 < sum(borrowed) < 8 and sequences == len(learnt) == 8 * 4 + borrowed.count(False)
    assert learnt == [5 * p + g for p, b in enumerate(borrowed) for g in range(4 if b else 5)]
    for p, (b, A) in enumerate(zip(borrowed, advantage.view(8, 5))):
        R = gaps[p].mean() - gaps[p]  # the rewards, but for a constant
        assert not b or spread[p] == pytest.approx(R.std(correction=0).item(), abs=1e-6)


def test_most_spread():
    spread = [1.0, 4.0, 0.1, 0.3, 0.2]
    assert most_spread(spread, ["crime", "insult", HELPFUL, HELPFUL, HELPFUL], 0.5) == [1, 3, 4]
    assert most_spread(spread, ["crime", "insult", HELPFUL, HELPFUL, HELPFUL], 1.0) == [
        0,
        1,
        2,
        3,
        4,
    ]


class ShareByCategory(Share):
    """The same, worth more the longer the category's name is: categories must come with their own prompts."""

    def __call__(self, x, batch, categories):
        return (
            super().__call__(x, batch, categories)
            * torch.tensor([float(len(c)) for c in categories])[batch.owner]
        )


@pytest.mark.parametrize(
    "keep, imitate, iterations", [(1.0, False, 1), (0.5, False, 1), (0.5, True, 2)]
)
def test_micro_batches_do_not_change_training(keep, imitate, iterations):
    done = []
    for tokens, recompute in ((4096, False), (1, False), (50, False), (4096, True)):
        policy, rewards = start()
        c = replace(
            SMALL,
            tokens_per_batch=tokens,
            recompute=recompute,
            keep=keep,
            prompts=6,
            imitate=imitate,
            iterations=iterations,
        )
        records = run(policy.double(), ShareByCategory(rewards.trunk[0].double(), 1), c)
        done.append((policy.state_dict(), records))
    for state, records in done[1:]:
        assert all(torch.allclose(v, done[0][0][k], rtol=0, atol=1e-10) for k, v in state.items())
        for key in ("loss", "kl", "clipped", "grad_norm", "harmful_reward"):
            assert [r[key] for r in records] == pytest.approx(
                [r[key] for r in done[0][1]], rel=1e-10, abs=1e-10
            ), key


def test_recomputation_in_bfloat16():
    """As the stages train: a float32 policy under autocast, a bfloat16 reference. The backward pass, outside autocast, recomputes under it."""
    done = []
    for recompute in (False, True):
        policy, rewards = start()
        rewards.trunk[0].bfloat16()
        c, records = replace(SMALL, recompute=recompute, blocks=0, iterations=2), []
        grpo_s.train(
            policy,
            Letters(),
            rewards,
            WordEncoder(16),
            ROWS,
            c,
            lambda: torch.autocast("cpu", torch.bfloat16),
            1.0,
            6,
            torch.bfloat16,
            loop=Loop("grpo", log=lambda **r: records.append(r)),
        )
        done.append((policy.state_dict(), [(r["loss"], r["grad_norm"]) for r in records]))
    assert sum(done[0][1], ()) == pytest.approx(sum(done[1][1], ()), rel=1e-4) and all(
        v.dtype == torch.float32 for v in done[0][0].values()
    )
    assert all(torch.allclose(v, done[1][0][k], atol=1e-5) for k, v in done[0][0].items())


def test_learning_rates(monkeypatch):
    """Linear to zero over all steps of all rollouts, each at the middle of its share."""
    seen = []
    monkeypatch.setattr(
        grpo_s, "set_lr", lambda optimizer, lr, progress: seen.append((lr, progress))
    )
    run(*start(), replace(SMALL, rollouts=2, iterations=3, lr=0.5))
    assert seen == [(0.5, pytest.approx((k + 0.5) / 6)) for k in range(6)]


def test_a_rollout_serves_several_steps():
    """From the second step on the ratio is to the policy that sampled: it leaves 1, and the clip acts. The first step does not know."""
    first = run(*start(), replace(SMALL, rollouts=1, iterations=1, lr=0.05))
    again = run(*start(), replace(SMALL, rollouts=1, iterations=4, lr=0.05))
    assert (
        first[0]["clipped"] == 0
        and again[0]["clipped"] > 0
        and again[0]["kl"] > 0
        and abs(again[0]["loss"]) > 1e-3
    )
    assert again[0]["harmful_reward"] == first[0]["harmful_reward"]


def test_training_increases_what_the_reward_counts():
    policy, rewards = start(0)
    records = run(
        policy,
        rewards,
        GRPOConfig(
            rollouts=30,
            iterations=1,
            keep=1.0,
            imitate=False,
            blocks=1,
            prompts=4,
            samples=8,
            lr=1e-2,
            helpful_share=0.5,
            beta_kl=0.0,
        ),
        blocks=0,
    )
    share = [(r["harmful_reward"] + r["helpful_reward"]) / 2 for r in records]
    assert sum(share[:3]) / 3 < 0.25 and sum(share[-3:]) / 3 > 0.6
