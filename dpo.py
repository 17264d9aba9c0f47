"""A rival without reward models: direct preference optimization (Rafailov et al., arXiv 2305.18290), on what the reward models were fitted on.

loss = -log sigma(beta ((log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)))),   y_w the demonstration, y_l a sample or a contrast
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from batch import Batch
from chat import Chat
from loop import Loop
from model import token_logps
from reward import opposites
from sft import cycle, optimizer_for, set_lr, train_top
from transformer import Transformer


@dataclass(frozen=True)
class DPOConfig:
    """DPO, a rival in the ablation."""

    updates: int = 24  # optimizer steps of DPO
    blocks: int = 10  # top blocks trained; 0: the whole model
    lr: float = 5e-5  # peak learning rate
    batch: int = 8  # pairs a step
    tie: float = 0.1  # beta of DPO: how strongly the policy is tied to the warm start


def pairs(drawn: list[dict], rows: list[dict], contrast: int, seed: int) -> list[dict]:
    """Of irl's prompts (rewards/samples.json): the demonstration is better than each sample of the warm start, and than `contrast` demonstrations of the other kind."""
    rng = random.Random(seed)
    return [
        {"prompt": g["prompt"], "better": g["response"], "worse": text}
        for g in drawn
        for text in [
            *(text for _, text in g["samples"]),
            *(o["response"] for o in opposites(g, rows, contrast, rng)),
        ]
    ]


def dpo_loss(logp: Tensor, logp_ref: Tensor, beta: float) -> Tensor:
    """The loss above, mean over pairs. logp, logp_ref (B, 2): of whole responses, the preferred one first."""
    better, worse = (logp - logp_ref).unbind(1)
    return -F.logsigmoid(beta * (better - worse)).mean()


def train(
    policy: Transformer,
    reference: Transformer,
    chat: Chat,
    pairs: list[dict],
    c: DPOConfig,
    amp,
    seed: int = 0,
    loop: Loop | None = None,
) -> None:
    """Trains the policy in place. pairs: {"prompt", "better", "worse"}, texts; reference: the policy's own start."""
    frozen, draw, loop = (
        train_top(policy, c.blocks),
        cycle(pairs, random.Random(seed)),
        loop or Loop("dpo"),
    )
    optimizer = optimizer_for(policy, c.lr)
    for step in (bar := tqdm(range(c.updates), desc="dpo", unit="step")):
        part = [next(draw) for _ in range(c.batch)]
        if loop.skip(step, policy, optimizer):
            continue
        batch = Batch(
            [chat.prompt(r["prompt"]) for r in part],
            [[chat.answer(r["better"]), chat.answer(r["worse"])] for r in part],
            policy.device,
        )
        set_lr(optimizer, c.lr, (step + 0.5) / c.updates)
        with amp():
            logp = token_logps(policy, batch, frozen=frozen).sum(1).view(-1, 2)
            with torch.no_grad():
                logp_ref = token_logps(reference, batch).sum(1).view(-1, 2)
        loss = dpo_loss(logp, logp_ref, c.tie)
        loop.update(
            step,
            loss,
            policy.parameters(),
            margin=(logp - logp_ref).diff(dim=1).mean().neg().item(),
        )
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
