"""Step 2: maximum-likelihood inverse RL. One shadow reward model per harm category.

Find the reward r that makes the demonstrations most likely under its own best policy

    pi_r(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x).

The log-likelihood's gradient (Li et al. 2024, arXiv 2405.17888) raises the demonstration's reward
and lowers what the policy would say instead:

    grad l = (1/beta) E_(x,y)~D [ grad r(x, y) - E_z~pi_r(.|x) grad r(x, z) ]

irl_loss estimates the second term by importance weights; linear and logistic replace it by simpler
ones (the laptop's is logistic). `fit` takes the steps. Decisions where public notes are silent:
1. A shadow model is a trained copy of the warm start with a linear head; laptop and gpu copy its
   top blocks alone and share the lower ones. Its reward is the mean over response tokens; the last
   token alone ranked worse.
2. An eighth model, helpful, learns from harmless prompts: four times as many, as they vary more.
   Without it refusing everything wins.
3. contrast (off by default): answers to harmless prompts join a harmful prompt's samples, refusals
   a harmless one's. The loss is then no estimate of the gradient above.
4. After fitting, each model's rewards of its samples get mean 0, std 1, to be comparable.
5. joint_epochs (0 by default): the seven begin as copies of one that learnt from all their prompts.
6. pi_ref, which draws the samples, is the warm start at their temperature (in GRPO-S: at 1).
7. L2 * mean r^2 keeps r finite even if it separates demonstrations from samples perfectly.
"""

import copy
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import Config, IRLConfig, UserError
from data import CATEGORIES, HELPFUL
from model import Transformer
from sample import Batch, autocast, generate, run_blocks
from support.resume import Loop

BATCH = 6  # prompts of a step
L2 = 0.01  # weight of the mean squared reward


def irl_loss(r_demo, r_samples, beta=1.0, estimator="importance", log_ratio=0.0) -> Tensor:
    """A loss, mean over prompts; importance's gradient estimates minus grad l above.

    r_demo (P,): rewards of the demonstrations; r_samples (P, K): of sampled responses.
    importance: samples of a policy q, weighted by softmax_k(r_k/beta + log_ratio_k), where
        log_ratio is log pi_ref - log q: 0 here, as q is pi_ref. Exact as K grows.
        loss = logsumexp_k(r_k/beta + log_ratio_k) - r_demo/beta
    linear: E under pi_ref, not pi_r.  loss = (mean_k r_k - r_demo) / beta
    logistic: Bradley-Terry's, bounded below.  loss = -mean_k log sigma((r_demo - r_k) / beta)
    """
    if r_demo.ndim != 1 or r_samples.ndim != 2 or len(r_demo) != len(r_samples):
        shapes = f"{tuple(r_demo.shape)} and {tuple(r_samples.shape)}"
        raise ValueError(f"want r_demo (P,) and r_samples (P, K), got {shapes}")
    if estimator == "importance":
        return (torch.logsumexp(r_samples / beta + log_ratio, dim=1) - r_demo / beta).mean()
    if estimator == "linear":
        return (r_samples.mean(1) - r_demo).mean() / beta
    if estimator == "logistic":
        return -F.logsigmoid((r_demo[:, None] - r_samples) / beta).mean()
    raise ValueError(f"estimator {estimator!r}: want importance, linear or logistic")


