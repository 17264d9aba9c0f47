"""The functions of reference.py as Triton kernels.

Without a GPU they run in Triton's interpreter: set TRITON_INTERPRET=1 before the import.
Nothing is atomic and each row has one writer, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_kernel(
    Z, stride, T, G, LOGP, inv_temperature, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row of logits, with target T. GRADIENT: that of G * logp overwrites the row.

    The first pass keeps a running maximum and the sum of exponentials below it (online log-sum-exp,
    arXiv 1805.02867). The second replaces each logit by its gradient.
    """
    row = tl.program_id(0).to(tl.int64)  # row * stride may pass 2^31
    Z += row * stride
    target = tl.load(T + row)
    inside = (target >= 0) & (target < V)
    # read now: in the second pass another warp may have overwritten it
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
    if GRADIENT:
        slope = tl.load(G + row).to(tl.float32)
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(Z + col, mask=col < V, other=float("-inf")).to(tl.float32) * inv_temperature
            dz = slope * inv_temperature * (tl.where(col == target, 1.0, 0.0) - tl.exp(x - lse))
            dz = tl.where(slope == 0, 0.0, dz)  # a token left out may hold anything
            tl.store(Z + col, dz.to(Z.dtype.element_ty), mask=col < V)


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
    differ = tl.sum(tl.where(mine & (r != first), 1, 0), 0)  # NaN differs from all; max skips it
    a = tl.where(differ == 0, 0.0, alpha * centred / (std + eps))
    tl.store(OUT + prompt * samples + i, a.to(OUT.dtype.element_ty), mask=mine)


def rows(z: Tensor, targets: Tensor, temperature: float, g: Tensor | None = None, block: int = 0):
    """As reference.rows, for float32 and bfloat16. block: columns at a time; 0: chosen here."""
    if z.dtype not in (torch.float32, torch.bfloat16) or z.stride(1) != 1:
        raise ValueError(f"{z.dtype}, strides {z.stride()}: want float32 or bfloat16 without gaps")
    n, V = z.shape
    logp = torch.empty(n, dtype=torch.float32, device=z.device)
    gradient = g is not None
    columns = block or (V if gradient else min(V, 4096))  # 4096: measured, see README.md
    block = min(16384, triton.next_power_of_2(columns))  # larger ones spill registers
    warps = max(1, min(block // 512, 16 if torch.version.hip else 32))  # 16 columns a thread
    slopes = g.contiguous() if gradient else logp  # any pointer: without GRADIENT it isn't read
    given = (z, z.stride(0), targets.contiguous(), slopes, logp, 1 / temperature, V)
    with torch.cuda.device_of(z):  # Triton launches on the current device
        row_kernel[(n,)](*given, GRADIENT=gradient, BLOCK=block, num_warps=warps)
    return logp, z if gradient else None


def advantage(rewards: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """As reference.advantage, in float32."""
    if rewards.dtype == torch.float64:
        raise ValueError("rewards are float64: the kernel computes in float32")
    P, G = rewards.shape
    out = torch.empty(P, G, dtype=rewards.dtype, device=rewards.device)
    given = (rewards, *rewards.stride(), alpha, *alpha.stride(), out, eps, G)
    with torch.cuda.device_of(rewards):
        advantage_kernel[(P,)](*given, BLOCK=triton.next_power_of_2(G))
    return out
