"""Stage 3: GRPO-S, group relative policy optimization whose advantages are scaled by task difficulty (DR-IRL v3).

    delta = 1 - W                                             W: similarity of a response to its demonstration (encoder.py)
    alphaD = sigma(delta) / sigma(mean delta of category j)                              data hardness, per prompt
    alphaM = sigma(mean of the inlying gaps) / sigma(mean gap of category j)             model responsiveness, per category
    A_i = alpha_j(q) (R_i - mean R) / (std R + eps),   alpha = alphaD * alphaM
    J = E[ 1/G sum_i 1/|o_i| sum_t min(rho A_i, clip(rho, 1 - c, 1 + c) A_i) - beta_kl (exp(d) - d - 1) ]
    rho = pi_theta / pi_old,   d = log pi_ref - log pi_theta                             kernels.clipped_objective, kernels.grpo_loss

Decisions where the paper is silent:
1. alpha multiplies the normalised advantage. Scaling the rewards of a group before the normalisation would cancel.
2. The gap is demonstration minus sample, as in DAMA (arXiv 2502.01943), from which both factors come.
3. The means in the denominators are per category: they start from IRL's samples, and batch means are blended in. Without such a
   start the first prompt of a category would be compared with itself, and alphaD would be 1. The rewards were fitted on most of
   these samples, so their gaps are wider than later ones and alpha starts below 1.
4. alpha is a constant of the optimisation. It is per prompt (the mean over its group); per sample is a switch, and then the
   advantages of a group no longer sum to zero.
5. sum is (alphaD + alphaM) / 2, so that every mode leaves an average task at 1. The product seldom leaves [0.85, 1.15], as sigma is flat where its
   arguments are; spread, its 8th power, which is ours, shows what a scale that says more would do.
6. std is the population's; a group of equal rewards has zero advantage.
7. The loss is a mean over the sequences of the groups kept (11.) of a mean over tokens, whatever the micro-batch.
8. As a loss term, k3's gradient is not that of the KL divergence (it is a fine penalty all the same).
9. A share of the prompts is harmless, scored by the helpful model: the paper's pool is harmful only, and refusing everything wins there.
10. eps is large (std_eps, in units of a category's rewards): in a group whose samples agree, the rewards differ by style alone, and dividing
   by their tiny std would let such groups drown out those that disagree.
11. Only the groups whose rewards spread most are learnt from (`keep`), the demonstration's included where it is learnt from (12.): a group of samples
   that agree, and are as good as it, has nothing to say.
12. The demonstration is learnt from too (`imitate`), so that a group without one good sample still has something to learn. Its advantage is
   measured from the mean of the samples, alone: inside that mean it would push down two good samples for being less good than it. The std it
   is divided by contains it: two bad samples that agree have a tiny std, and would make it ten times as loud as others (both:
   results/attempts.md). Its rho counts from pi_old as the samples' does; its k3 is a penalty and no estimate of the KL, and the logged kl
   contains it.
13. pi_theta, pi_old and pi_ref are all taken at the sampling temperature.
14. A prompt without a demonstration (`open_prompts`) borrows that of its category's most similar prompt, for its difficulty and its gap. It is not learnt from,
   and its prompt counts as a little harder for it, as W to another prompt's answer is lower.
15. pi_old is what the policy says in its first training pass after the rollout, not what its bfloat16 copy, which drew the samples, said.

At the first step after a rollout rho is 1, so the loss is minus the mean advantage, plus the penalty, which is 0 before the first update.
The advantages of a group's samples sum to 0: without `imitate` a loss near 0 is right, its gradient is not 0. With it, the demonstrations'
advantages remain, and they weigh more than the samples': the log tells both (advantage_samples, advantage_demonstration).
"""

import random
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import parallel
from batch import Batch
from chat import Chat
from data import HELPFUL
from encoder import similarities
from groups import most_spread, pick
from judge import judge
from kernels import Objective, clipped_objective, group_advantage, grpo_loss, token_logprobs
from loop import Loop
from model import frozen_copy, generate, head_inputs, run_blocks
from reward import RewardModels
from sft import optimizer_for, set_lr, train_top
from transformer import Transformer

SCALINGS = ("none", "data", "model", "product", "sum", "spread")


