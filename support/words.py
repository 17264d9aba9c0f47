"""A text encoder without weights, for tests and the recipe tiny."""

import functools
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from data import normalise


class WordEncoder:
    """An encoder without weights: a word has a random unit vector, a text is their sum."""

    def __init__(self, width: int = 256):
        self.width = width

    @functools.lru_cache(maxsize=100_000)
    def word(self, w: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(w.encode()).digest()[:7], "little")
        vector = torch.randn(self.width, generator=torch.Generator().manual_seed(seed))
        return F.normalize(vector, dim=0)

    def embed(self, texts: list[str]) -> Tensor:
        sums = torch.zeros(len(texts), self.width)
        for i, text in enumerate(texts):
            for w in normalise(text).split():
                sums[i] = sums[i] + self.word(w)
        return F.normalize(sums, dim=1)
