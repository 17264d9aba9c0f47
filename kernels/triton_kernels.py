"""The functions of reference.py as Triton kernels. Without a GPU they run in the interpreter: TRITON_INTERPRET=1, set before the import.

row_kernel: one program per token. A first pass over the row's logits keeps a running maximum and the sum of exponentials below it (online
log-sum-exp); then everything about the token is known, and a second pass replaces each logit by the loss's derivative. Two reads and a write of
2 bytes per logit in bfloat16: 6 V bytes per token, 2 V without a gradient. No atomics, one writer per row: the same result every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import Objective


@triton.jit
def row_kernel(
    Z,
    stride,
    T,
    G,
    LOGP,
    LOSS,
    OLD,
    REF,
    A,
    WEIGHT,
    inv_temperature,
    clip,
    beta_kl,
    V,
    MODE: tl.constexpr,
    HAS_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """MODE 0: log-prob only; 1: and the gradient of G * logp; 2: and GRPO-S's loss with its gradient. Gradients overwrite Z."""
    row = tl.program_id(0).to(tl.int64)  # row * stride may pass 2^31
    Z += row * stride
    target = tl.load(T + row)
    inside = (target >= 0) & (
        target < V
    )  # read before the second pass overwrites it, with barriers between
    logp = tl.load(Z + target, mask=inside, other=float("nan")).to(tl.float32) * inv_temperature
    top, total = -3.4e38, 0.0  # finite: a whole block of -inf must not make inf - inf
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(Z + col, mask=col < V, other=float("-inf")).to(tl.float32) * inv_temperature
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    lse = top + tl.log(total)
    logp -= lse
    tl.store(LOGP + row, logp)
    if MODE > 0:
        if MODE == 1:
            slope = tl.load(G + row).to(tl.float32)  # d loss / d logp
        else:
            a = tl.load(A + row).to(tl.float32)
            weight = tl.load(WEIGHT + row).to(tl.float32)
            change = 0.0  # log rho
            if HAS_OLD:
                change = logp - tl.load(OLD + row)
            ratio = tl.exp(tl.minimum(tl.maximum(change, -20.0), 20.0))
            free, held = ratio * a, tl.minimum(tl.maximum(ratio, 1 - clip), 1 + clip) * a
            gap = tl.load(REF + row) - logp
            d = tl.minimum(tl.maximum(gap, -20.0), 20.0)
            k3 = tl.exp(d) - d - 1
            slope = tl.where(
                (free <= held) & (tl.abs(change) <= 20), free, 0.0
            )  # d rho / d logp = rho
            slope -= beta_kl * tl.where(
                tl.abs(gap) <= 20, 1 - tl.exp(d), 0.0
            )  # d k3 / d logp = 1 - exp(d)
            slope = tl.where(weight == 0, 0.0, -weight * slope)
            tl.store(
                LOSS + row,
                tl.where(weight == 0, 0.0, -weight * (tl.minimum(free, held) - beta_kl * k3)),
            )
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(Z + col, mask=col < V, other=float("-inf")).to(tl.float32) * inv_temperature
            dz = slope * inv_temperature * (tl.where(col == target, 1.0, 0.0) - tl.exp(x - lse))
            tl.store(Z + col, tl.where(slope == 0, 0.0, dz).to(Z.dtype.element_ty), mask=col < V)


@triton.jit
def advantage_kernel(
    R, r_prompt, r_sample, ALPHA, a_prompt, a_sample, OUT, eps, samples, BLOCK: tl.constexpr
):
    """One program per group of rewards."""
    prompt, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mine = i < samples
    r = tl.load(R + prompt * r_prompt + i * r_sample, mask=mine, other=0.0).to(tl.float32)
    first = tl.load(R + prompt * r_prompt).to(tl.float32)
    alpha = tl.load(ALPHA + prompt * a_prompt + i * a_sample, mask=mine, other=0.0).to(tl.float32)
    centred = tl.where(mine, r - tl.sum(r, 0) / samples, 0.0)
    std = tl.sqrt(tl.sum(centred * centred, 0) / samples)
    equal = (
        tl.sum(tl.where(mine & (r != first), 1, 0), 0) == 0
    )  # of NaN, none is equal; a maximum would leave them out
    tl.store(
        OUT + prompt * samples + i,
        tl.where(equal, 0.0, alpha * centred / (std + eps)).to(OUT.dtype.element_ty),
        mask=mine,
    )


def blocking(V: int, block: int | None = None) -> tuple[int, int]:
    """BLOCK and warps of row_kernel: 16 elements a thread. 16384 columns at a time is the most that spills no registers. On an H200 with
    gradients 16384, 8192 and 4096 are alike, and log-probs alone are a sixth faster with 4096 (README.md)."""
    block = block or min(16384, triton.next_power_of_2(V))
    return block, max(1, min(block // 512, 16 if torch.version.hip else 32))


def rows(
    z: Tensor,
    targets: Tensor,
    temperature: float,
    g: Tensor | None = None,
    objective: Objective | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As reference.rows: the gradient overwrites z."""
    if z.dtype not in (torch.float32, torch.bfloat16) or z.stride(1) != 1:
        raise ValueError(
            f"z is {z.dtype} with strides {z.stride()}: want float32 or bfloat16 rows without gaps"
        )
    (n, V), o = z.shape, objective
    logp = torch.empty(n, dtype=torch.float32, device=z.device)
    loss = torch.empty_like(logp) if o is not None else None
    block, warps = blocking(V, block)
    unused = logp  # a pointer for arguments that the mode does not read
    row = [
        unused if x is None else x.contiguous()
        for x in (
            (g, None, None, None, None)
            if o is None
            else (None, o.logp_old, o.logp_ref, o.advantage, o.weight)
        )
    ]
    with torch.cuda.device_of(z):  # Triton launches on the current device
        row_kernel[(n,)](
            z,
            z.stride(0),
            targets.contiguous(),
            row[0],
            logp,
            unused if loss is None else loss,
            *row[1:],
            1 / temperature,
            0.0 if o is None else o.clip,
            0.0 if o is None else o.beta_kl,
            V,
            MODE=2 if o is not None else 0 if g is None else 1,
            HAS_OLD=o is not None and o.logp_old is not None,
            BLOCK=block,
            num_warps=warps,
        )
    return logp, loss, None if g is None and o is None else z


def advantage(rewards: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """As reference.advantage."""
    if rewards.dtype == torch.float64:
        raise ValueError("rewards are float64: the kernel computes in float32")
    out = torch.empty(rewards.shape, dtype=rewards.dtype, device=rewards.device)
    with torch.cuda.device_of(rewards):
        advantage_kernel[(len(rewards),)](
            rewards,
            *rewards.stride(),
            alpha,
            *alpha.stride(),
            out,
            eps,
            rewards.shape[1],
            BLOCK=triton.next_power_of_2(rewards.shape[1]),
        )
    return out
