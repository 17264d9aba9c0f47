"""Steps 3 to 6: GRPO-S, group relative policy optimization, scaled by task difficulty.

Prompt x of category j, samples o_i, demonstration y; sigma is the sigmoid (version 3 on arXiv):

    delta  = 1 - W,  W: similarity of samples and demonstration         encoder.similarity
    alphaD = sigma(delta) / sigma(mean delta of category j)             data_hardness
    alphaM = sigma(mean of the inlying gaps) / sigma(mean gap of j)     model_responsiveness
    A_i    = alphaD alphaM (R_i - mean R) / (std R + eps)               kernels.group_advantage
    J      = 1/S sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho) A_i) - beta_kl k3 ]
    rho    = pi / pi_old, clipped to 1 - clip .. 1 + clip_high; clip_high 0: rho is 1 where A > 0
    k3     = exp(d) - d - 1,  d = log pi_ref - log pi                   loss

pi_old draws a rollout. Each update then learns from S sequences. With one update a rollout, the
default, pi is pi_old: rho is 1, and nothing is clipped.

Decisions where the paper's public notes are silent:
1. alpha multiplies the normalised advantage; in the rewards it would cancel, but for eps.
2. The gap is demonstration minus sample, as in DAMA (arXiv 2502.01943).
3. The denominators' means start from IRL's samples; mean <- (mean + batch mean) / 2.
4. alpha is one number per prompt (from its group's mean W); no gradient flows through it.
5. scaling sum: the mean of the two factors, so that an average task still gets about 1.
6. std is the population's. A group of equal rewards has advantage 0.
7. The loss is a mean over sequences of a mean over tokens, whatever the micro-batch.
8. k3 estimates KL(pi, pi_ref); its gradient, samples held fixed, is that of KL(pi_ref, pi).
9. Log-probs here are at temperature 1; samples drawn at another bias the gradient, rho and k3.
10. A prompt without a demonstration borrows, for W and gap, that of the most similar one in j.
Ours, off by default: 11. members ends: only the best and worst of G, and ties, are learnt from.
12. clip_high 0: no ratio; a good sample's gradient is A grad log pi, as in SFT.
13. anchor: demonstrations join each update with advantage 1, and under the KL penalty.
14. With several updates a pass ends with a running mean of its weights. --grpo-passes: each starts
    from pi_old, in another order; the policy is the mean of their ends.
15. extrapolate: it then goes further from pi_old (ExPO, arXiv 2404.16792).

A group's advantages sum to 0, so a loss near 0 is correct: with all members, no anchors, rho 1 and
no penalty.
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import Config, GRPOConfig
from encoder import similarities
from evaluate import cosine, look, rollout_record, sample_facts
from kernels import group_advantage
from sample import autocast, completion_logps, run_blocks
from sft import optimizer_for, set_lr, train_top
from support import parallel
from support.resume import Loop
from support.rollout import MicroBatch, draw_samples, plan, ready, score


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
    return torch.sigmoid(inlying.mean()) / torch.sigmoid(mean_gap.clamp(min=-20))  # not 1 / 0


def difficulty_scale(alpha_data: Tensor, alpha_model: Tensor, scaling: str = "product") -> Tensor:
    """alpha from its two factors, detached: none (1), data, model, product, sum or spread."""
    a, b = torch.broadcast_tensors(alpha_data.detach(), alpha_model.detach())
    modes = {"none": torch.ones_like(a), "data": a, "model": b, "product": a * b}
    modes |= {"sum": (a + b) / 2, "spread": (a * b) ** 8}  # spread, ours: further from 1
    if scaling not in modes:
        raise ValueError(f"scaling {scaling!r}: want one of {', '.join(modes)}")
    return modes[scaling]


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """k3 = exp(d) - d - 1, d = logp_ref - logp clamped to +-20.

    An unbiased and never negative estimate of KL(pi, pi_ref), per sampled token.
    """
    d = (logp_ref - logp).clamp(-20, 20)
    return torch.expm1(d) - d  # expm1: exp(d) - 1, exact for small d


INFO = ("kl", "entropy", "clipped_low", "clipped_high")


def loss(
    logp, logp_old, logp_ref, advantage, mask, clip=0.2, clip_high=0.2, beta_kl=0.0, sequences=None
):
    """-J, a scalar, and a dict of token means weighted as in J, its keys INFO.

    logp, logp_old, logp_ref, mask (B, T), advantage (B,). sequences: the S of J; None: B. A
    micro-batch passes its update's S, then losses add up. kl: log pi - log pi_ref; entropy: -log pi
    (both estimates hold on samples of pi); clipped_*: share of tokens that the clip stops.
    """
    if not logp.shape == logp_old.shape == logp_ref.shape == mask.shape:
        raise ValueError("logp, logp_old, logp_ref and mask: want (B, T) each")
    if advantage.shape != logp.shape[:1]:
        raise ValueError(f"advantage {tuple(advantage.shape)}: want {tuple(logp.shape[:1])}")
    lengths = mask.sum(1)
    weight = 1 / ((sequences or len(mask)) * lengths.to(logp_ref.dtype))
    weight, A = weight.repeat_interleave(lengths), advantage.repeat_interleave(lengths)  # (tokens,)
    logp, logp_old, logp_ref = logp[mask], logp_old[mask], logp_ref[mask]
    if clip_high == 0:
        logp_old = torch.where(A > 0, logp.detach(), logp_old)
    rho = torch.exp((logp - logp_old).clamp(-20, 20))
    surrogate = torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip_high) * A)
    low, high = (A < 0) & (rho < 1 - clip), (A > 0) & (rho > 1 + clip_high)
    told = dict(zip(INFO, (logp - logp_ref, -logp, low, high)))
    info = {name: (weight * x).sum().item() for name, x in told.items()}
    return -(weight * (surrogate - beta_kl * kl_k3(logp, logp_ref))).sum(), info


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


def advantages(R: Tensor, alpha: Tensor, anchors: int, g: GRPOConfig) -> tuple[Tensor, Tensor]:
    """A and learnt (bool), each (P + anchors, G + 1), from rewards R (P, G) and alpha (P, 1).

    members ends: of a group only the best and the worst are learnt from, unless their A is 0. Last
    column: the demonstrations; only the anchors' are learnt from, with A = 1.
    """
    A, (P, G) = group_advantage(R, alpha, g.std_eps), R.shape
    A = F.pad(A, (0, 1, 0, anchors), value=1.0)
    learnt = torch.zeros_like(A, dtype=torch.bool)
    ends = (R == R.amax(1, keepdim=True)) | (R == R.amin(1, keepdim=True))
    learnt[:P, :G], learnt[P:, G] = (ends & (A[:P, :G] != 0)) | (g.members == "all"), True
    return A, learnt


def start_means(history: list[dict], phi) -> dict:
    """Per category the means of 1 - W and of the gap over IRL's samples (`history`: see train)."""
    deltas, gap_means = {}, {}
    for category in sorted({g["category"] for g in history}):
        groups = [g for g in history if g["category"] == category]
        texts = [[text for _, text in g["samples"]] for g in groups]
        W = similarities(phi, texts, [g["response"] for g in groups])
        gaps = [g["reward_demo"] - r for g in groups for r, _ in g["samples"]]
        deltas[category] = 1 - W.mean().item()
        gap_means[category] = sum(gaps) / W.numel()
    return {"deltas": deltas, "gap_means": gap_means}


