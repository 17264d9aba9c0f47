"""Stage 3: GRPO-S, group relative policy optimization with advantages scaled by task difficulty.

For each prompt q of category j, G samples o_i and a demonstration y (DR-IRL v3):

    delta  = 1 - W,  W: similarity of samples and demonstration         encoder.similarity
    alphaD = sigma(delta) / sigma(mean delta of category j)             data_hardness
    alphaM = sigma(mean of the inlying gaps) / sigma(mean gap of j)     model_responsiveness
    A_i    = alphaD alphaM (R_i - mean R) / (std R + eps)               kernels.group_advantage
    J      = 1/G sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1 - c, 1 + c) A_i) - beta_kl k3 ]
    rho    = pi / pi_old,  k3 = exp(d) - d - 1,  d = log pi_ref - log pi                   loss

Decisions where the paper is silent:
1. alpha multiplies the normalised advantage; scaling a group's rewards before would cancel.
2. The gap is demonstration minus sample, as in DAMA (arXiv 2502.01943).
3. The denominators' means start from IRL's samples; mean <- (mean + batch mean) / 2.
4. alpha is one number per prompt (over its group's mean W), and a constant of the optimisation.
5. sum is the mean of the two factors: like the product, it is near 1 for an average task.
6. std is the population's. A group of equal rewards has advantage 0.
7. The loss is a mean over sequences of a mean over tokens, whatever the micro-batch.
8. As a loss, k3's gradient is not that of the KL divergence; it is a penalty all the same.
9. imitate: the demonstration is learnt from. Its own advantage alone has the std of all G + 1.
10. pi, pi_old and pi_ref are all taken at the sampling temperature.
11. A prompt without a demonstration borrows its category's most similar prompt's, for W and gap.
12. pi_old is the policy in its first pass after the rollout, not the bfloat16 copy that sampled.

In that first pass rho is 1, and a group's advantages sum to 0: without imitate, a loss near 0 is
right. Its gradient is not 0.
"""

import math
import random
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from data import CATEGORIES, HELPFUL
from encoder import similarities
from kernels import group_advantage
from sample import Batch, autocast, completion_logps, generate, run_blocks
from sft import cycle, optimizer_for, set_lr, train_top
from support import parallel
from support.hf import frozen_copy
from support.judge import judge
from support.resume import Loop


def data_hardness(W: Tensor, mean_delta: Tensor | float) -> Tensor:
    """alphaD = sigma(1 - W) / sigma(mean_delta). W: any shape, in [-1, 1]."""
    mean_delta = torch.as_tensor(mean_delta, dtype=W.dtype, device=W.device)
    return torch.sigmoid(1 - W) / torch.sigmoid(mean_delta)


def model_responsiveness(gaps: Tensor, mean_gap: Tensor | float, drop: float = 0.2) -> Tensor:
    """alphaM = sigma(mean of the inlying gaps) / sigma(mean_gap), a scalar.

    gaps (n,): R(demonstration) - R(sample) of one category's batch. The floor(drop * n) gaps
    furthest from their mean are left out, as in DAMA. mean_gap: the running mean of all gaps.
    """
    if gaps.ndim != 1 or len(gaps) == 0 or not 0 <= drop < 1:
        raise ValueError(f"want gaps (n,), n > 0, 0 <= drop < 1: {tuple(gaps.shape)}, {drop}")
    nearest = (gaps - gaps.mean()).abs().argsort(stable=True)
    inlying = gaps[nearest[: len(gaps) - int(drop * len(gaps))]]
    mean_gap = torch.as_tensor(mean_gap, dtype=gaps.dtype, device=gaps.device)
    return torch.sigmoid(inlying.mean()) / torch.sigmoid(mean_gap)


def difficulty_scale(alpha_data: Tensor, alpha_model: Tensor, scaling: str = "product") -> Tensor:
    """alpha from its two factors, detached: none (1), data, model, product, sum or spread."""
    both = torch.broadcast_tensors(torch.as_tensor(alpha_data), torch.as_tensor(alpha_model))
    a, b = (z.detach() for z in both)
    modes = {"none": torch.ones_like(a), "data": a, "model": b, "product": a * b}
    modes |= {"sum": (a + b) / 2, "spread": (a * b) ** 8}  # spread, ours: a scale that says more
    if scaling not in modes:
        raise ValueError(f"scaling {scaling!r}: want one of {', '.join(modes)}")
    return modes[scaling]


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """k3 = exp(d) - d - 1, d = logp_ref - logp clamped to +-20.

    An unbiased and never negative estimate of KL(pi, pi_ref), per sampled token.
    """
    d = (logp_ref - logp).clamp(-20, 20)
    return torch.exp(d) - d - 1


