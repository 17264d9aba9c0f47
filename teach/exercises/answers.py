"""Answers to all exercises, in their order. Try first.

    DRIRL_IMPL=teach/exercises/answers.py python -m pytest tests/exercises

Each is one way among several, written to be read. The project's own versions also check their
arguments and are faster. The stubs explain what the functions are for.
"""

import math
import re
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from config import UserError
from data import CATEGORIES, k_center
from model import attention
from sample import token_logps

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is for Linux; without it 20 to 22 are not graded
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None)

# ---------------------------------------------------------------------------- 1 to 3


def balance(rows, per_category, embeddings, seed=0):
    places = {c: [i for i, r in enumerate(rows) if r["category"] == c] for c in CATEGORIES}
    short = {c: per_category - len(at) for c, at in places.items() if len(at) < per_category}
    if short:
        raise UserError("too few: " + ", ".join(f"{c} ({n} missing)" for c, n in short.items()))
    out = []
    for at in places.values():
        chosen = k_center(embeddings[at], per_category, seed)  # places in `at`
        out += [rows[at[i]] for i in sorted(chosen)]
    return out


def parse_draft(text):
    parts = text.split("####")
    if len(parts) != 2:
        raise ValueError(f"want one ####, found {len(parts) - 1}")
    head, answer = parts
    steps = head.removesuffix("\n").split("\n")
    if not head.endswith("\n") or not all(step.strip() for step in steps):
        raise ValueError("want one or more lines that are not empty before ####")
    if not answer.startswith(" ") or not answer.strip():
        raise ValueError("want a space and an answer after ####")
    return steps, answer[1:]


def rope_frequencies(c):
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling:
        s = c.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    return freq.float()


def rotate(x, rope):
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # real and imaginary parts
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


# ---------------------------------------------------------------------------- 4 to 8


def choose(logits, temperature, draws):
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    at = draws[:, None].to(cdf.dtype) * cdf[:, -1:]  # the sums may end beside 1
    return torch.searchsorted(cdf, at, right=True)[:, 0]


def top_p(logits, p):
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    before = probs.cumsum(-1) - probs
    beyond = (before >= p) & (p < 1)  # rounded sums reach 1 early
    cut = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, beyond)
    return logits.masked_fill(cut, -torch.inf)


@torch.no_grad()
def generate(
    model, prompts, samples=1, max_new_tokens=64, temperature=1.0, seed=0, eos=(), draws=None
):
    out = []
    for prompt in (p for p in prompts for _ in range(samples)):
        cache, row, ids, start = {}, [], prompt, 0
        while len(row) < max_new_tokens and not (row and row[-1] in eos):
            x = model.embed_tokens(torch.tensor(ids))
            rope = model.rope(torch.arange(start, start + len(ids)))
            for i, block in enumerate(model.layers):

                def attend(q, k, v):
                    q, k, v = (z.transpose(0, 1)[None] for z in (q, k, v))  # (1, heads, N, E)
                    if i in cache:
                        k, v = (torch.cat((old, new), 2) for old, new in zip(cache[i], (k, v)))
                    cache[i] = k, v
                    all_keys = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
                    y = attention(q, k, v, all_keys if start else None)
                    return y[0].transpose(0, 1)

                x = block(x, rope, attend)
            row.append(F.linear(model.norm(x[-1]), model.head).argmax().item())
            ids, start = [row[-1]], start + len(ids)
        out.append(row)
    return out


def completion_mask(prompt_lengths, lengths, width):
    at = torch.arange(width)
    return (at >= prompt_lengths[:, None]) & (at < lengths[:, None])


def token_logprobs(h, W, targets, temperature=1.0):
    logps = (h @ W.T / temperature).log_softmax(-1)  # (N, V)
    return logps.gather(1, targets[:, None])[:, 0]


def sft_loss(logps, mask):
    return -(logps.sum(1) / mask.sum(1)).mean()


def sft_step(policy, batch, optimizer):
    optimizer.zero_grad()
    loss = sft_loss(token_logps(policy, batch), batch.mask)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# ---------------------------------------------------------------------------- 9 to 13


