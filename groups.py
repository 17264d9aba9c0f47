"""Which prompts a rollout of GRPO-S draws, and which of their groups it learns from."""

import math
import random

from data import CATEGORIES, HELPFUL
from sft import cycle


def pick(rows: list[dict], prompts: int, helpful_share: float, rng: random.Random):
    """Endless rollout batches of `prompts` rows: the harmful ones take their categories in turn, the harmless ones fill helpful_share."""
    of = {
        name: cycle(mine, rng)
        for name in (*CATEGORIES, HELPFUL)
        if (mine := [r for r in rows if r["category"] == name])
    }
    turn, helpful = (
        cycle([name for name in of if name != HELPFUL], rng),
        round(prompts * helpful_share),
    )
    while True:
        harmful = [next(of[next(turn)]) for _ in range(prompts - helpful)]
        # sorted, so that a micro-batch needs few reward models
        yield sorted(harmful, key=lambda r: r["category"]) + [
            next(of[HELPFUL]) for _ in range(helpful)
        ]


def borrow(prompts: list[dict], demonstrations: list[dict], encoder) -> list[dict]:
    """Prompts without a demonstration of their own, each with that of its category's most similar prompt: for its difficulty, not to be learnt from."""
    out = []
    for category in sorted({p["category"] for p in prompts}):
        mine, theirs = (
            [r for r in rows if r["category"] == category] for rows in (prompts, demonstrations)
        )
        nearest = (
            (
                encoder.embed([r["prompt"] for r in mine])
                @ encoder.embed([r["prompt"] for r in theirs]).T
            )
            .argmax(1)
            .tolist()
        )
        out += [
            {**r, "response": theirs[i]["response"], "borrowed": True}
            for r, i in zip(mine, nearest)
        ]
    return out


def most_spread(spread: list[float], categories: list[str], keep: float) -> list[int]:
    """Indices, ascending, of the share `keep` of the harmful and of the harmless prompts, each rounded up, of largest `spread` (standard deviation of the group's rewards)."""
    out = []
    for kind in (True, False):
        mine = [p for p, name in enumerate(categories) if (name == HELPFUL) == kind]
        out += sorted(mine, key=lambda p: -spread[p])[: math.ceil(keep * len(mine))]
    return sorted(out)
