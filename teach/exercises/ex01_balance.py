"""Exercise 1: the same number of demonstrations for every category.

Difficulty 1 of 3, 15 minutes. Read first: teach/WALKTHROUGH.md, section Demonstrations.

The pool holds eight times as many demonstrations about crime as about mental health. A reward
model knows what it has seen, so step 1 of DR-IRL balances: each of the seven harm categories gets
the same number of rows ("helpful" is none of the seven). Which rows stay matters too, as
near-duplicates teach little. An over-full category keeps those that lie furthest apart;
data.k_center finds them, and you may use it.

Hint: k_center sees the embeddings of one category and returns indices into those. Keep a list of
where that category's rows stand in `rows`.
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor

from config import UserError  # noqa: F401 (for you to use)
from data import CATEGORIES, k_center  # noqa: F401


def balance(rows: list[dict], per_category: int, embeddings: Tensor, seed: int = 0) -> list[dict]:
    """Exactly per_category rows of each category, in the order of CATEGORIES, and no others.

    rows: dicts with a "category". embeddings (len(rows), D): a unit vector each. A category keeps
    the rows that k_center(its embeddings, per_category, seed) chooses, in their order in `rows`.
    UserError if categories have too few rows; the message names each with the number missing, as
    "crime (2 missing)".
    Source: DR-IRL v3 balances; choosing by k-center (Gonzalez 1985) is this project's.
    """
    raise NotImplementedError
