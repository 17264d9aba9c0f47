"""Stage 1: demonstrations in Chain-of-Draft form, balanced over seven harm categories. Nothing of ours is imported here.

A demonstration is a prompt with a response that first drafts, a few terse steps, and after `####` answers:

    asks to humiliate a colleague
    bullying, real hurt
    refuse, suggest honest talk
    #### I won't mock him, since that would hurt him; a calm word in private works better.
"""

import math
import re
from collections import Counter

import torch
from torch import Tensor

# The seven categories of Safety-Prompts (Sun et al. 2023), which the paper balances over, and an eighth, helpful,
# of harmless prompts: without it nothing would speak against refusing everything (ours; the paper is silent).
CATEGORIES = {
    "insult": "insult",
    "unfairness": "unfairness and discrimination",
    "crime": "crimes and illegal activities",
    "physical_harm": "physical harm",
    "mental_health": "mental health",
    "privacy": "privacy and property",
    "ethics": "ethics and morality",
}
HELPFUL = "helpful"
SEPARATOR = "####"
BALANCES = ("even", "pool", "tail")


class UserError(ValueError):
    """Something the user gave is wrong; the message says what and where. The command line prints it as one line."""


# ------------------------------------------------------------------------------------------------ Chain of Draft


def format_draft(draft: list[str], answer: str) -> str:
    """Steps, one a line, then `#### answer`. Raises ValueError for text that parse_draft could not take apart again."""
    if isinstance(draft, str):
        raise ValueError("draft must be a list of steps, not one string")
    text = "\n".join(draft) + f"\n{SEPARATOR} {answer}"
    if parse_draft(text) != (list(draft), answer):
        raise ValueError(f"not a draft and an answer: {draft!r}, {answer!r}")
    return text


def parse_draft(text: str) -> tuple[list[str], str]:
    """The inverse of format_draft: (draft steps, answer). Raises ValueError for malformed text; nothing is guessed."""
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


def answer_of(text: str) -> str:
    """What the reader is told: the text after the last separator, or all of it if the model wrote none."""
    return text.rpartition(SEPARATOR)[2].strip()


# ------------------------------------------------------------------------------------------------ tokens


def pad(rows: list[list[int]], device="cpu") -> tuple[Tensor, Tensor]:
    """Token lists -> ids (B, longest) padded on the right with 0, and lengths (B,)."""
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.long, device=device)
    ids = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.long)
    for i, r in enumerate(rows):
        ids[i, : len(r)] = torch.tensor(r, dtype=torch.long)
    return ids.to(device), lengths


def completion_mask(prompt_lengths: Tensor, lengths: Tensor, width: int) -> Tensor:
    """True where a token belongs to the completion: prompt_length <= position < length. (B,), (B,) -> (B, width) bool.

    lengths count prompt and completion together. Made from positions, never from token ids: a pad id may equal the
    end-of-text id, and the sampled end-of-text must stay in. batch.Batch keeps prompts apart, so its prompt_lengths are 0.
    """
    at = torch.arange(width, device=lengths.device)
    return (at >= prompt_lengths[:, None]) & (at < lengths[:, None])


# ------------------------------------------------------------------------------------------------ balancing


def k_center(embeddings: Tensor, k: int, seed: int = 0, given: Tensor | None = None) -> list[int]:
    """k different indices that cover the points: greedy k-center, each next point the one furthest (in cosine) from those chosen.

    embeddings (N, D) unit vectors, k <= N. Gonzalez 1985: within twice the optimal radius, measured as chord or as angle (1 - cosine disobeys the triangle
    inequality). The seed picks the first point, unless points `given` (M, D) count as chosen already. O(N k) time, O(N) memory beside the embeddings.
    """
    if not 0 <= k <= len(embeddings):
        raise ValueError(f"k {k}: want 0 to {len(embeddings)}, the number of points")
    if given is not None and len(given):
        chosen, nearest = (
            [],
            (embeddings @ given.T).amax(1),
        )  # similarity to the closest chosen point
    else:
        chosen = torch.randint(
            max(1, len(embeddings)), (1,), generator=torch.Generator().manual_seed(seed)
        ).tolist()[:k]
        nearest = embeddings @ embeddings[chosen].sum(0)  # of one point; of none if k is 0
    while len(chosen) < k:
        if chosen:
            nearest[chosen[-1]] = math.inf  # never chosen twice
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, embeddings @ embeddings[chosen[-1]])
    return chosen


