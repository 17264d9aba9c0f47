"""Token log-probs, which every stage needs, and GRPO-S's scaled group advantages."""
from kernels.advantage import group_advantage
from kernels.logprob import token_logprobs

__all__ = ["group_advantage", "token_logprobs"]
