"""What a line of the grid's results says of one trained model."""

from pathlib import Path

import torch
import torch.nn.functional as F

import evaluate
import reward
from config import changed
from data import HELPFUL
from grpo_s import kl_k3
from sample import Batch, autocast, token_logps
from support.hf import load_rewards


@torch.no_grad()
def measure(run, folder: Path, first: Path) -> dict:
    """Answers of the model in `folder`, and the numbers of its line.

    kl: to the model in `first`, by k3 on its own answers.
    """
    rows, (chat,) = run.prompts([folder])
    model, start = run.load(folder, run.dtype), run.load(first, run.dtype)
    found = evaluate.evaluate(model, chat, rows, run.c.run.max_new_tokens)
    answers, rates = found["answers"], found["rates"]
    responses = [[chat.answer(a["response"])] for a in answers]
    batch = Batch([chat.prompt(a["prompt"]) for a in answers], responses, model.device)
    with autocast(model.device, run.dtype):
        logp, logp_ref = (token_logps(m, batch) for m in (model, start))
    kl = round(kl_k3(logp, logp_ref)[batch.mask].mean().item(), 4)
    return {"answers": answers, "verdicts": evaluate.verdicts(answers), "rates": rates, "kl": kl}


def reward_facts(run) -> dict:
    """What the rewards know of four warm start's samples of each held-out prompt, by category.

    auc (None where no prompt has right and wrong samples), right, best_right: see
    evaluate.rollout_record.
    """
    rows, (chat,) = run.prompts([run.folder / "sft"])
    kinds = [r["category"] if r["kind"] == "harmful" else HELPFUL for r in rows]
    rows = [{**r, "category": kind, "response": ""} for r, kind in zip(rows, kinds)]
    most = {"irl.prompts": len(rows), "irl.helpful_prompts": len(rows)}
    c = changed(run.c, {**most, "irl.samples": 4, "irl.contrast": 0})
    reference, found = run.load(run.folder / "sft", run.dtype), {}
    models = load_rewards(reward.RewardModels(reference, c.irl), run.folder / "rewards")
    groups = reward.sample_groups(reference, chat, rows, c)
    batches = reward.pack_groups(models, reference, groups, 8, run.dtype)
    reward.score_groups(models, batches, run.dtype)
    for name in sorted({g["category"] for g in groups}):
        mine = [g for g in groups if g["category"] == name]
        scores = torch.tensor([[*g["rewards"], g["reward_demo"]] for g in mine])
        facts = F.pad(evaluate.sample_facts(chat, [g["samples"] for g in mine]), (1, 0))  # no W
        told = evaluate.rollout_record([name] * len(mine), scores, facts)
        kind = "helpful_" if name == HELPFUL else "harmful_"
        found[name] = {k: told.get(kind + k) for k in ("auc", "right", "best_right")}
    return found
