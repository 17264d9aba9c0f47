"""What the Triton kernels compute, in torch: the path taken on CPU, and what the kernels are tested against.

With p = softmax(z / t) over a row of logits z, logp = log p_target and a loss L(logp):

    d logp / d z_v = (1[v = target] - p_v) / t            d L / d z_v = L'(logp) (1[v = target] - p_v) / t

Only the slope L'(logp) depends on the loss: g for sum(g * logp); for GRPO-S, -weight (s - beta_kl (1 - exp(d))) with d = logp_ref - logp
and s = rho A, or 0 where the clip holds it. autograd finds the latter here, the Triton kernel writes it out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Objective:
    """What GRPO-S's objective needs beside the log-probs: per token (N,) unless said."""

    advantage: Tensor  # A of the token's sample
    weight: Tensor  # 1 / (sequences * tokens of its sequence); 0 leaves the token out
    logp_ref: Tensor  # log pi_ref
    logp_old: Tensor | None = (
        None  # log pi_old; None: the policy itself, as at the first step after a rollout
    )
    clip: float = 0.2  # c of the clipped ratio, a number
    beta_kl: float = 0.0  # weight of the KL penalty, a number

    def rows(self, s: slice) -> "Objective":
        return Objective(
            self.advantage[s],
            self.weight[s],
            self.logp_ref[s],
            None if self.logp_old is None else self.logp_old[s],
            self.clip,
            self.beta_kl,
        )


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """k3 = exp(d) - d - 1 with d = logp_ref - logp: an unbiased, never negative estimate of KL(pi, pi_ref) per sampled token. d is clamped to +-20."""
    d = (logp_ref - logp).clamp(-20, 20)
    return torch.exp(d) - d - 1


def clipped_objective(logp: Tensor, o: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: J = min(rho A, clip(rho, 1 - c, 1 + c) A) - beta_kl k3 with rho = pi / pi_old, its k3, and whether the clip holds it. All (N,)."""
    ratio = torch.exp((logp - (logp.detach() if o.logp_old is None else o.logp_old)).clamp(-20, 20))
    surrogate = torch.minimum(
        ratio * o.advantage, ratio.clamp(1 - o.clip, 1 + o.clip) * o.advantage
    )
    kl = kl_k3(logp, o.logp_ref)
    return surrogate - o.beta_kl * kl, kl, (ratio - 1) * o.advantage.sign() > o.clip


def rows(
    z: Tensor,
    targets: Tensor,
    temperature: float,
    g: Tensor | None = None,
    objective: Objective | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One row of logits per token: z (n, V) -> log softmax(z / temperature)[target] (n,), the loss per token, the gradient in z's dtype (n, V).

    g (n,): the gradient of sum(g * logp). objective: the loss is -weight * J, and the gradient that of its sum. Neither: log-probs only.
    z is overwritten.
    """
    x = z.to(torch.promote_types(z.dtype, torch.float32))  # z itself, or a copy of bfloat16
    if temperature != 1:
        x.div_(temperature)
    log_softmax = torch.log_softmax(x, -1, out=x)  # in place: (n, V) is large
    logp, loss = log_softmax.gather(1, targets[:, None])[:, 0], None
    if objective is not None:
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            loss = -torch.where(
                objective.weight == 0, 0.0, objective.weight * clipped_objective(leaf, objective)[0]
            )
            (g,) = torch.autograd.grad(loss.sum(), leaf)
        loss = loss.detach()
    if g is None:
        return logp, None, None
    slope = (g / temperature).to(x.dtype)[:, None]
    dz = (
        log_softmax.exp_().mul_(-slope).scatter_add_(1, targets[:, None], slope)
    )  # slope (onehot - softmax), in place again
    if (slope == 0).any():
        dz[slope[:, 0] == 0] = 0  # a token left out may hold anything
    return logp, loss, dz if dz.dtype == z.dtype else z.copy_(dz)


def advantage(rewards: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """alpha * (R - mean R) / (std R + eps) of each row of rewards (P, G), std with divisor G; a row of equal rewards gets exactly 0. alpha (P, G)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(
        dim=1, keepdim=True
    )  # mean(R, ..., R) need not round to R
    return alpha * (centred / (centred.pow(2).mean(dim=1, keepdim=True).sqrt() + eps)).masked_fill(
        equal, 0.0
    )
