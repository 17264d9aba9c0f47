"""A rollout: which prompts, their samples, drawn and scored in parts that fit into memory.

Scoring runs the reference's lower blocks, which are the policy's frozen ones too: a MicroBatch
keeps their output for the updates.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from data import CATEGORIES, HELPFUL, cycle
from sample import Batch, autocast, completion_logps, generate, run_blocks
from support import parallel
from support.hf import frozen_copy


def pick(rows: list[dict], prompts: int, rng: random.Random):
    """Endless batches of `prompts` rows, half of them harmless; harm categories take turns."""
    by_category = {}
    for name in (*CATEGORIES, HELPFUL):
        if known := [r for r in rows if r["category"] == name]:
            bare = [r for r in known if r.get("borrowed")]  # these alone, if there are 8
            by_category[name] = cycle(bare if len(bare) >= 8 else known, rng)
    turn = cycle([name for name in by_category if name != HELPFUL], rng)
    helpful = prompts // 2
    while True:
        harmful = [next(by_category[next(turn)]) for _ in range(prompts - helpful)]
        harmful.sort(key=lambda r: r["category"])  # so a micro-batch needs few reward models
        yield harmful + [next(by_category[HELPFUL]) for _ in range(helpful)]


def plan(rows: list[dict], c: Config):
    """Endless (part, updates, order, seed), one a rollout.

    part: P prompts, then the anchors. updates: of each of U updates its places in part, every U-th.
    order: the updates' numbers, pass after pass. seed: of the samples.
    """
    g, U, rng = c.grpo, c.grpo.updates, random.Random(c.run.seed)
    draw = pick(rows, g.prompts, rng)
    demonstrated = [r for r in rows if not r.get("borrowed")]
    anchors = pick(demonstrated, U * g.anchor, rng)
    updates = [range(u, g.prompts + U * g.anchor, U) for u in range(U)]
    while True:
        part, seed = next(draw) + next(anchors), rng.randrange(2**31)
        yield part, updates, [u for _ in range(g.passes) for u in rng.sample(range(U), U)], seed


@dataclass
class MicroBatch:
    """Completions that run together: all of an update's from score, those learnt from in ready."""

    batch: Batch
    rows: list[int]  # their places in scores, learnt and A, each flattened
    x: Tensor | None  # (N, D) states below the trained blocks; None: all blocks are trained
    logp_ref: Tensor | None = None  # (B, T)
    logp_old: Tensor | None = None  # (B, T); None: the policy's own, so that rho is 1
    filler: bool = False  # weighs nothing: all processes run equally many


def draw_samples(policy, chat, part: list[dict], places: list[int], c: Config, dtype, seed: int):
    """{p: G samples (token lists) of prompt part[p]}, for p in places."""
    G, T, out = c.grpo.samples, c.run.max_new_tokens, {}
    draws = torch.rand(len(part), G, T, generator=torch.Generator().manual_seed(seed))
    sampler, size = frozen_copy(policy, dtype), max(1, 256 // G)  # cast once, not once a token
    for some in (places[i : i + size] for i in range(0, len(places), size)):
        prompts, few = [chat.prompt(part[p]["prompt"]) for p in some], draws[some].flatten(0, 1)
        rows = generate(sampler, prompts, G, T, c.run.temperature, eos=chat.eos, draws=few)
        out |= {p: rows[k * G :][:G] for k, p in enumerate(some)}
    return out


@torch.no_grad()
def score(reference, rewards, chat, part, groups, updates, frozen, c: Config, dtype):
    """Rewards (len(part), G + 1), a demonstration's last; and each update's MicroBatches."""
    width, micro, (low, high) = c.grpo.samples + 1, [], sorted((frozen, rewards.below))
    scores = torch.zeros(len(part), width, device=reference.device)
    for mine in (u[parallel.share()] for u in updates):  # anchors have no group
        answers = [[*groups.get(p, []), chat.answer(part[p]["response"])] for p in mine]
        batch = Batch([chat.prompt(part[p]["prompt"]) for p in mine], answers, reference.device)
        rows = [p * width + k for p, a in zip(mine, answers) for k in range(width - len(a), width)]
        micro.append([])
        for cut in batch.split(c.grpo.tokens_per_batch):
            some, _ = batch.select(cut)
            names = [part[mine[p]]["category"] for p in batch.owner[cut].unique().tolist()]
            with autocast(reference.device, dtype):
                x = run_blocks(reference, some, stop=low)
                states = {low: x, high: run_blocks(reference, some, x, low, high)}
                R = rewards(states[rewards.below], some, names)
            found = [rows[b] for b in cut]
            scores.view(-1)[found] = R
            micro[-1].append(MicroBatch(some, found, states[frozen] if frozen else None))
    return parallel.add(scores), micro


@torch.no_grad()
def ready(models, micro: list[MicroBatch], learnt, frozen: int, dtype) -> list[MicroBatch]:
    """An update's completions that are learnt from, with log-probs under models: pi_ref, pi_old."""
    flags, out = learnt.flatten().tolist(), []  # learnt (len(part), G + 1) bool
    parts = [(m, [b for b, row in enumerate(m.rows) if flags[row]]) for m in micro]
    parts = [(m, cut, False) for m, cut in parts if cut]
    parts += [(micro[0], [0], True)] * (parallel.most(len(parts)) - len(parts))
    for whole, cut, filler in parts:
        batch, tokens = whole.batch.select(cut)
        x = None if whole.x is None else whole.x[tokens]
        with autocast(batch.ids.device, dtype):
            logps = [completion_logps(m, run_blocks(m, batch, x, frozen), batch) for m in models]
        out.append(MicroBatch(batch, [whole.rows[b] for b in cut], x, *logps, filler=filler))
    return out