@dataclass(frozen=True)
class GRPOConfig:
    """GRPO-S."""

    rollouts: int = 3  # times that fresh samples are drawn
    iterations: int = 2  # optimizer steps on each rollout (GRPO's mu); from the second on the ratio differs from 1
    prompts: int = 64  # P, prompts of a rollout
    samples: int = 2  # G, samples per prompt
    imitate: bool = (
        True  # the demonstration is learnt from as well, by its advantage over the group's samples
    )
    keep: float = 0.25  # share of the groups, those whose rewards spread most, that are learnt from
    blocks: int = 10  # top blocks trained; 0: the whole model
    tokens_per_batch: int = (
        4096  # tokens of a forward and backward pass; the result does not depend on it
    )
    recompute: bool = False  # gradient checkpointing: less memory, more time in training
    shard: bool = (
        False  # under torchrun: FSDP2, each process keeps a part of the policy; otherwise all of it
    )
    lr: float = 1.5e-4  # peak learning rate
    helpful_share: float = 0.5  # share of harmless prompts
    clip: float = 0.2  # c of the clipped ratio
    beta_kl: float = 0.02  # weight of the KL penalty to the warm start
    open_prompts: bool = False  # draws also the pool's and the harmless prompts that are no demonstrations; their difficulty is told by the most similar one
    scaling: str = (
        "product"  # of the advantages: none | data | model | product | sum | spread (ours)
    )
    per_sample: bool = False  # alphaD per sample instead of per prompt
    drop: float = 0.2  # share of outlying gaps that alphaM leaves out
    decay: float = 0.5  # of the moving averages in the denominators
    std_eps: float = 0.5  # eps beside a group's std; rewards have standard deviation 1 over the samples of a category


# ------------------------------------------------------------------------------------------------ the maths


def data_hardness(W: Tensor, mean_delta: Tensor | float) -> Tensor:
    """alphaD = sigma(1 - W) / sigma(mean_delta). W: similarities, any shape, in [-1, 1]; mean_delta: the category's mean of 1 - W."""
    return torch.sigmoid(1 - W) / torch.sigmoid(
        torch.as_tensor(mean_delta, dtype=W.dtype, device=W.device)
    )


def model_responsiveness(gaps: Tensor, mean_gap: Tensor | float, drop: float = 0.2) -> Tensor:
    """alphaM = sigma(mean of the inlying gaps) / sigma(mean_gap), a scalar.

    gaps (n,): R(q, demonstration) - R(q, sample) of one category's batch, in reward units; the floor(drop * n) gaps
    furthest from their mean are left out. mean_gap: the category's running mean of all gaps.
    """
    if gaps.ndim != 1 or len(gaps) == 0 or not 0 <= drop < 1:
        raise ValueError(
            f"want gaps (n,) with n > 0 and 0 <= drop < 1, got {tuple(gaps.shape)} and {drop}"
        )
    keep = (gaps - gaps.mean()).abs().argsort(stable=True)[: len(gaps) - int(drop * len(gaps))]
    return torch.sigmoid(gaps[keep].mean()) / torch.sigmoid(
        torch.as_tensor(mean_gap, dtype=gaps.dtype, device=gaps.device)
    )


def difficulty_scale(alpha_data: Tensor, alpha_model: Tensor, scaling: str = "product") -> Tensor:
    """alpha from its two factors: none (1) | data | model | product (DR-IRL) | sum (their mean) | spread (the product to the 8th, ours). Detached."""
    both = torch.broadcast_tensors(torch.as_tensor(alpha_data), torch.as_tensor(alpha_model))
    a, b = (z.detach() for z in both)
    modes = {
        "none": torch.ones_like(a),
        "data": a,
        "model": b,
        "product": a * b,
        "sum": (a + b) / 2,
        "spread": (a * b) ** 8,
    }
    if scaling not in modes:
        raise ValueError(f"scaling {scaling!r}: want one of {', '.join(SCALINGS)}")
    return modes[scaling]


def objective_of(
    advantage: Tensor,
    mask: Tensor,
    logp_ref: Tensor,
    logp_old: Tensor | None,
    clip: float,
    beta_kl: float,
    sequences: int,
) -> Objective:
    """Of completions (B, T) given by their mask, what the kernels want per token (n,), row by row: the advantage (B,) of each token's
    completion and the weight 1 / |o_i| / sequences. logp_ref and logp_old (n,) are per token already."""
    lengths = mask.sum(1)
    weight = 1 / (sequences * lengths.to(logp_ref.dtype))
    return Objective(
        advantage.repeat_interleave(lengths),
        weight.repeat_interleave(lengths),
        logp_ref,
        logp_old,
        clip,
        beta_kl,
    )


def loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    beta_kl: float = 0.0,
    sequences: int | None = None,
) -> tuple[Tensor, dict]:
    """-J: the clipped surrogate with its KL penalty, and what to log. logp* and mask (B, T), advantage (B,).

    sequences: the number to divide by, B if not given. A micro-batch passes the whole batch's, so that the sum over
    micro-batches is the loss of the batch. Training computes the same straight from hidden states: kernels.grpo_loss.
    """
    if (
        not logp.shape == logp_old.shape == logp_ref.shape == mask.shape
        or advantage.shape != logp.shape[:1]
    ):
        raise ValueError(
            f"want (B, T) four times and (B,): {[tuple(z.shape) for z in (logp, logp_old, logp_ref, mask, advantage)]}"
        )
    o = objective_of(
        advantage, mask, logp_ref[mask], logp_old[mask], clip, beta_kl, sequences or len(mask)
    )
    J, kl, clipped = clipped_objective(logp[mask], o)
    return -(o.weight * J).sum(), {
        "kl": (o.weight * kl).sum().item(),
        "clipped": (o.weight * clipped).sum().item(),
    }


def blend(means: dict[str, float], category: str, batch_mean: float, decay: float) -> float:
    """A category's moving average, with a batch's mean blended into it; it starts at the first."""
    means[category] = decay * means.get(category, batch_mean) + (1 - decay) * batch_mean
    return means[category]


def difficulty(
    W: Tensor,
    gaps: Tensor,
    categories: list[str],
    deltas: dict[str, float],
    gap_means: dict[str, float],
    c: GRPOConfig,
) -> Tensor:
    """alpha (P, G) from similarities W (P, G) and reward gaps (P, G), each category on its own; updates the moving averages of 1 - W and of the gap."""
    alpha = torch.ones_like(W)
    for category in sorted(set(categories)):
        rows = [p for p, name in enumerate(categories) if name == category]
        similar = W[rows] if c.per_sample else W[rows].mean(1, keepdim=True).expand(-1, W.shape[1])
        hard = data_hardness(similar, blend(deltas, category, (1 - W[rows]).mean().item(), c.decay))
        responsive = model_responsiveness(
            gaps[rows].flatten(),
            blend(gap_means, category, gaps[rows].mean().item(), c.decay),
            c.drop,
        )
        alpha[rows] = difficulty_scale(hard, responsive, c.scaling)
    return alpha