def update(policy, micro: list[MicroBatch], A, S, frozen, c: Config, dtype, loop: Loop) -> dict:
    """One optimizer step, if S > 0, its gradient's norm cut to 1. Returns what to log.

    A (P + anchors, G + 1): advantages. S: the update's sequences, in all processes.
    margin: mean over samples of sign(A) times the token mean of log pi - log pi_ref. What `loss`
    tells is of the anchors too.
    """
    if S == 0:  # nothing to learn, and AdamW would go on by its momentum
        loop.gradient = None
        return {"sequences": 0}
    g, names, sums = c.grpo, ("margin", "loss", *INFO), torch.zeros(len(INFO) + 2).double()
    for m in micro:
        with autocast(policy.device, dtype):
            x = run_blocks(policy, m.batch, m.x, frozen)
            logp = completion_logps(policy, x, m.batch)
        old = logp.detach() if m.logp_old is None else m.logp_old
        a, n = A.flatten()[m.rows], torch.inf if m.filler else S  # a filler weighs nothing
        limits = g.clip, g.clip_high, g.beta_kl
        minus_J, info = loss(logp, old, m.logp_ref, a, m.batch.mask, *limits, n)
        minus_J.backward()
        gain = (logp.detach() - m.logp_ref).sum(1) / m.batch.mask.sum(1)
        drawn = gain.new_tensor([(row + 1) % A.shape[1] > 0 for row in m.rows])  # by the policy
        margin = (drawn * a.sign() * gain).sum().item() / max(1, n - g.anchor)
        sums += sums.new_tensor([margin, minus_J.item(), *(info[k] for k in INFO)])
    stats = dict(zip(names, parallel.add(sums).tolist()))
    trained = [p for p in policy.parameters() if p.requires_grad]
    stats["grad_norm"] = parallel.clip_gradients(trained, 1.0)  # sums the processes' gradients
    gradient = None if g.shard or g.updates == 1 else [p.grad for p in trained]
    if gradient and loop.gradient:
        stats["cosine"] = cosine(gradient, loop.gradient)  # see evaluate.noise_scale
    loop.gradient = gradient
    loop.descend(loss=stats["loss"], grad_norm=stats["grad_norm"])
    return {**stats, "sequences": S}


