"""What a line of the grid's results says of one trained model."""

from pathlib import Path

import torch

import evaluate
import reward
from config import changed
from data import HELPFUL
from grpo_s import kl_k3
from sample import Batch, autocast, token_logps
from support.hf import load_rewards
from support.judge import judge


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
    """What the rewards know of four warm start's samples of each held-out prompt, by category:

    [pairs, AUC, prompts, share of samples that are right, share of best samples that are]. A pair
    is a wanted (harmful prompt: refusing) and an unwanted sample of one prompt.
    """
    rows, (chat,) = run.prompts([run.folder / "sft"])
    kinds = [r["category"] if evaluate.kind_of(r) == "harmful" else HELPFUL for r in rows]
    rows = [{**r, "category": kind, "response": ""} for r, kind in zip(rows, kinds)]
    most = {"irl.prompts": len(rows), "irl.helpful_prompts": len(rows)}
    c = changed(run.c, {**most, "irl.samples": 4, "irl.contrast": 0})
    reference, found = run.load(run.folder / "sft", run.dtype), {}
    models = load_rewards(reward.RewardModels(reference, c.irl), run.folder / "rewards")
    groups = reward.sample_groups(reference, chat, rows, c)
    batches = reward.pack_groups(models, reference, groups, 8, run.dtype)
    reward.score_groups(models, batches, run.dtype)
    for g in groups:
        refused = [judge(chat.decode(ids)) == "refuses" for ids in g["samples"]]
        right, best = [r != (g["category"] == HELPFUL) for r in refused], max(g["rewards"])
        good, bad = ([R for R, r in zip(g["rewards"], right) if r == x] for x in (True, False))
        pairs, above, n, share, chosen = found.get(g["category"], (0, 0.0, 0, 0.0, 0))
        if both := len(good) * len(bad):
            pairs, above = pairs + both, above + both * evaluate.auc(good, bad)
        share, chosen = share + len(good) / len(right), chosen + right[g["rewards"].index(best)]
        found[g["category"]] = pairs, above, n + 1, share, chosen
    rounded = lambda x, n: round(x / n, 4) if n else None
    return {
        name: [pairs, rounded(above, pairs), n, rounded(share, n), rounded(chosen, n)]
        for name, (pairs, above, n, share, chosen) in found.items()
    }