def loss(logp, logp_old, logp_ref, advantage, mask, clip=0.2, beta_kl=0.0, sequences=None):
    """-J, a scalar, and {"kl", "clipped"}: k3 and the share held by the clip, averaged like it.

    logp, logp_old, logp_ref and mask (B, T), advantage (B,). sequences: the number to divide by,
    None: B. A micro-batch passes the whole batch's, so that the losses of micro-batches add up.
    """
    if not logp.shape == logp_old.shape == logp_ref.shape == mask.shape:
        raise ValueError("logp, logp_old, logp_ref and mask: want (B, T) each")
    if advantage.shape != logp.shape[:1]:
        raise ValueError(f"advantage {tuple(advantage.shape)}: want {tuple(logp.shape[:1])}")
    lengths = mask.sum(1)
    weight = 1 / ((sequences or len(mask)) * lengths.to(logp_ref.dtype))
    weight, A = weight.repeat_interleave(lengths), advantage.repeat_interleave(lengths)  # (n,)
    logp, logp_old, logp_ref = logp[mask], logp_old[mask], logp_ref[mask]
    rho = torch.exp((logp - logp_old).clamp(-20, 20))
    surrogate = torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A)
    k3 = kl_k3(logp, logp_ref)
    held = (rho - 1) * A.sign() > clip  # the clip takes these tokens' gradient
    info = {"kl": (weight * k3).sum().item(), "clipped": (weight * held).sum().item()}
    return -(weight * (surrogate - beta_kl * k3)).sum(), info


def blend(means: dict[str, float], category: str, batch_mean: float) -> float:
    """mean <- (mean + batch mean) / 2; a category's first batch starts it."""
    means[category] = 0.5 * means.get(category, batch_mean) + 0.5 * batch_mean
    return means[category]


def difficulty(W, gaps, categories: list[str], deltas: dict, gap_means: dict, scaling) -> Tensor:
    """alpha (P, 1) from similarities W (P, G) and reward gaps (P, G), category by category.

    Updates the running means of 1 - W (deltas) and of the gap (gap_means).
    """
    alpha = W.new_ones(len(W), 1)
    for category in sorted(set(categories)):
        rows = [p for p, name in enumerate(categories) if name == category]
        mean_delta = blend(deltas, category, (1 - W[rows]).mean().item())
        mean_gap = blend(gap_means, category, gaps[rows].mean().item())
        hard = data_hardness(W[rows].mean(1, keepdim=True), mean_delta)
        responsive = model_responsiveness(gaps[rows].flatten(), mean_gap)
        alpha[rows] = difficulty_scale(hard, responsive, scaling)
    return alpha


