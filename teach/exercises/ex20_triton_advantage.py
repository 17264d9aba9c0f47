"""Exercise 20: a first Triton kernel.

Difficulty 3 of 3, 50 minutes. Read first: teach/WALKTHROUGH.md, section Kernels.

Exercise 13 once more, as a GPU would do it: one program per group reads its rewards once, computes
mean and std in registers, and writes its advantages. On a laptop it runs in Triton's interpreter
(TRITON_INTERPRET=1, which the tests set), where print works (pytest shows it with -s). The
interpreter takes almost any Python. The compiler does not: the last check compiles your kernel for
an H100, which needs no GPU.

Hint: a block's size is a power of two, a group's is not. Load with a mask, and mask again before
every sum: a masked lane that holds 0 is no longer 0 once the mean is subtracted. Store with a mask
too: what lies behind OUT is not yours. Addresses are base + prompt * stride + sample * stride, and
alpha's strides may be 0.
"""

import triton
import triton.language as tl


@triton.jit
def advantage_kernel(
    R, r_prompt, r_sample, ALPHA, a_prompt, a_sample, OUT, eps, samples, BLOCK: tl.constexpr
):
    """OUT[p, i] = ALPHA[p, i] (R[p, i] - mean R[p]) / (std R[p] + eps), i < samples <= BLOCK.

    p = tl.program_id(0). R[p, i] lies at R + p * r_prompt + i * r_sample, ALPHA likewise, OUT[p, i]
    at OUT + p * samples + i; all float32. std divides by samples. Equal rewards give exactly 0,
    also where eps is 0. Nothing is asked of NaN. The tests launch P programs on R (P, G) and
    ALPHA (P, G) of any strides:
        advantage_kernel[(P,)](R, *R.stride(), ALPHA, *ALPHA.stride(), OUT, eps, G, BLOCK=block)
    """
    raise NotImplementedError
