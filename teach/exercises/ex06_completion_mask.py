"""Exercise 6: which tokens are the model's own?

Difficulty 1 of 3, 5 minutes. Read first: teach/WALKTHROUGH.md, section Log-probs.

Log-probs, rewards and the loss count the completion's tokens, not the prompt's and not the
padding's. A mask that is off by one trains the model to write the prompt's last token, or never to
stop. It has to come from positions: often the padding id *is* the end-of-text id. A mask that looks
at ids then loses the end of text, the one token that says "stop".

Hint: compare torch.arange(width) with (B, 1) tensors. Broadcasting does the rest, without a loop.
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def completion_mask(prompt_lengths: Tensor, lengths: Tensor, width: int) -> Tensor:
    """mask[b, t] = prompt_lengths[b] <= t < lengths[b]. (B,), (B,) int64 -> (B, width) bool.

    lengths count prompt and completion together.
    """
    raise NotImplementedError