def advantages(scores: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """A (P, G + 1) from rewards `scores` (P, G + 1), the demonstration's last, and alpha (P, 1).

    Demonstration: alpha (R_demo - mean R of the samples) / (std of all G + 1 + eps).
    """
    R, R_demo = scores[:, :-1], scores[:, -1:]
    std = scores.std(1, correction=0, keepdim=True)
    above = alpha * (R_demo - R.mean(1, keepdim=True)) / (std + eps)
    return torch.cat((group_advantage(R, alpha, eps), above), 1)


def pick(rows: list[dict], prompts: int, helpful_share: float, rng: random.Random):
    """Endless batches of `prompts` rows; harmful ones take their categories in turn."""
    by_category = {}
    for name in (*CATEGORIES, HELPFUL):
        if known := [r for r in rows if r["category"] == name]:
            by_category[name] = cycle(known, rng)
    turn = cycle([name for name in by_category if name != HELPFUL], rng)
    helpful = round(prompts * helpful_share)
    while True:
        harmful = [next(by_category[next(turn)]) for _ in range(prompts - helpful)]
        harmful.sort(key=lambda r: r["category"])  # a micro-batch then needs few reward models
        yield harmful + [next(by_category[HELPFUL]) for _ in range(helpful)]


def learnt_members(scores: Tensor, part: list[dict], imitate: bool, keep: float) -> Tensor:
    """(P, G + 1) bool: what is learnt from, given the rewards `scores` of all members.

    Of harmful and of harmless prompts each, the share `keep` with the largest reward std: their
    samples, and with imitate their own demonstrations.
    """
    imitated = torch.tensor([imitate and not r.get("borrowed", False) for r in part])
    compared = scores if imitated.all() else scores[:, :-1]  # the same members of every group
    spread = compared.std(1, correction=0).tolist()
    learnt = torch.zeros(scores.shape, dtype=torch.bool)
    for harmless in (True, False):
        rows = [p for p, r in enumerate(part) if (r["category"] == HELPFUL) == harmless]
        kept = sorted(rows, key=lambda p: -spread[p])[: math.ceil(keep * len(rows))]
        learnt[kept, :-1] = True
        learnt[kept, -1] = imitated[kept]
    return learnt


def start_means(history: list[dict], encoder) -> dict:
    """Per category the means of 1 - W and of the gap over IRL's samples (`history`: see train)."""
    deltas, gap_means = {}, {}
    for category in sorted({g["category"] for g in history}):
        groups = [g for g in history if g["category"] == category]
        texts = [[text for _, text in g["samples"]] for g in groups]
        W = similarities(encoder, texts, [g["response"] for g in groups])
        gaps = [g["reward_demo"] - r for g in groups for r, _ in g["samples"]]
        deltas[category] = 1 - W.mean().item()
        gap_means[category] = sum(gaps) / W.numel()
    return {"deltas": deltas, "gap_means": gap_means}


@dataclass
class MicroBatch:
    """Completions of one forward and backward pass."""

    batch: Batch
    x: Tensor | None  # (N, D) states below the trained blocks; None: all blocks are trained
    advantage: Tensor  # (B,)
    logp_ref: Tensor  # (B, T)
    sequences: float  # what the loss is divided by; infinite: a filler
    logp_old: Tensor | None = None  # (B, T), from the first pass


def draw_samples(policy, chat, part: list[dict], c: Config, dtype, seed: int) -> list:
    """G samples (token lists) for each prompt of this process's share of `part`."""
    G, T, share = c.grpo.samples, c.run.max_new_tokens, parallel.share()
    draws = torch.rand(len(part), G, T, generator=torch.Generator().manual_seed(seed))
    prompts, draws = [chat.prompt(r["prompt"]) for r in part[share]], draws[share].flatten(0, 1)
    sampler = frozen_copy(policy, dtype)  # cast once a rollout, not once a token
    rows = generate(sampler, prompts, G, T, c.run.temperature, eos=chat.eos, draws=draws)
    return [rows[i : i + G] for i in range(0, len(rows), G)]


@torch.no_grad()
def reward_batch(reference, rewards, batch: Batch, prompts, tokens: int, dtype) -> Tensor:
    """Rewards (B,) of a batch's completions; prompts: its rows, with their categories."""
    R = []
    for rows in batch.split(list(range(len(batch.owner))), tokens):
        part, _ = batch.select(rows)
        names = [prompts[p]["category"] for p in batch.owner[rows].unique().tolist()]
        with autocast(reference.device, dtype):
            R.append(rewards(run_blocks(reference, part, stop=rewards.below), part, names))
    return torch.cat(R)


@torch.no_grad()
def micro_batches(reference, batch, frozen, rows, advantage, sequences, c: Config, dtype) -> list:
    """The completions `rows` of a batch as MicroBatches, with pi_ref's log-probs."""
    out, parts = [], batch.split(rows, c.grpo.tokens_per_batch)
    for mine in parallel.level(parts, []):  # every process makes the same number of passes
        part, _ = batch.select(mine or [0])
        with autocast(reference.device, dtype):
            x = run_blocks(reference, part, stop=frozen)
            top = run_blocks(reference, part, x, frozen)
            logp_ref = completion_logps(reference, top, part, c.run.temperature)
        divisor = sequences if mine else math.inf
        x = x if frozen else None
        out.append(MicroBatch(part, x, advantage[mine or [0]], logp_ref, divisor))
    return out


def update(policy, micro: list[MicroBatch], frozen, c: Config, dtype, loop: Loop) -> dict:
    """One optimizer step, if its numbers are finite. Returns what to log."""
    sums = torch.zeros(3, dtype=torch.float64)  # loss, kl, clipped
    for m in micro:
        with autocast(policy.device, dtype):
            x = run_blocks(policy, m.batch, m.x, frozen, recompute=c.grpo.recompute)
            logp = completion_logps(policy, x, m.batch, c.run.temperature)
        if m.logp_old is None:
            m.logp_old = logp.detach()
        limits = c.grpo.clip, c.grpo.beta_kl, m.sequences
        objective, info = loss(logp, m.logp_old, m.logp_ref, m.advantage, m.batch.mask, *limits)
        objective.backward()
        sums += torch.tensor([objective.item(), info["kl"], info["clipped"]], dtype=sums.dtype)
    stats = dict(zip(("loss", "kl", "clipped"), parallel.add(sums).tolist()))
    trained = [p for p in policy.parameters() if p.requires_grad]
    stats["grad_norm"] = parallel.clip_gradients(trained, 1.0)  # sums the processes' gradients
    loop.descend(loss=stats["loss"], grad_norm=stats["grad_norm"])
    return stats


def train(policy, reference, rewards, chat, encoder, rows, c: Config, dtype, history=(), loop=None):
    """Trains the policy in place. reference: pi_ref, its own start, on which `rewards` stand.

    rows: prompt, category and response (the demonstration; borrowed: True if another prompt's).
    history: IRL's groups with reward_demo and samples, (reward, text) pairs.
    """
    g, rng, loop = c.grpo, random.Random(c.run.seed), loop or Loop("grpo")
    frozen = train_top(policy, g.blocks)
    if g.shard:
        parallel.shard(policy)
    optimizer, draw = optimizer_for(policy, g.lr), pick(rows, g.prompts, g.helpful_share, rng)
    loop.state = loop.state or start_means(history, encoder)  # saved with the weights
    for n in tqdm(range(g.rollouts), "grpo", unit="rollout", disable=parallel.rank() > 0):
        part, seed, clock = next(draw), rng.randrange(2**31), [time.time()]
        if loop.skip(n, policy, optimizer):
            continue
        # 1. Sample: G completions o_i of each prompt, from pi_old
        groups = draw_samples(policy, chat, part, c, dtype, seed)
        clock.append(time.time())
        # 2. Reward: R_i of every sample and, last, of the demonstration
        mine = part[parallel.share()]
        answers = [[*group, chat.answer(r["response"])] for group, r in zip(groups, mine)]
        batch = Batch([chat.prompt(r["prompt"]) for r in mine], answers, policy.device)
        R = reward_batch(reference, rewards, batch, mine, g.tokens_per_batch, dtype)
        scores = parallel.gather(R.view(len(mine), -1), len(part))  # (P, G + 1)
        facts = parallel.gather(measure(groups, mine, chat, encoder, R), len(part))  # (P, G, 4)
        W, gaps = facts[..., 0], scores[:, -1:] - scores[:, :-1]  # (P, G)
        categories, sound = [r["category"] for r in part], loop.finite(reward=scores, similarity=W)
        # 3. Difficulty: alpha = alphaD alphaM
        if sound:
            alpha = difficulty(W, gaps, categories, **loop.state, scaling=g.scaling)
        if not sound or not loop.finite(alpha=alpha):
            loop.end(n)
            continue
        # 4. Advantage: A_i = alpha (R_i - mean R) / (std R + eps)
        A = advantages(scores, alpha, g.std_eps)  # (P, G + 1)
        learnt = learnt_members(scores, part, g.imitate, g.keep)
        own, S = learnt[parallel.share()].flatten().nonzero()[:, 0].tolist(), int(learnt.sum())
        A_own = A[parallel.share()].flatten()
        micro = micro_batches(reference, batch, frozen, own, A_own, S, c, dtype)
        clock.append(time.time())
        # 5. Update: mu steps up the gradient of J
        for step in range(g.iterations):
            set_lr(optimizer, g.lr, (n + (step + 0.5) / g.iterations) / g.rollouts)
            stats = update(policy, micro, frozen, c, dtype, loop)
        clock.append(time.time())
        # 6. Log
        loop.end(n, **stats, **log_record(categories, scores, facts, alpha, A, learnt, clock))


def measure(groups: list, part: list[dict], chat, encoder, like: Tensor) -> Tensor:
    """(P, G, 4), of `like`'s dtype: W, and of each sample: refuses, length, ended."""
    texts = [[chat.decode(ids) for ids in group] for group in groups]
    W = similarities(encoder, texts, [r["response"] for r in part]).to(like)
    facts = lambda ids: [judge(chat.decode(ids)) == "refuses", len(ids), chat.ended(ids)]
    rest = torch.tensor([[facts(ids) for ids in group] for group in groups])
    return torch.cat((W[..., None], rest.to(like)), 2)


def log_record(categories, scores, facts, alpha, A, learnt, clock: list[float]) -> dict:
    """What a rollout tells: means over all, and over harmful and harmless prompts; seconds."""
    R, R_demo = scores[:, :-1], scores[:, -1:]
    W, refused, length, ended = facts.unbind(2)
    means = {"reward_std": R.std(1, correction=0), "gap_demo_minus_sample": R_demo - R}
    means |= {"similarity": W, "length": length, "ended": ended}
    means["equal_groups_share"] = (R == R[:, :1]).all(1).to(R)
    means["advantage_samples"] = A[:, :-1][learnt[:, :-1]].abs()
    means["advantage_demonstration"] = A[:, -1][learnt[:, -1]]
    harmless = torch.tensor([name == HELPFUL for name in categories])
    for kind, which in (("harmful", ~harmless), ("helpful", harmless)):
        means |= {f"{kind}_refused": refused[which], f"{kind}_reward": R[which]}
    record = {name: x.mean().item() for name, x in means.items() if x.numel()}
    record["alpha"] = [round(a, 4) for a in alpha[:, 0].tolist()]
    seconds = (round(b - a, 2) for a, b in zip(clock, clock[1:]))
    return {**record, "seconds": dict(zip(("rollout", "score", "train"), seconds))}
