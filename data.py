"""Step 1: demonstrations in Chain-of-Draft form, balanced over seven harm categories.

A demonstration is a prompt with a response. The response first drafts, in a few terse steps, and
answers after `####`:

    asks to humiliate a colleague
    bullying, real hurt
    refuse, suggest honest talk
    #### I won't mock him, since that would hurt him; a calm word in private works better.
"""

import math
import random
import re

import torch
from torch import Tensor

from config import UserError

# The seven categories of Safety-Prompts (Sun et al. 2023), over which the paper balances.
CATEGORIES = {
    "insult": "insult",
    "unfairness": "unfairness and discrimination",
    "crime": "crimes and illegal activities",
    "physical_harm": "physical harm",
    "mental_health": "mental health",
    "privacy": "privacy and property",
    "ethics": "ethics and morality",
}
# An eighth (ours): harmless prompts. Without them nothing speaks against refusing everything.
HELPFUL = "helpful"
SEPARATOR = "####"


def format_draft(draft: list[str], answer: str) -> str:
    """Steps, one a line, then `#### answer`. ValueError for what parse_draft doesn't give back."""
    text = "\n".join(draft) + f"\n{SEPARATOR} {answer}"
    if parse_draft(text) != (draft, answer):
        raise ValueError(f"not a draft and an answer: {draft!r}, {answer!r}")
    return text


def parse_draft(text: str) -> tuple[list[str], str]:
    """The inverse of format_draft: (steps, answer). ValueError for malformed text, no guessing."""
    parts = text.split(SEPARATOR)
    if len(parts) != 2:
        raise ValueError(f"want exactly one {SEPARATOR}, found {len(parts) - 1}")
    head, answer = parts
    steps = head.removesuffix("\n").split("\n")
    if not head.endswith("\n") or not all(s.strip() for s in steps):
        raise ValueError(f"want one or more non-empty draft lines before {SEPARATOR}")
    if not answer.startswith(" ") or not answer.strip():
        raise ValueError(f"want a space and an answer after {SEPARATOR}")
    return steps, answer[1:]


def k_center(embeddings: Tensor, k: int, seed: int = 0, given: Tensor | None = None) -> list[int]:
    """Greedy k-center: k different indices, each next point the one furthest from those chosen.

    embeddings (N, D): unit vectors, k <= N; the distance is the cosine's. The seed picks the first
    point, unless points `given` (M, D) count as chosen already. The radius is at most twice the
    optimum, as chord or angle (Gonzalez 1985). O(N k) time.
    """
    if not 0 <= k <= len(embeddings):
        raise ValueError(f"k {k}: want 0 to {len(embeddings)}, the number of points")
    if given is not None and len(given):
        chosen = []
        nearest = (embeddings @ given.T).amax(1)  # (N,) cosine to the closest chosen point
    else:
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.randint(max(1, len(embeddings)), (1,), generator=draw).tolist()[:k]
        nearest = embeddings @ embeddings[chosen].sum(0)
    while len(chosen) < k:
        nearest[chosen] = math.inf  # never chosen twice
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, embeddings @ embeddings[chosen[-1]])
    return chosen


def balance(rows: list[dict], per_category: int, embeddings: Tensor, seed: int = 0) -> list[dict]:
    """Exactly per_category rows of each of the seven categories, in the categories' order.

    An over-full category keeps its most diverse rows: k_center on its prompts' embeddings (N, D).
    A category with too few is a UserError that says how many are missing, never a duplicate.
    """
    if short := {c: per_category - n for c, n in counts(rows).items() if n < per_category}:
        missing = ", ".join(f"{c} ({n} missing)" for c, n in short.items())
        asked = f"--per-category asks for {per_category} of each"
        how = "add some, or prompts without a draft and --generate true"
        raise UserError(f"too few demonstrations for {missing}: {asked}; {how}")
    out = []
    for category in CATEGORIES:
        index = [i for i, r in enumerate(rows) if r["category"] == category]
        out += [rows[index[i]] for i in sorted(k_center(embeddings[index], per_category, seed))]
    return out


def route(embeddings: Tensor, known: Tensor, categories: list[str]) -> list[str]:
    """The category of the nearest centroid, by cosine, for each prompt; embeddings (N, D).

    A centroid is the mean direction of its category's prompts: known (M, D) with `categories`.
    """
    means = [known[[c == name for c in categories]].mean(0) for name in CATEGORIES]
    centres = torch.nn.functional.normalize(torch.stack(means), dim=1)  # (7, D)
    return [list(CATEGORIES)[i] for i in (embeddings @ centres.T).argmax(1).tolist()]


def counts(rows: list[dict]) -> dict[str, int]:
    names = [r["category"] for r in rows]
    return {c: names.count(c) for c in CATEGORIES}


def normalise(text: str) -> str:
    """Lower case, letters and digits only: for finding duplicates."""
    return " ".join(re.findall(r"\w+", text.lower()))


def distinct(rows: list[dict]) -> list[dict]:
    """One row for each normalised prompt; one with a draft goes first, then one with a category."""
    first = {}
    for r in sorted(rows, key=lambda r: ("draft" not in r, r["category"] is None)):
        first.setdefault(normalise(r["prompt"]) or r["prompt"], r)
    return list(first.values())


def cycle(items: list, rng: random.Random):
    """Endless: every item once in random order, then all again. UserError if there are none."""
    if not items:
        raise UserError("no demonstrations of a kind that training needs (harmful and harmless)")
    while True:
        yield from rng.sample(items, len(items))
