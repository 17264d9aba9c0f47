"""GRPO-S's advantage: each group's rewards normalised, then scaled by its difficulty alpha."""

import torch
from torch import Tensor

import kernels


def group_advantage(rewards: Tensor, alpha: Tensor | float = 1.0, eps: float = 1e-4) -> Tensor:
    """A_i = alpha * (R_i - mean R) / (std R + eps) within each group (DR-IRL v3; alpha = 1 is GRPO's).

    rewards (P, G) floating point, alpha a number, (P, 1) per prompt or (P, G) per sample; returns (P, G). std is the population's (divisor G).
    A group of equal rewards gets exactly 0, whatever eps. alpha multiplies the normalised advantage; scaling R instead would cancel.
    Raises ValueError for other shapes or dtypes, for an alpha that is not finite, and for a negative eps.
    """
    if rewards.ndim != 2 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be (P, G) and floating point, got shape {tuple(rewards.shape)}, {rewards.dtype}"
        )
    alpha = torch.as_tensor(
        alpha, dtype=rewards.dtype, device=None if isinstance(alpha, Tensor) else rewards.device
    )
    if alpha.device != rewards.device:
        raise ValueError(f"alpha is on {alpha.device}, rewards are on {rewards.device}")
    if tuple(alpha.shape) not in ((), (len(rewards), 1), tuple(rewards.shape)):
        raise ValueError(
            f"alpha must be a number, (P, 1) or (P, G), got shape {tuple(alpha.shape)} for rewards {tuple(rewards.shape)}"
        )
    if not alpha.isfinite().all():
        raise ValueError("alpha must be finite")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if rewards.numel() == 0:
        return torch.zeros_like(rewards)
    return kernels.backend(rewards).advantage(rewards, alpha.expand(rewards.shape), eps)