def irl_loss(r_demo, r_samples, beta=1.0, estimator="importance", log_ratio=0.0):
    if r_demo.ndim != 1 or r_samples.ndim != 2 or len(r_demo) != len(r_samples):
        raise ValueError("want r_demo (P,) and r_samples (P, K)")
    if estimator == "importance":
        return (torch.logsumexp(r_samples / beta + log_ratio, dim=1) - r_demo / beta).mean()
    if estimator == "linear":
        return (r_samples.mean(1) - r_demo).mean() / beta
    if estimator == "logistic":
        return -F.logsigmoid((r_demo[:, None] - r_samples) / beta).mean()
    raise ValueError(f"unknown estimator {estimator}")


def similarity(response, demonstration):
    if len(response) == 0 or len(demonstration) == 0:
        return response.new_zeros(())
    cos = F.normalize(response, dim=1) @ F.normalize(demonstration, dim=1).T  # a row per response_k
    return cos.max(dim=1).values.mean()


def data_hardness(W, mean_delta):
    mean_delta = torch.as_tensor(mean_delta, dtype=W.dtype)
    return torch.sigmoid(1 - W) / torch.sigmoid(mean_delta)


def model_responsiveness(gaps, mean_gap, drop=0.2):
    nearest = (gaps - gaps.mean()).abs().argsort(stable=True)
    inlying = gaps[nearest[: len(gaps) - int(drop * len(gaps))]]
    mean_gap = torch.as_tensor(mean_gap, dtype=gaps.dtype)
    return torch.sigmoid(inlying.mean()) / torch.sigmoid(mean_gap)


def difficulty_scale(alpha_data, alpha_model, scaling="product"):
    a, b = torch.broadcast_tensors(alpha_data.detach(), alpha_model.detach())
    modes = {"none": torch.ones_like(a), "data": a, "model": b, "product": a * b}
    modes |= {"sum": (a + b) / 2, "spread": (a * b) ** 8}
    if scaling not in modes:
        raise ValueError(f"unknown scaling {scaling}")
    return modes[scaling]


def group_advantage(rewards, alpha=1.0, eps=1e-4):
    alpha = torch.as_tensor(alpha, dtype=rewards.dtype)
    if alpha.shape not in ((), (len(rewards), 1), rewards.shape):
        raise ValueError(f"alpha {tuple(alpha.shape)}: want a number, (P, 1) or (P, G)")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = centred.pow(2).mean(dim=1, keepdim=True).sqrt()
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return alpha * (centred / (std + eps)).masked_fill(equal, 0.0)


# ---------------------------------------------------------------------------- 14 to 17


def advantages(R, alpha, anchors, g):
    (P, G), samples = R.shape, group_advantage(R, alpha, g.std_eps)
    A = R.new_ones(P + anchors, G + 1)
    A[:P, :G] = samples
    learnt = torch.zeros(A.shape, dtype=torch.bool)
    learnt[P:, G] = True
    if g.members == "all":
        learnt[:P, :G] = True
    else:
        ends = (R == R.amax(1, keepdim=True)) | (R == R.amin(1, keepdim=True))
        learnt[:P, :G] = ends & (A[:P, :G] != 0)
    return A, learnt


def kl_k3(logp, logp_ref):
    d = (logp_ref - logp).clamp(-20, 20)
    return torch.exp(d) - d - 1


def loss(
    logp, logp_old, logp_ref, advantage, mask, clip=0.2, clip_high=0.2, beta_kl=0.0, sequences=None
):
    if not logp.shape == logp_old.shape == logp_ref.shape == mask.shape:
        raise ValueError("want logp, logp_old, logp_ref and mask (B, T)")
    if advantage.shape != logp.shape[:1]:
        raise ValueError("want advantage (B,)")
    lengths = mask.sum(1)
    weight = 1 / ((sequences or len(mask)) * lengths.to(logp.dtype))
    weight, A = weight.repeat_interleave(lengths), advantage.repeat_interleave(lengths)  # (n,)
    logp, logp_old, logp_ref = logp[mask], logp_old[mask], logp_ref[mask]
    if clip_high == 0:
        logp_old = torch.where(A > 0, logp.detach(), logp_old)
    rho = torch.exp(logp - logp_old)
    surrogate = torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip_high) * A)
    low, high = (A < 0) & (rho < 1 - clip), (A > 0) & (rho > 1 + clip_high)
    told = {"kl": logp - logp_ref, "entropy": -logp, "clipped_low": low, "clipped_high": high}
    info = {name: (weight * x).sum().item() for name, x in told.items()}
    d = (logp_ref - logp).clamp(-20, 20)
    return -(weight * (surrogate - beta_kl * (torch.exp(d) - d - 1))).sum(), info


