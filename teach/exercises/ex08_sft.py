"""Exercise 8: supervised fine-tuning.

Difficulty 2 of 3, 35 minutes. Read first: teach/WALKTHROUGH.md, section The warm
start.

Most of the work of this project is done by the simplest loss there is: make the demonstrations
likely. Each response counts the same, however long. A mean over all tokens of the batch would let
long responses count more, and demonstrations differ in length.

What you have: a Batch (sample.py) is prompts with their completions. token_logps(policy, batch)
runs the policy and gives the completions' log-probs (B, T), 0 where batch.mask is False. Autograd
follows them back into the weights.

Hint: a step is five calls: log-probs, loss, backward, clip, optimizer. The sixth one is easy to
forget: backward adds to the gradients that are there. Scaling the whole gradient by one factor
keeps its direction; clipping each number alone would not.
"""

import torch
from torch import Tensor

from model import Transformer
from sample import Batch, token_logps  # noqa: F401 (for you to use)


def sft_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """-mean over responses of their mean token log-prob, a scalar in the dtype of logps.

    logps (B, T), mask (B, T) bool: True on a response's tokens, anywhere in its row, at least one.
    Where mask is False, logps is 0.
    """
    raise NotImplementedError


def sft_step(policy: Transformer, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """One step of the optimizer down the gradient of sft_loss. Returns the loss before it.

    If the gradient of all weights, seen as one vector, is longer than 1, it is cut to length 1
    (torch.nn.utils.clip_grad_norm_). A second call must not add to the first one's gradients.
    """
    raise NotImplementedError
