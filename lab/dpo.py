"""A rival without reward models: direct preference optimization (Rafailov et al., 2305.18290).

loss = -log sigma(beta ((log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l))); y_w is a
demonstration, y_l a sample or a contrast: what the reward models were fitted on.
"""

import random

import torch
import torch.nn.functional as F

from reward import opposites
from sample import Batch, autocast, token_logps
from sft import cycle, optimizer_for, set_lr, train_top
from support.hf import save_model

UPDATES, BLOCKS, LR, PAIRS, BETA = 24, 10, 5e-5, 8, 0.1  # PAIRS: of a step


def pairs(chat, drawn: list[dict], rows: list[dict], contrast: int, seed: int) -> list[dict]:
    """{"prompt", "better", "worse"}: irl's demonstrations against all else there, token lists."""
    out, rng = [], random.Random(seed)
    for g in drawn:
        others = [o["response"] for o in opposites(g, rows, contrast, rng)]
        for text in [*(text for _, text in g["samples"]), *others]:
            out.append(
                {
                    "prompt": g["prompt"],
                    "better": chat.answer(g["response"]),
                    "worse": chat.answer(text),
                }
            )
    return out


def dpo_loss(logp: torch.Tensor, logp_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean over pairs; logp, logp_ref (B, 2): of whole responses, the better one first."""
    better, worse = (logp - logp_ref).unbind(1)
    return -F.logsigmoid(beta * (better - worse)).mean()


def train(policy, reference, chat, pairs, dtype, seed, loop, updates=UPDATES, blocks=BLOCKS):
    """Trains the policy in place; reference: its own start."""
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


def stage(run) -> None:
    """DPO from the warm start of a run, after irl, to RUN/dpo."""
    folder, chat = run.folder / "sft", run.chat(run.folder / "sft")
    policy, reference = run.load(folder), run.load(folder, run.dtype)
    drawn = run.read("rewards/samples.json", [])
    found = pairs(chat, drawn, run.rows(chat), run.c.irl.contrast, run.c.run.seed)
    with run.work("dpo", found) as loop:
        train(policy, reference, chat, found, run.dtype, run.c.run.seed, loop)
    save_model(policy, run.folder / "dpo")