class Shadow(nn.Module):
    """One shadow reward model: copies of the reference's top blocks and norm, and a linear head."""

    def __init__(self, reference: Transformer, below: int):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(b) for b in reference.layers[below:]).float()
        self.norm = copy.deepcopy(reference.norm).float()
        self.value = nn.Linear(reference.config.hidden_size, 1)
        nn.init.zeros_(self.value.weight)  # every reward starts at 0
        nn.init.zeros_(self.value.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.rope = reference.rope

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """x (N, D), this model's input -> rewards (B,), float32, standardised on samples."""
        x = run_blocks(self, batch, x)
        value = self.value(self.norm(x[batch.first :]))[:, 0].float()  # of the completions' tokens
        total = value.new_zeros(batch.mask.shape).masked_scatter(batch.mask, value).sum(1)
        return (total / batch.mask.sum(1) - self.mean) / self.std


class RewardModels(nn.Module):
    """The shadow models of all categories, on the frozen reference's lowest `below` blocks."""

    def __init__(self, reference: Transformer, c: IRLConfig):
        super().__init__()
        one = c.integration == "one"  # model for all harm categories
        self.model_of = {x: "harm" if one else x for x in CATEGORIES} | {HELPFUL: HELPFUL}
        self.names = list(dict.fromkeys(self.model_of.values()))
        self.below = max(0, reference.config.layers - c.reward_blocks) if c.reward_blocks else 0
        self.integration = c.integration
        shadows = {name: Shadow(reference, self.below) for name in self.names}
        self.shadows = nn.ModuleDict(shadows).to(reference.device)

    def forward(self, x: Tensor, batch: Batch, categories: list[str]) -> Tensor:
        """Rewards (B,) of a batch's completions; x (N, D): the reference's states at `below`.

        categories: one per prompt. categorized, linear: two integrations of the paper's version 1.
        """
        if self.integration == "linear":
            *harm, last = (shadow(x, batch) for shadow in self.shadows.values())
            helpful = torch.tensor([c == HELPFUL for c in categories], device=x.device)
            return torch.where(helpful[batch.owner], last, torch.stack(harm).mean(0))
        out, owner = x.new_zeros(len(batch.owner), dtype=torch.float32), batch.owner.tolist()
        names = [self.model_of[category] for category in categories]
        for name in sorted(set(names)):  # each prompt runs through its own model only
            rows = [b for b, p in enumerate(owner) if names[p] == name]
            part, places = batch.select(rows)
            out[rows] = self.shadows[name](x[places], part)
        return out


def sample_groups(policy: Transformer, chat, rows: list[dict], c: Config) -> list[dict]:
    """K responses of the policy to some prompts of each category, with their demonstrations.

    A group is its demonstration's row with "prompt_ids", "demonstration", "samples" (K lists of
    ids) and "contrast": random demonstrations of the other kind, harmful or harmless.
    """
    K, rng = c.irl.samples, random.Random(c.run.seed)
    part = []
    for name in (*CATEGORIES, HELPFUL):
        known = [r for r in rows if r["category"] == name]
        wanted = c.irl.prompts * (4 if name == HELPFUL else 1)
        part += rng.sample(known, min(wanted, len(known)))
    part.sort(key=lambda r: len(r["prompt"]))
    groups, size, T, temperature = [], max(1, 128 // K), c.run.max_new_tokens, c.run.temperature
    for i in tqdm(range(0, len(part), size), desc="irl samples", unit="batch"):
        prompts = [chat.prompt(r["prompt"]) for r in part[i : i + size]]
        drawn = generate(policy, prompts, K, T, temperature, rng.randrange(2**31), chat.eos)
        for k, (r, prompt) in enumerate(zip(part[i : i + size], prompts)):
            ids = {"prompt_ids": prompt, "demonstration": chat.answer(r["response"])}
            other = [o for o in rows if (o["category"] == HELPFUL) != (r["category"] == HELPFUL)]
            contrast = [chat.answer(o["response"]) for o in rng.sample(other, c.irl.contrast)]
            groups.append({**r, **ids, "samples": drawn[k * K :][:K], "contrast": contrast})
    rng.shuffle(groups)
    return groups


def pack_groups(models, reference: Transformer, groups: list[dict], dtype, size=BATCH) -> list:
    """Batches of up to `size` prompts of one model: (model name, groups, Batch, reference's x)."""
    out = []
    for name in models.names:
        mine = [g for g in groups if models.model_of[g["category"]] == name]
        for i in range(0, len(mine), size):
            part = mine[i : i + size]
            answers = [[g["demonstration"], *g["samples"], *g.get("contrast", [])] for g in part]
            batch = Batch([g["prompt_ids"] for g in part], answers, reference.device)
            with torch.no_grad(), autocast(reference.device, dtype):
                out.append((name, part, batch, run_blocks(reference, batch, stop=models.below)))
    return out


def adamw(models: RewardModels, c: IRLConfig) -> torch.optim.Optimizer:
    """AdamW; the heads, which start at zero, learn ten times faster than the blocks."""
    heads = [p for name, p in models.named_parameters() if ".value." in name]
    blocks = [p for name, p in models.named_parameters() if ".value." not in name]
    groups = [{"params": blocks, "peak": c.lr}, {"params": heads, "peak": 10 * c.lr}]
    return torch.optim.AdamW(groups, lr=c.lr, weight_decay=0.0, fused=True)


def fit(models: RewardModels, batches: list, c: IRLConfig, dtype, seed=0, loop=None) -> None:
    """One optimizer step a packed batch, c.joint_epochs + c.epochs times; then normalises."""
    rng, loop = random.Random(seed), loop or Loop("irl")
    if missing := sorted(set(models.names) - {name for name, *_ in batches}):
        raise UserError(f"no samples to fit reward model {missing[0]!r} on; raise --irl-prompts")
    models.requires_grad_(True)
    harmful = [name for name in models.names if name in CATEGORIES]
    epochs = c.joint_epochs + c.epochs
    for epoch in range(epochs):
        joint = epoch < c.joint_epochs
        if epoch in (0, c.joint_epochs):  # AdamW's moments start anew when the models part
            optimizer = adamw(models, c)
        order = tqdm(rng.sample(batches, len(batches)), f"irl pass {epoch + 1}", unit="step")
        for step, (name, _, batch, x) in enumerate(order, epoch * len(batches)):
            if loop.skip(step, models, optimizer):
                continue
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - step / (epochs * len(batches)))
            shadow = models.shadows[harmful[0] if joint and name in harmful else name]
            with autocast(x.device, dtype):
                r = shadow(x, batch).view(len(batch.source[0]), -1)  # (P, 1 + K + contrast)
            loss = irl_loss(r[:, 0], r[:, 1:], c.beta, c.estimator)
            gap = r[:, :1] - r[:, 1:]
            told = {"model": name, "loss": loss.item(), "accuracy": (gap > 0).float().mean().item()}
            told["gap_demo_minus_others"] = gap.mean().item()
            loop.update(step, loss + L2 * r.pow(2).mean(), shadow.parameters(), **told)
        if epoch == c.joint_epochs - 1:
            for name in harmful[1:]:
                models.shadows[name].load_state_dict(models.shadows[harmful[0]].state_dict())
    models.requires_grad_(False)
    standardise(models, batches, dtype)


@torch.no_grad()
def standardise(models: RewardModels, batches: list, dtype) -> None:
    """Brings each model's rewards of the samples it was fitted on to mean 0 and std 1."""
    for name, shadow in models.shadows.items():
        found = []
        for _, groups, batch, x in (b for b in batches if b[0] == name):
            with autocast(x.device, dtype):
                r = shadow(x, batch).view(len(groups), -1)
            found.append(r[:, 1 : 1 + len(groups[0]["samples"])].flatten())
        r = torch.cat(found) * shadow.std + shadow.mean  # as fitted
        shadow.mean.copy_(r.mean())
        shadow.std.copy_(r.std(correction=0).clamp(min=1e-6))


@torch.no_grad()
def score_groups(models: RewardModels, batches: list, dtype) -> None:
    """Adds "rewards" (of the samples) and "reward_demo" to every group of the packed batches."""
    for _, groups, batch, x in batches:
        with autocast(x.device, dtype):
            r = models(x, batch, [g["category"] for g in groups]).view(len(groups), -1).tolist()
        for g, (first, *rest) in zip(groups, r):
            g["reward_demo"], g["rewards"] = first, rest[: len(g["samples"])]
