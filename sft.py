"""Supervised fine-tuning: the warm start. Its optimizer and schedule serve GRPO-S too."""

import random

import torch
from torch import Tensor
from tqdm import tqdm

from config import SFTConfig
from data import HELPFUL, cycle
from model import Transformer
from sample import Batch, autocast, token_logps
from support import parallel
from support.resume import Loop


def train_top(policy: Transformer, blocks: int) -> int:
    """Leaves the top `blocks` blocks and the last norm trainable; 0, or all of them: everything.

    Returns how many blocks below are frozen. These need no backward pass.
    """
    frozen = max(0, policy.config.layers - blocks) if blocks else 0
    policy.requires_grad_(frozen == 0)
    policy.layers[frozen:].requires_grad_(True)
    policy.norm.requires_grad_(True)
    return frozen


def optimizer_for(policy: Transformer, lr: float) -> torch.optim.Optimizer:
    parameters = [p for p in policy.parameters() if p.requires_grad]
    kinds = [[p for p in parameters if parallel.is_sharded(p) == s] for s in (False, True)]
    groups = [{"params": part} for part in kinds if part]  # fused AdamW takes no mixture
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def set_lr(optimizer, lr: float, progress: float) -> None:
    """Linear decay to 0, times a warm-up over the first 5% of training; progress in [0, 1]."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, progress / 0.05 + 0.05) * max(0.0, 1.0 - progress)


def sft_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """-mean over responses of their mean token log-prob. logps, mask (B, T) -> scalar."""
    return -(logps.sum(1) / mask.sum(1)).mean()


def train(policy, chat, rows: list[dict], c: SFTConfig, dtype, seed: int = 0, loop=None) -> None:
    """Minimises sft_loss in place. rows carry prompt, category and response (the demonstration)."""
    frozen, rng, loop = train_top(policy, c.blocks), random.Random(seed), loop or Loop("sft")
    helpful = round(c.batch * c.helpful_share)
    answers = cycle([r for r in rows if r["category"] == HELPFUL], rng)
    refusals = cycle([r for r in rows if r["category"] != HELPFUL], rng)
    optimizer = optimizer_for(policy, c.lr)
    bar = tqdm(range(c.steps), desc=loop.stage, unit="step")
    for step in bar:
        part = [next(refusals) for _ in range(c.batch - helpful)]
        part += [next(answers) for _ in range(helpful)]
        if loop.skip(step, policy, optimizer):
            continue
        responses = [[chat.answer(r["response"])] for r in part]
        batch = Batch([chat.prompt(r["prompt"]) for r in part], responses, policy.device)
        set_lr(optimizer, c.lr, step / c.steps)
        with autocast(policy.device, dtype):
            loss = sft_loss(token_logps(policy, batch, frozen=frozen), batch.mask)
        loop.update(step, loss, policy.parameters(), seconds=round(loop.seconds, 2))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
