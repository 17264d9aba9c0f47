"""Exercise 3: positions as rotations.

Difficulty 2 of 3, 30 minutes. Read first: teach/WALKTHROUGH.md, section The transformer.

Attention by itself does not know the order of tokens. RoPE (Su et al., arXiv 2104.09864) turns each
pair of numbers in a query or key by an angle that grows with the position. The dot product of two
turned vectors depends on the difference of their positions alone. Fast pairs tell neighbours apart,
slow ones see far. Llama 3.1 slows the slowest ones further, to reach beyond the context it was
trained on. Every block of model.py calls rotate.

Hint: a pair is (x_i, x_(i + E/2)), not neighbours; this is the layout of the Hugging Face weights.
Turning (a, b) by an angle is multiplying a + jb by exp(j angle), j^2 = -1. Write the scaling as a
share `keep` of the old speed, clamped to [0, 1].
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor

from model import ModelConfig


def rope_frequencies(c: ModelConfig) -> Tensor:
    """f_i = c.rope_theta^(-2 i / E) radians per position, i = 0 .. E/2 - 1, E = c.head_dim.

    (E/2,) float32. c.rope_scaling is None, or a dict of low_freq_factor (low), high_freq_factor
    (high), factor and original_max_position_embeddings (length). Then, with turns = length f_i /
    (2 pi): f_i stays if turns >= high, becomes f_i / factor if turns <= low, and between them is
    keep f_i + (1 - keep) f_i / factor with keep = (turns - low) / (high - low).
    """
    raise NotImplementedError


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """(x_i, x_(i+E/2)) turned by the angle of its position and pair.

    x (N, heads, E) -> the same shape and dtype. rope: cos and sin of the angles, (N, 1, E) each;
    their halves are equal, as i and i + E/2 share an angle. They may have a wider dtype than x:
    compute in theirs, return x's.
    """
    raise NotImplementedError