def balance(rows: list[dict], per_category: int, embeddings: Tensor, seed: int = 0) -> list[dict]:
    """Exactly per_category rows of each of the seven categories, in category order; the others are left out.

    Over-full categories shrink to their most diverse rows (k_center on embeddings (N, D) of the prompts). A category
    with too few is an error that says how many are missing, never a duplicate.
    """
    short = {c: per_category - n for c, n in counts(rows).items() if n < per_category}
    if short:
        raise UserError(
            "too few demonstrations for "
            + ", ".join(f"{c} ({n} missing)" for c, n in short.items())
            + f": --per-category asks for {per_category} of each; --generate true has the model write some for prompts without a draft"
        )
    out = []
    for category in CATEGORIES:
        index = [i for i, r in enumerate(rows) if r["category"] == category]
        out += [rows[index[i]] for i in sorted(k_center(embeddings[index], per_category, seed))]
    return out


def imbalance(
    rows: list[dict], per_category: int, how: str, embeddings: Tensor, seed: int = 0
) -> list[dict]:
    """What balance is held against. pool: as many rows in all, in the categories' own proportions, largest remainders first; tail: per_category, but a tenth of it
    of the three rarest categories. Two of each at the least, if there are; within a category the most diverse."""
    have = counts(rows)
    if how == "pool":
        share = {c: per_category * len(have) * n / max(1, len(rows)) for c, n in have.items()}
        wanted = {c: max(2, int(s)) for c, s in share.items()}
        for c in sorted(share, key=lambda c: int(share[c]) - share[c])[
            : max(0, per_category * len(have) - sum(wanted.values()))
        ]:
            wanted[c] += 1
    else:
        rare = sorted(have, key=have.get)[:3]
        wanted = {c: max(2, per_category // 10) if c in rare else per_category for c in have}
    index = {c: [i for i, r in enumerate(rows) if r["category"] == c] for c in CATEGORIES}
    return [
        rows[mine[i]]
        for c, mine in index.items()
        for i in sorted(k_center(embeddings[mine], min(wanted[c], len(mine)), seed))
    ]


def centroids(embeddings: Tensor, categories: list[str]) -> Tensor:
    """(7, D) unit vectors: the mean direction of each category's prompts, embeddings (N, D)."""
    means = [
        embeddings[[i for i, c in enumerate(categories) if c == name]].mean(0)
        for name in CATEGORIES
    ]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def route(embeddings: Tensor, centres: Tensor) -> list[str]:
    """The category of the nearest centroid (in cosine) for each unlabelled prompt, embeddings (N, D)."""
    return [list(CATEGORIES)[i] for i in (embeddings @ centres.T).argmax(1).tolist()]


def confusion(truth: list[str], found: list[str]) -> str:
    """Markdown: how often a prompt of each category (rows) was sent to each (columns), and the share sent to the right one."""
    n = Counter(zip(truth, found))
    lines = [
        "| category | " + " | ".join(CATEGORIES) + " | right |",
        "|---" * (len(CATEGORIES) + 2) + "|",
    ]
    for a in CATEGORIES:
        lines.append(
            f"| {a} | "
            + " | ".join(str(n[a, b]) for b in CATEGORIES)
            + f" | {n[a, a] / max(1, truth.count(a)):.2f} |"
        )
    right = sum(n[a, a] for a in CATEGORIES) / max(1, len(truth))
    return "\n".join(lines + ["| all |" + " |" * len(CATEGORIES) + f" {right:.2f} |"])


def counts(rows: list[dict]) -> dict[str, int]:
    found = Counter(r["category"] for r in rows)
    return {c: found[c] for c in CATEGORIES}


def balance_report(rows: list[dict]) -> dict:
    """Counts, imbalance ratio (largest : smallest category) and normalised entropy (1 = perfectly even)."""
    n = list(counts(rows).values())
    p = [c / max(1, sum(n)) for c in n]
    return {
        "counts": counts(rows),
        "imbalance": max(n) / min(n) if min(n) else math.inf,
        "entropy": -sum(q * math.log(q) for q in p if q) / math.log(len(n)),
    }


def balance_table(report: dict) -> str:
    """Markdown: counts per category, imbalance and entropy before and after."""
    lines = [
        "| demonstrations | " + " | ".join(CATEGORIES) + " | all | largest : smallest | entropy |",
        "|---" * (len(CATEGORIES) + 4) + "|",
    ]
    for when in ("before", "after"):
        r = report[when]
        lines.append(
            f"| {when} | "
            + " | ".join(map(str, r["counts"].values()))
            + f" | {sum(r['counts'].values())} | {r['imbalance']:.2f} | {r['entropy']:.3f} |"
        )
    return "\n".join(lines)


def normalise(text: str) -> str:
    """Lower case, letters and digits only: for finding duplicates."""
    return " ".join(re.findall(r"\w+", text.lower()))


def distinct(rows: list[dict]) -> list[dict]:
    """One row for each normalised prompt: those with a draft go first, then those with a category."""
    first = {}
    for r in sorted(rows, key=lambda r: ("draft" not in r, r["category"] is None)):
        first.setdefault(normalise(r["prompt"]) or r["prompt"], r)
    return list(first.values())
