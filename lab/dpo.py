"""A rival of GRPO-S: direct preference optimization (Rafailov et al., arXiv 2305.18290).

loss = -log sigma(beta ((log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l))), y_w the better of
a pair.
"""

import random

import torch
import torch.nn.functional as F

from sample import Batch, autocast, token_logps
from sft import cycle, optimizer_for, set_lr, train_top

LR, PAIRS, BETA = 5e-5, 8, 0.1  # PAIRS: of a step


def dpo_loss(logp: torch.Tensor, logp_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean over pairs; logp, logp_ref (B, 2): of whole responses, the better one first."""
    better, worse = (logp - logp_ref).unbind(1)
    return -F.logsigmoid(beta * (better - worse)).mean()


def train(policy, reference, chat, pairs, dtype, seed, loop, updates: int, blocks: int):
    """Trains the policy in place; reference: its own start. pairs: see rivals.pairs_of."""
    frozen, draw = train_top(policy, blocks), cycle(pairs, random.Random(seed))
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
