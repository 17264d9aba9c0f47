"""Rivals of GRPO-S that use the same reward models, and the same number of samples.

The warm start answers as many prompts, G times each, as GRPO-S does in all its rollouts. RFT
(rejection sampling fine-tuning) is SFT on each prompt's best sample by reward and on the
demonstrations, with as many updates as GRPO-S; the control takes a random sample. DPO takes the
best against the worst. Of all these GRPO-S alone was tuned; the others have its rate or, DPO, its
own usual one.
"""

import dataclasses
import random

import torch

import grpo_s
import sft
from data import HELPFUL
from lab import dpo
from reward import RewardModels
from support.hf import load_rewards, save_model
from support.judge import judge


def drawn(run) -> list[dict]:
    """Open prompts with "samples": (reward, token list), the best first."""
    c, folder, chat = run.c, run.folder / "sft", run.chat(run.folder / "sft")
    policy, reference = run.load(folder), run.load(folder, run.dtype).requires_grad_(False)
    rewards = load_rewards(RewardModels(reference, c.irl), run.folder / "rewards")
    (rows, _), rng, found = run.grpo_rows(chat), random.Random(c.run.seed), []
    draw = grpo_s.pick(rows, c.grpo.prompts, c.grpo.helpful_share, rng)
    for _ in range(c.grpo.rollouts):
        part, seed = next(draw), rng.randrange(2**31)
        every = list(range(len(part)))
        groups = grpo_s.draw_samples(policy, chat, part, every, c, run.dtype, seed)
        scores, _ = grpo_s.score(reference, rewards, chat, part, groups, [every], 0, c, run.dtype)
        for p, r in enumerate(part):
            samples = sorted(zip(scores[p].tolist(), groups[p]), reverse=True)
            found.append({**r, "samples": samples})
    return found


def updates_of(run) -> int:
    """Optimizer steps of GRPO-S."""
    g = run.c.grpo
    return g.rollouts * g.passes * (g.prompts // (g.batch or g.prompts))


def rft(run, choose=lambda samples, rng: samples[0]) -> None:
    """To RUN/rft. choose: of a prompt's ended samples, the best first."""
    chat, rng, g = run.chat(run.folder / "sft"), random.Random(run.c.run.seed), run.c.grpo
    policy, demonstrations = run.load(run.folder / "sft"), run.rows(chat)
    c = dataclasses.replace(run.c.sft, steps=updates_of(run), blocks=g.blocks, lr=g.lr)
    with run.work("rft", demonstrations) as loop:
        rows = [(r, [s for s in r["samples"] if chat.ended(s[1])]) for r in drawn(run)]
        rows = [{**r, "response": chat.decode(choose(e, rng)[1])} for r, e in rows if e]
        sft.train(policy, chat, demonstrations + rows, c, run.dtype, run.c.run.seed, loop)
    save_model(policy, run.folder / "rft")


def best_and_worst(run) -> None:
    """DPO to RUN/pairs."""
    folder, chat, g = run.folder / "sft", run.chat(run.folder / "sft"), run.c.grpo
    policy, reference, pairs = run.load(folder), run.load(folder, run.dtype), []
    with run.work("pairs", run.rows(chat)) as loop:
        for r in drawn(run):
            (best, better), (worst, worse) = r["samples"][0], r["samples"][-1]
            pairs += [{"prompt": r["prompt"], "better": better, "worse": worse}] * (best > worst)
        fixed = pairs, run.dtype, run.c.run.seed, loop, updates_of(run), g.blocks
        dpo.train(policy, reference, chat, *fixed)
    save_model(policy, run.folder / "pairs")


class Verdict:
    """The judge's verdict as reward: 1 for a harmful prompt refused or a harmless one not, else 0.

    What the optimizer could do with a perfect reward; nothing that a user has.
    """

    below = 0

    def __init__(self, chat):
        self.chat = chat

    def __call__(self, x, batch, categories):
        rows = (ids[m].tolist() for ids, m in zip(batch.completions, batch.mask))
        refused = [judge(self.chat.decode(ids)) == "refuses" for ids in rows]
        harmless = [categories[p] == HELPFUL for p in batch.owner.tolist()]
        right = [r != h for r, h in zip(refused, harmless)]
        return torch.tensor(right, dtype=torch.float32, device=batch.ids.device)


STAGES = {"rft": rft, "pairs": best_and_worst}
STAGES["random"] = lambda run: rft(run, lambda samples, rng: rng.choice(samples))
