"""Supervised fine-tuning on Chain-of-Draft demonstrations: the warm start of DR-IRL, and the baseline it is held against."""

import random
from dataclasses import dataclass

import torch
from tqdm import tqdm

from batch import Batch
from chat import Chat
from data import HELPFUL, UserError
from loop import Loop
from model import token_logps
from parallel import is_sharded
from transformer import Transformer


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning."""

    steps: int = 110  # optimizer steps
    blocks: int = 20  # top blocks trained; 0: the whole model
    lr: float = 5e-4  # peak learning rate; 5% warm-up, then linear to zero
    batch: int = 16  # demonstrations a step
    helpful_share: float = (
        0.4375  # share of them that answer harmless prompts; the others refuse harmful ones
    )
    borrow: bool = False  # SFT continued: also on prompts without a demonstration, each with that of its category's most similar prompt
    baseline_steps: int = 0  # optimizer steps of SFT continued; 0: as many as sft would have done in the seconds of irl and grpo


def train_top(policy: Transformer, blocks: int) -> int:
    """Leaves only the top `blocks` blocks and the last norm trainable; returns how many blocks below stay frozen.

    blocks 0, or as many as there are, trains everything, embeddings and head included. Frozen blocks need no backward pass, and
    the policy, the reference policy and the reward models share them.
    """
    frozen = max(0, policy.c.layers - blocks) if blocks else 0
    policy.requires_grad_(frozen == 0)
    if frozen:
        policy.layers[frozen:].requires_grad_(True)
        policy.norm.requires_grad_(True)
    return frozen


def set_lr(optimizer, lr: float, progress: float) -> None:
    """Linear warm-up over the first 5% of training, then linear decay to zero. progress in [0, 1]."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, progress / 0.05 + 0.05) * max(0.0, 1.0 - progress)


def steps_in_time(seconds: dict[str, float], steps: int) -> int:
    """Steps of SFT that take as long as irl and grpo did, by their seconds and those that sft took for `steps` steps."""
    return max(1, round((seconds["irl"] + seconds["grpo"]) / max(seconds["sft"], 0.1) * steps))


def cycle(items: list, rng: random.Random):
    """Endless: every item once in random order, then all again."""
    if not items:
        raise UserError(
            "no demonstrations of a kind that training needs (harmful and harmless ones)"
        )
    while True:
        yield from rng.sample(items, len(items))


def optimizer_for(policy: Transformer, lr: float):
    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        [p for p in parameters if is_sharded(p) == sharded] for sharded in (False, True)
    ]  # fused AdamW takes no mixture
    return torch.optim.AdamW(
        [{"params": g} for g in groups if g], lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


def train(
    policy: Transformer,
    chat: Chat,
    rows: list[dict],
    c: SFTConfig,
    amp,
    seed: int = 0,
    loop: Loop | None = None,
) -> None:
    """Maximises the mean over demonstrations of their mean token log-prob."""
    frozen, rng, loop = train_top(policy, c.blocks), random.Random(seed), loop or Loop("sft")
    refusals, helpful = (
        cycle([r for r in rows if (r["category"] == HELPFUL) == wanted], rng)
        for wanted in (False, True)
    )  # lazy: unused ones may be empty
    harmful = c.batch - round(c.batch * c.helpful_share)
    optimizer = optimizer_for(policy, c.lr)
    for step in (bar := tqdm(range(c.steps), desc=loop.stage, unit="step")):
        part = [next(refusals) for _ in range(harmful)] + [
            next(helpful) for _ in range(c.batch - harmful)
        ]
        if loop.skip(step, policy, optimizer):
            continue
        batch = Batch(
            [chat.prompt(r["prompt"]) for r in part],
            [[chat.answer(r["response"])] for r in part],
            policy.device,
        )
        set_lr(optimizer, c.lr, step / c.steps)
        with amp():
            logps = token_logps(policy, batch, frozen=frozen)  # (B, T)
        loss = -(logps.sum(1) / batch.mask.sum(1)).mean()
        loop.update(step, loss, policy.parameters(), seconds=round(loop.seconds, 2))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