def roll_out(policy, reference, rewards, chat, phi, c, dtype, frozen, part, P, updates, seed):
    """Samples of the first P prompts of `part`, with their rewards and what else they tell.

    updates: of each update its places in `part`. Returns scores (len(part), G + 1), the
    demonstration's last; facts (P, G, 4): W, then sample_facts; each update's MicroBatches.
    """
    mine = [p for u in updates for p in u[parallel.share()] if p < P]
    groups = draw_samples(policy, chat, part, mine, c, dtype, seed)
    scores, micro = score(reference, rewards, chat, part, groups, updates, frozen, c, dtype)
    texts = [[chat.decode(ids) for ids in groups[p]] for p in mine]
    W = similarities(phi, texts, [part[p]["response"] for p in mine]).to(scores)
    facts = scores.new_zeros(P, W.shape[1], 4)
    facts[mine] = torch.cat((W[..., None], sample_facts(chat, groups.values()).to(W)), 2)
    return scores, parallel.add(facts), micro


@torch.no_grad()
def passes(policy, optimizer, order: list, g: GRPOConfig):
    """Yields (k, update) of `order`, k its number in its pass; averages the weights in between.

    A pass of several updates (decisions 14 and 15) begins with the weights that the first began
    with and, if there are several passes, new moments. It ends with a running mean of its weights,
    those after update 0, then mean <- decay mean + (1 - decay) weights, decay = (k + 1) / (k + 10).
    After the last pass weights = m + extrapolate (m - start), m: the mean of the passes' ends.
    """
    learnt = [p for p in policy.parameters() if p.requires_grad and g.updates > 1]
    start, ends = [p.clone() for p in learnt], []
    for i in range(g.passes):
        for p, first in zip(learnt, start):
            p.copy_(first)
        if g.passes > 1:
            optimizer.state.clear()
        mean = learnt  # the parameters themselves: after update 0, its weights
        for k, u in enumerate(order[i * g.updates :][: g.updates]):
            yield k, u
            mean = [m.lerp(p, 1 - (k + 1) / (k + 10)) for m, p in zip(mean, learnt)]
        ends = [end.lerp(m, 1 / (i + 1)) for end, m in zip(ends or mean, mean)]
    for p, first, m in zip(learnt, start, ends):
        p.copy_(first.lerp(m, 1 + g.extrapolate))


def train(
    policy, reference, rewards, chat, phi, rows, c, dtype, history=(), loop=None, held=(), **own
):
    """Trains the policy in place. reference: pi_ref, its start, which the `rewards` build on.

    phi: the text encoder. rows: prompt, category and response (the demonstration; borrowed: True
    if another prompt's). history: IRL's groups with reward_demo and samples, (reward, text) pairs.
    held: rows only sampled and scored, before up to 4 rollouts and after the last. own: replaces
    roll_out or advantages. The steps are numbered as in README. U: updates of a pass.
    """
    g, loop = c.grpo, loop or Loop("grpo")
    frozen, P, U = train_top(policy, g.blocks), g.prompts, g.updates
    if g.shard:
        parallel.shard(policy)
    optimizer = optimizer_for(policy, g.lr)
    steps, models = g.passes * U, (reference, policy)[: 1 + (U > 1)]  # U 1: pi_old is pi itself
    roll = own.get("roll_out", roll_out)
    roll = partial(roll, policy, reference, rewards, chat, phi, c, dtype, frozen)
    loop.state = loop.state or start_means(history, phi)  # saved with the weights
    count = tqdm(range(g.rollouts), "grpo", unit="rollout", disable=parallel.rank() > 0)
    for n, (part, updates, order, seed) in zip(count, plan(rows, c)):
        if loop.skip((n + 1) * steps - 1, policy, optimizer):
            continue
        record = look(roll, held, c.run.seed) if n % -(-g.rollouts // 4) == 0 else {}
        begun = time.time()
        # 3. Sample G completions o_i of each prompt from pi_old, and score them: R_i
        scores, facts, micro = roll(part, P, updates, seed)
        R, W, gaps = scores[:P, :-1], facts[..., 0], scores[:P, -1:] - scores[:P, :-1]  # (P, G)
        loop.check(reward=scores, similarity=W)
        # 4. Difficulty: alpha = alphaD alphaM
        categories = [r["category"] for r in part[:P]]
        alpha = difficulty(W, gaps, categories, **loop.state, scaling=g.scaling)
        # 5. Advantage: A_i = alpha (R_i - mean R) / (std R + eps)
        A, learnt = own.get("advantages", advantages)(R, alpha, U * g.anchor, g)
        record |= rollout_record(categories, scores[:P], facts)
        record["alpha"] = [round(a, 4) for a in alpha.flatten().tolist()]
        record["seconds"] = round(time.time() - begun, 2)
        # 6. Update: steps up the gradient of J
        batches = [ready(models, m, learnt, frozen, dtype) for m in micro]
        for step, (k, u) in enumerate(passes(policy, optimizer, order, g), n * steps):
            loop.gradient = loop.gradient if k else None  # of another pass
            set_lr(optimizer, g.lr, (n * U + k + 0.5) / (U * g.rollouts))
            S = int(learnt[list(updates[u])].sum())  # sequences, in all processes
            record |= update(policy, batches[u], A, S, frozen, c, dtype, loop)
            if step + 1 < (n + 1) * steps:  # the rollout's last is logged below
                loop.end(step, whole=False, **record)
                record = {}
        if n + 1 == g.rollouts:
            record |= look(roll, held, c.run.seed)
        loop.end(step, **record)
