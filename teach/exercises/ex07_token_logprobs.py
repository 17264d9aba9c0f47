"""Exercise 7: the log-probability of each token that was written.

Difficulty 1 of 3, 15 minutes. Read first: teach/WALKTHROUGH.md, section Log-probs.

Every stage asks the same of the network: given the hidden state before a token, how likely was that
token? Supervised fine-tuning raises it for demonstrations. GRPO-S compares it with that of two
older policies. The project's version goes through the rows in chunks and never holds all logits
(800 MB for 4096 tokens and a vocabulary of 49152). Yours may hold them, and leave the gradients to
autograd.

Hint: log softmax(z)_v = z_v - log sum_u exp(z_u). Overflow is the trap: exp(89) is too large for
float32. Subtract each row's maximum first, or use a function of torch that does. Which axis is the
vocabulary's?
"""

import torch  # noqa: F401 (for you to use)
from torch import Tensor


def token_logprobs(h: Tensor, W: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """logp[n] = log softmax(W h_n / temperature)[targets[n]], in nats.

    h (N, D): hidden states. W here: the head (V, D). targets (N,) int64 in [0, V) -> (N,) in the
    dtype of h, finite for all finite logits. Differentiable in h and W; with
    p = softmax(W h / temperature): dlogp/dh = (W[target] - sum_v p_v W_v) / temperature.
    """
    raise NotImplementedError
