"""Exercise 1, against points whose spread is plain to see, and against the definition."""

import pytest
import torch

from config import UserError
from data import CATEGORIES, HELPFUL, k_center
from exercises.grading import refuses, same

MIRRORS, SECTION = ("data.balance",), "Demonstrations"


def pool(seed, most=9):
    """Shuffled rows with unit vectors: 4 to `most` of every category and of harmless ones."""
    g = torch.Generator().manual_seed(seed)
    names = [
        c
        for c in (*CATEGORIES, HELPFUL)
        for _ in range(int(torch.randint(4, most + 1, (1,), generator=g)))
    ]
    rows = [
        {"category": names[i], "at": at}
        for at, i in enumerate(torch.randperm(len(names), generator=g))
    ]
    return rows, torch.nn.functional.normalize(torch.randn(len(rows), 5, generator=g), dim=1)


@pytest.mark.parametrize("per_category, seed", [(1, 0), (2, 1), (4, 2), (4, 3)])
def test_definition(my, per_category, seed):
    rows, x = pool(seed)
    want = []
    for category in CATEGORIES:
        at = [i for i in range(len(rows)) if rows[i]["category"] == category]
        chosen = {at[j] for j in k_center(x[at], per_category, seed)}
        want += sorted(chosen)
    got = my.balance(rows, per_category, x, seed)
    what = f"{per_category} rows of each of the seven"
    same([r["at"] for r in got], want, f"where {what} stood")
    same(got, [rows[at] for at in want], what)


@pytest.mark.parametrize("odd", (0, 3, 5))
def test_the_odd_one_stays(my, odd):
    """Five prompts of each category coincide, one points elsewhere."""
    rows = [{"category": c, "odd": i == odd} for i in range(6) for c in CATEGORIES]
    x = torch.tensor([[0.0, 1.0] if r["odd"] else [1.0, 0.0] for r in rows])
    same(
        [sum(r["odd"] for r in my.balance(rows, 2, x, seed)) for seed in range(4)],
        [7] * 4,
        "odd rows among two of each category, for four seeds",
    )


def test_too_few(my):
    rows, x = pool(5, most=4)
    rows = [r for r in rows if r["category"] != "privacy"]
    refuses(my.balance, rows, 6, x[: len(rows)], says="crime (2 missing)", error=UserError)
    refuses(my.balance, rows, 4, x[: len(rows)], says="privacy (4 missing)", error=UserError)
    refuses(my.balance, rows, 5, x[: len(rows)], says="insult (1 missing)", error=UserError)
    refuses(my.balance, rows, 6, x[: len(rows)], says="ethics (2 missing)", error=UserError)