def advantages(scores: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """A (P, G + 1) of the groups' G samples and, last, their demonstrations, from their rewards `scores` (P, G + 1) and alpha (P, G).

    The demonstration's is mean alpha (R_demo - mean of the samples) / (std of all G + 1 + eps): it stays out of the mean that the samples are measured from.
    """
    R, demo = scores[:, :-1], scores[:, -1:]
    outside = (
        alpha.mean(1, keepdim=True)
        * (demo - R.mean(1, keepdim=True))
        / (scores.std(1, correction=0, keepdim=True) + eps)
    )
    return torch.cat((group_advantage(R, alpha, eps), outside), 1)


# ------------------------------------------------------------------------------------------------ the loop


def start_means(history: list[dict], encoder) -> tuple[dict[str, float], dict[str, float]]:
    """Per category the means of delta and of the gap before the first rollout: those of IRL's samples (`history`: see train)."""
    deltas, gap_means = {}, {}
    for category in sorted({g["category"] for g in history}):
        mine = [g for g in history if g["category"] == category]
        W = similarities(
            encoder,
            [[text for _, text in g["samples"]] for g in mine],
            [g["response"] for g in mine],
        )
        deltas[category] = 1 - W.mean().item()
        gap_means[category] = (
            sum(g["reward_demo"] - r for g in mine for r, _ in g["samples"]) / W.numel()
        )
    return deltas, gap_means


def score(
    rewards: RewardModels, batch: Batch, categories: list[str], split: int, tokens: int, amp
) -> tuple[Tensor, Tensor]:
    """Rewards (B,) of a batch's completions, and its hidden states (N, D) at block `split`, below which policy, reference and reward
    models are one network. At most `tokens` tokens at a time."""
    R, places, hidden = [], [], []
    for rows in batch.split(list(range(len(batch.owner))), tokens):
        part, at = batch.select(rows)
        with torch.no_grad(), amp():
            x = run_blocks(rewards.trunk[0], part, stop=split)
            R.append(
                rewards(
                    rewards.hidden(part, x, split),
                    part,
                    [categories[p] for p in batch.owner[rows].unique().tolist()],
                )
            )
        hidden.append(x), places.append(at)
    x = torch.cat(hidden)  # a prompt cut into several parts is in each, with the same values
    return torch.cat(R), x.new_empty(len(batch.ids), x.shape[1]).index_copy(0, torch.cat(places), x)


def prepare(
    rewards: RewardModels,
    batch: Batch,
    shared: Tensor,
    split: int,
    rows: list[int],
    advantage: Tensor,
    sequences: int,
    c: GRPOConfig,
    temperature: float,
    amp,
) -> list[tuple]:
    """What update takes of the completions `rows`, whose loss is divided by `sequences`: per micro-batch (Batch, hidden states at block
    `split`, Objective with pi_ref's log-probs). shared: those of all completions, from score. Every process makes the same number, if need be of weight 0:
    gradients are summed over the processes, which wait for each other."""
    out, parts = [], batch.split(rows, c.tokens_per_batch)
    empty = [[0]] * (parallel.most(len(parts)) - len(parts))
    for i, mine in enumerate(parts + empty):
        part, at = batch.select(mine)
        with torch.no_grad(), amp():
            top = run_blocks(rewards.trunk[0], part, shared[at], split)
            logp_ref = token_logprobs(*head_inputs(rewards.trunk[0], top, part), temperature)
        objective = objective_of(
            advantage[mine], part.mask, logp_ref, None, c.clip, c.beta_kl, sequences
        )
        if i >= len(parts):  # only another process has a micro-batch here
            objective.weight.zero_()
        out.append((part, shared[at], objective))
    return out


def update(
    policy: Transformer,
    optimizer,
    micro: list[tuple],
    split: int,
    temperature: float,
    amp,
    recompute: bool,
    finite,
) -> dict:
    """One optimizer step on the prepared micro-batches, unless `finite` turns loss or gradient down (Loop.finite). Returns what to log. The first one after
    a rollout sets log pi_old."""
    sums = torch.zeros(3, dtype=torch.float64)  # loss, kl, clipped
    for batch, shared, objective in micro:
        with amp():
            # split 0: the embeddings are trained too, so they run here
            inputs = head_inputs(
                policy,
                run_blocks(policy, batch, shared if split else None, split, recompute=recompute),
                batch,
            )
            part, logp = grpo_loss(*inputs, objective, temperature)
        part.backward()
        _, kl, clipped = clipped_objective(logp, objective)
        sums += torch.stack(
            (part.detach(), (objective.weight * kl).sum(), (objective.weight * clipped).sum())
        ).cpu()
        if objective.logp_old is None:
            objective.logp_old = logp
    stats = dict(zip(("loss", "kl", "clipped"), parallel.add(sums).tolist()))
    stats["grad_norm"] = parallel.clip_gradients(
        [p for p in policy.parameters() if p.requires_grad], 1.0
    )
    if finite(loss=stats["loss"], grad_norm=stats["grad_norm"]):
        optimizer.step()
    optimizer.zero_grad()
    return stats


def train(
    policy: Transformer,
    chat: Chat,
    rewards: RewardModels,
    encoder,
    rows: list[dict],
    c: GRPOConfig,
    amp,
    temperature: float,
    max_new_tokens: int,
    dtype: torch.dtype,
    seed: int = 0,
    history: list[dict] = (),
    loop: Loop | None = None,
) -> None:
    """Trains the policy in place against `rewards`, whose trunk is pi_ref, the policy's own start.

    rows carry prompt, category and response (the demonstration; if it is another prompt's: borrowed, True); history: rows with reward_demo and samples, (reward, text)
    pairs, which the running means start from.
    """
    rng, split = (
        random.Random(seed),
        min(train_top(policy, c.blocks), rewards.below),
    )  # below block `split` all models are one
    share = slice(
        parallel.rank(), None, parallel.world()
    )  # of each rollout's prompts: this process's
    if c.shard:
        parallel.shard(policy)
    optimizer, draw = optimizer_for(policy, c.lr), pick(rows, c.prompts, c.helpful_share, rng)
    loop = loop or Loop("grpo")
    loop.state = loop.state or dict(
        zip(("deltas", "gap_means"), start_means(history, encoder))
    )  # saved with the weights
    deltas, gap_means = loop.state["deltas"], loop.state["gap_means"]
    bar = tqdm(range(c.rollouts), desc="grpo", unit="rollout", disable=parallel.rank() > 0)
    for n in bar:
        # 1. a group of samples per prompt of this process's share
        part, seed, clock = next(draw), rng.randrange(2**31), [time.time()]
        if loop.skip(n, policy, optimizer):
            continue
        categories, mine = [r["category"] for r in part], part[share]
        prompts, demonstrations = (
            [chat.prompt(r["prompt"]) for r in mine],
            [r["response"] for r in mine],
        )
        draws = torch.rand(
            len(part), c.samples, max_new_tokens, generator=torch.Generator().manual_seed(seed)
        )
        sampler = frozen_copy(policy, dtype)  # cast once a rollout, not once a token
        flat = generate(
            sampler,
            prompts,
            c.samples,
            max_new_tokens,
            temperature,
            eos=chat.eos,
            draws=draws[share].flatten(0, 1),
        ).rows()
        del sampler
        groups = [flat[i : i + c.samples] for i in range(0, len(flat), c.samples)]
        texts = [[chat.decode(o) for o in group] for group in groups]
        clock.append(time.time())
        # 2. rewards of the group's members: G samples and, last, the demonstration
        batch = Batch(
            prompts,
            [[*group, chat.answer(d)] for group, d in zip(groups, demonstrations)],
            policy.device,
        )
        own, shared = score(
            rewards, batch, [r["category"] for r in mine], split, c.tokens_per_batch, amp
        )
        facts = [
            [[judge(t) == "refuses", len(o), chat.ended(o), not t.strip()] for t, o in zip(*group)]
            for group in zip(texts, groups)
        ]
        W = similarities(encoder, texts, demonstrations).to(own.device)
        scores, W, facts = (
            parallel.gather(x, len(part))
            for x in (own.view(len(mine), -1), W, torch.tensor(facts, device=own.device).float())
        )
        R, demo = scores.split((c.samples, 1), 1)  # (P, G), (P, 1)
        # 3. advantages, scaled by difficulty
        if sound := loop.finite(reward=scores, similarity=W):  # before they enter the running means
            alpha = difficulty(W, demo - R, categories, deltas, gap_means, c)
            sound = loop.finite(alpha=alpha)
        if not sound:
            loop.end(n)
            continue
        advantage = advantages(scores, alpha, c.std_eps)  # (P, G + 1)
        # 4. the groups worth learning from, and what the reference says of them
        teaches = torch.tensor(
            [c.imitate and not r.get("borrowed", False) for r in part]
        )  # is the demonstration learnt from?
        # the same members of every group are compared: with the demonstration only if all are learnt from
        kept = most_spread(
            (scores if teaches.all() else R).std(1, correction=0).tolist(), categories, c.keep
        )
        learns = torch.zeros(len(part), c.samples + 1, dtype=torch.bool)  # (P, G + 1), as advantage
        learns[kept, :-1], learns[kept, -1] = True, teaches[kept]
        micro = prepare(
            rewards,
            batch,
            shared,
            split,
            learns[share].flatten().nonzero()[:, 0].tolist(),
            advantage[share].flatten(),
            int(learns.sum()),
            c,
            temperature,
            amp,
        )
        clock.append(time.time())
        # 5. updates
        for step in range(c.iterations):
            set_lr(optimizer, c.lr, (n + (step + 0.5) / c.iterations) / c.rollouts)
            stats = update(
                policy, optimizer, micro, split, temperature, amp, c.recompute, loop.finite
            )
        clock.append(time.time())
        # 6. log
        refused, length, ended, empty = facts.cpu().unbind(2)
        harmful = torch.tensor([name != HELPFUL for name in categories])
        shown = {
            f"{kind}_{name}": values[which].mean().item()
            for kind, which in (("harmful", harmful), ("helpful", ~harmful))
            if which.any()
            for name, values in (("refused", refused), ("reward", R.cpu()))
        }
        loop.end(
            n,
            **stats,
            **shown,
            reward_std=R.std(1, correction=0).mean().item(),
            gap_demo_minus_sample=(demo - R).mean().item(),
            similarity=W.mean().item(),
            alpha=[round(a, 4) for a in alpha.mean(1).tolist()],
            advantage_samples=advantage[kept, :-1].abs().mean().item(),
            advantage_demonstration=advantage[learns[:, -1], -1].mean().item()
            if learns[:, -1].any()
            else 0.0,
            length=length.mean().item(),
            ended=ended.mean().item(),
            empty=int(empty.sum()),
            equal_groups=int((R == R[:, :1]).all(1).sum()),
            seconds=dict(
                zip(
                    ("rollout", "score", "train"),
                    (round(b - a, 2) for a, b in zip(clock, clock[1:])),
                )
            ),
        )
        bar.set_postfix({k: f"{v:.2f}" for k, v in shown.items() if "refused" in k}, refresh=False)
