"""Exercise 12: one difficulty out of two factors, and where it may be applied.

Difficulty 1 of 3, 15 minutes. Read first: teach/WALKTHROUGH.md, section Advantages.

DR-IRL scales each prompt's advantages by alpha = alphaD alphaM: how far the answers are from the
demonstration, and how much better the reward model finds the demonstration. The other modes are for
comparison; each leaves an average prompt (both factors 1) at 1.

Before you write, take a pencil: why not scale the rewards? Put alpha R for R into
A = (R - mean R) / (std R + eps), with alpha > 0 and eps = 0. What is left of alpha? Then do
the same with alpha A.

Hint: alpha says how much to learn; it is not something to be learnt. No gradient may flow through
it. The two factors may differ in shape.
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def difficulty_scale(alpha_data: Tensor, alpha_model: Tensor, scaling: str = "product") -> Tensor:
    """alpha by the mode `scaling`, in the factors' common (broadcast) shape and dtype, detached.

    none: 1    data: alphaD    model: alphaM    product: alphaD alphaM (DR-IRL v3)
    sum: (alphaD + alphaM) / 2    spread: the product to the 8th power (ours), which varies more
    A factor that a mode does not use may hold anything. ValueError for any other mode; the message
    names it.
    """
    raise NotImplementedError
