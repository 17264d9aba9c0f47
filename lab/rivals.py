"""Rivals of GRPO-S that learn from the same first rollout: its prompts, samples and rewards.

RFT (rejection sampling fine-tuning) learns each prompt's best sample by reward, with advantage 1,
in GRPO-S's updates, beside the same demonstrations; its control learns a random sample. DPO (direct
preference optimization; Rafailov et al., arXiv 2305.18290) takes the best, y_w, against the worst:

loss = -log sigma(beta ((log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l)))

Settings were chosen for GRPO-S alone: RFT has the same, DPO its own. Neither DPO nor more SFT takes
means of weights or goes further (--grpo-extrapolate). A control learns from the anchors alone.
"""

import time
from random import Random

import torch
import torch.nn.functional as F

import grpo_s
from data import HELPFUL, cycle
from reward import RewardModels
from sample import Batch, autocast, token_logps
from sft import optimizer_for, set_lr, train_top
from support.hf import load_rewards, save_model
from support.judge import judge
from support.rollout import plan

LR, PAIRS, BETA = 5e-5, 8, 0.1  # of DPO; PAIRS: of a step


class Shared:
    """grpo_s.roll_out that keeps what it gave, for all that begin from one start."""

    def __init__(self):
        self.kept, self.spared, self.start = {}, 0.0, None  # spared: seconds of making them again
        self.groups = {}  # of grid.reward_facts

    def __call__(self, policy, reference, rewards, chat, phi, c, dtype, *draw):
        models = [m for m in (policy, rewards) if isinstance(m, torch.nn.Module)]
        sums = [[p.detach().double().sum().item() for p in m.parameters()] for m in models]
        facts = sums, type(rewards), c.irl.integration, c.run.temperature, c.run.max_new_tokens
        key = repr((*facts, c.grpo.samples, dtype, draw))
        if key in self.kept:
            found, seconds = self.kept[key]
            self.spared += seconds
            return found
        begun, self.start = time.time(), self.start or sums[0]
        found = grpo_s.roll_out(policy, reference, rewards, chat, phi, c, dtype, *draw)
        if sums[0] == self.start:  # what a trained policy drew nobody asks for again
            self.kept[key] = found, time.time() - begun
        return found


def best(R, alpha, anchors, g):
    """grpo_s.advantages of RFT: 1 for each group's best sample, and for the anchors."""
    A, learnt = grpo_s.advantages(R, alpha, anchors, g)
    learnt[: len(R), :-1] = F.one_hot(R.argmax(1), R.shape[1]).bool()
    return torch.ones_like(A), learnt


def random(R, alpha, anchors, g):
    """Of RFT's control: the best by random rewards."""
    draws = torch.rand(R.shape, generator=torch.Generator().manual_seed(0))
    return best(draws.to(R.device), alpha, anchors, g)


def none(R, alpha, anchors, g):
    """No sample is learnt from: the anchors alone, in as many updates, averaged, extrapolated."""
    A, learnt = grpo_s.advantages(R, alpha, anchors, g)
    learnt[: len(R)] = False
    return A, learnt


def pairs_of(scores, micro: list, part: list[dict]) -> list[dict]:
    """{"prompt", "better", "worse"}: a group's best and worst token lists, unless equal in R."""
    width, samples, pairs = scores.shape[1], {}, []
    for m in (m for update in micro for m in update):
        texts = [ids for group in m.batch.source[1] for ids in group]
        samples |= dict(zip(m.rows, texts))
    for p, R in enumerate(scores[:, :-1].tolist()):  # an anchor's row has zeros for samples
        if max(R) > min(R):
            better, worse = (samples[p * width + R.index(x)] for x in (max(R), min(R)))
            pairs.append({"prompt": part[p]["prompt"], "better": better, "worse": worse})
    return pairs


def dpo_loss(logp: torch.Tensor, logp_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean over pairs; logp, logp_ref (B, 2): of whole responses, the better one first."""
    better, worse = (logp - logp_ref).unbind(1)
    return -F.logsigmoid(beta * (better - worse)).mean()


def dpo_train(policy, reference, chat, pairs, dtype, seed, loop, updates: int, blocks: int):
    """Trains the policy in place by DPO; reference: its own start. pairs: see pairs_of."""
    frozen, draw = train_top(policy, blocks), cycle(pairs, Random(seed))
    optimizer = optimizer_for(policy, LR)
    for step in range(updates):
        part = [next(draw) for _ in range(PAIRS)]
        if loop.skip(step, policy, optimizer):
            continue
        responses = [[r["better"], r["worse"]] for r in part]
        batch = Batch([chat.prompt(r["prompt"]) for r in part], responses, policy.device)
        set_lr(optimizer, LR, (step + 0.5) / updates)
        with autocast(policy.device, dtype):
            logp = token_logps(policy, batch, frozen=frozen).sum(1).view(-1, 2)
            with torch.no_grad():
                logp_ref = token_logps(reference, batch).sum(1).view(-1, 2)
        loop.update(step, dpo_loss(logp, logp_ref, BETA), policy.parameters())


def best_and_worst(run, roll_out) -> None:
    """DPO to RUN/dpo."""
    folder, chat, c, found = run.folder / "sft", run.chat(run.folder / "sft"), run.c, []
    policy, reference = run.load(folder), run.load(folder, run.dtype).requires_grad_(False)
    rewards = load_rewards(RewardModels(reference, c.irl), run.folder / "rewards")
    (rows, _), frozen = run.grpo_rows(chat), train_top(policy, c.grpo.blocks)
    fixed = policy, reference, rewards, chat, run.encoder(), c, run.dtype, frozen
    with run.work("dpo", rows) as loop:
        for _, (part, updates, _, seed) in zip(range(c.grpo.rollouts), plan(rows, c)):
            scores, _, micro = roll_out(*fixed, part, c.grpo.prompts, updates, seed)
            found += pairs_of(scores, micro, part)
        steps = c.grpo.rollouts * c.grpo.updates * c.grpo.passes
        dpo_train(policy, reference, chat, found, run.dtype, c.run.seed, loop, steps, c.grpo.blocks)
    save_model(policy, run.folder / "dpo")


def verdicts(chat, x, batch, categories) -> torch.Tensor:
    """The judge's verdicts, (B,): 1 if a harmful prompt is refused, a harmless one not."""
    right = []
    for name, answers in zip(categories, batch.source[1]):  # a prompt's
        refused = [judge(chat.decode(ids)) == "refuses" for ids in answers]
        right += [r != (name == HELPFUL) for r in refused]
    return torch.tensor(right, dtype=torch.float32, device=batch.ids.device)
