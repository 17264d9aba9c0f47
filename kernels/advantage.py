"""GRPO-S's advantage: each group's rewards normalised, then scaled by its difficulty alpha."""
from torch import Tensor


def group_advantage(rewards: Tensor, alpha: Tensor | float = 1.0, eps: float = 1e-4) -> Tensor:
    """A_i = alpha * (R_i - mean R) / (std R + eps) within each group (DR-IRL v3; alpha = 1 is GRPO's).

    rewards (P, G), alpha a number, (P, 1) per prompt or (P, G) per sample; returns (P, G). std is the population's
    (divisor G). A group of equal rewards gets exactly 0, whatever eps, though mean(R, ..., R) need not
    round to R. alpha multiplies the normalised advantage; scaling R instead would cancel.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (P, G), got shape {tuple(rewards.shape)}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    normalised = centred / (centred.pow(2).mean(dim=1, keepdim=True).sqrt() + eps)
    return alpha * normalised.masked_fill(equal, 0.0)