def learn(logps, optimizer, R, alpha, logp_ref, mask, order, g):
    A, learnt = (x[:, :-1] for x in advantages(R, alpha, 0, g))
    with torch.no_grad():
        logp_old = [logps(p) for p in range(len(R))]
    losses = []
    for prompts in order:
        sequences, total = int(learnt[prompts].sum()), 0.0
        for p in (p for p in prompts if learnt[p].any()):
            rows = learnt[p]
            fixed = logp_old[p][rows], logp_ref[p][rows], A[p][rows], mask[p][rows]
            part = loss(logps(p)[rows], *fixed, g.clip, g.clip_high, g.beta_kl, sequences)[0]
            part.backward()
            total += part.item()
        if sequences:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
    return losses


# ---------------------------------------------------------------------------- 18 and 19


def refuses(answer):
    text = re.sub(r'"[^"]*"', "", answer.lower().replace("’", "'"))  # who is quoted isn't asked
    if text.startswith("dear "):  # a letter speaks for somebody else
        return False
    unable = r"i(?:'m| am)? (?:can't|can ?not|won't|unable to|not able to|refuse to)"
    helping = "help|assist|write|provide|share|give|tell|explain|create|draft|support|open|do|join"
    others = r"i must decline|i(?:'d| would) rather not|feel comfortable|my answer is no"
    return bool(re.search(rf"\b{unable} (?:{helping})\b|\b(?:{others})\b", text))


def wilson(hits, n, z=1.96):
    if n == 0:
        return 0.0, 1.0
    p, a = hits / n, 1 + z * z / n  # a q^2 - (2 p + z^2 / n) q + p^2 = 0
    middle = (p + z * z / (2 * n)) / a
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / a
    return max(0.0, middle - half), min(1.0, middle + half)


def auc(positive, negative):
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return sum(pairs) / len(pairs) if pairs else math.nan


# ---------------------------------------------------------------------------- 20 to 22


@triton.jit
def advantage_kernel(
    R, r_prompt, r_sample, ALPHA, a_prompt, a_sample, OUT, eps, samples, BLOCK: tl.constexpr
):
    prompt, i = tl.program_id(0), tl.arange(0, BLOCK)
    mine = i < samples
    r = tl.load(R + prompt * r_prompt + i * r_sample, mask=mine, other=0.0)
    first = tl.load(R + prompt * r_prompt)
    alpha = tl.load(ALPHA + prompt * a_prompt + i * a_sample, mask=mine, other=0.0)
    centred = tl.where(mine, r - tl.sum(r, 0) / samples, 0.0)
    std = tl.sqrt(tl.sum(centred * centred, 0) / samples)
    differ = tl.sum(tl.where(mine & (r != first), 1, 0), 0)
    a = tl.where(differ == 0, 0.0, alpha * centred / (std + eps))
    tl.store(OUT + prompt * samples + i, a, mask=mine)


@triton.jit
def logprob_kernel(Z, stride, T, LOGP, inv_temperature, V, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    top, total = -3.4e38, 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(Z + n * stride + col, mask=col < V, other=float("-inf")) * inv_temperature
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    target = tl.load(Z + n * stride + tl.load(T + n)) * inv_temperature
    tl.store(LOGP + n, target - top - tl.log(total))


@triton.jit
def gradient_kernel(Z, stride, T, G, LOGP, inv_temperature, V, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    target, g = tl.load(T + n), tl.load(G + n)
    logit = tl.load(Z + n * stride + target)  # now: other warps overwrite it in the second pass
    top, total = -3.4e38, 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(Z + n * stride + col, mask=col < V, other=float("-inf")) * inv_temperature
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    lse = top + tl.log(total)
    tl.store(LOGP + n, logit * inv_temperature - lse)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(Z + n * stride + col, mask=col < V, other=float("-inf")) * inv_temperature
        dz = g * inv_temperature * (tl.where(col == target, 1.0, 0.0) - tl.exp(x - lse))
        tl.store(Z + n * stride + col, tl.where(g == 0, 0.0, dz), mask=col < V)
