"""Compiles every kernel ahead of time, without a GPU, and prints what the compiler made of it:

    python tests/compile_report.py

Each cell: registers a thread, bytes of stack (spills), loads in the code of 16 bytes + narrower.
Exit status 1: something spills, or row_kernel reads logits narrowly. Only its scalars may be
narrow: target and its logit, and the slope where there is a gradient.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's stand-ins can't be compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.triton_kernels import advantage_kernel, row_kernel  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HIP_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def variants():
    """(name, kernel, types of its arguments, constants, narrow loads allowed)."""
    for dtype in ("bf16", "fp32"):
        pointers = {"Z": f"*{dtype}", "T": "*i64", "G": "*fp32", "LOGP": "*fp32"}
        types = {**pointers, "stride": "i32", "inv_temperature": "fp32", "V": "i32"}
        for gradient, name in ((False, "log-probs"), (True, "with gradient")):
            constants = {"GRADIENT": gradient, "BLOCK": 16384 if gradient else 4096}
            yield f"rows, {name}, {dtype}", row_kernel, types, constants, 2 + gradient
    integers = ("r_prompt", "r_sample", "a_prompt", "a_sample", "samples")
    types = dict.fromkeys(("R", "ALPHA", "OUT"), "*fp32") | dict.fromkeys(integers, "i32")
    yield "advantage", advantage_kernel, {**types, "eps": "fp32"}, {"BLOCK": 8}, None


def compiled(kernel, types: dict, constants: dict, target: GPUTarget, **options):
    """The kernel for one target; pointers, strides and V are multiples of 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    places = [i for i, n in enumerate(names) if signature[n][0] == "*" or n in ("stride", "V")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in places}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=target, options=options)


def on_amd(binary) -> tuple[int, int, list[int]]:
    """Registers, bytes of stack, and the width in bytes of each load."""
    text = binary.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))
    stack = number("private_segment_fixed_size") + number("vgpr_spill_count")
    loads = re.findall(r"(?:global|buffer)_load_(\w+)", text)
    return number("vgpr_count"), stack, [HIP_WIDTHS.get(load, 2) for load in loads]


def on_nvidia(binary) -> tuple[int, int, list[int]]:
    """As on_amd."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        run = lambda *command: (
            subprocess.run([*command, f.name], capture_output=True, text=True, check=True).stdout
        )
        usage = run(NVIDIA / "cuobjdump", "--dump-resource-usage")
        code = run(NVIDIA / "nvdisasm")
    number = lambda key: int(re.search(rf"\b{key}:(\d+)", usage).group(1))
    loads = []
    for line in code.splitlines():
        if "LDG" in line:
            bits = re.search(r"\.U?(128|64|16|8)\b", line)
            loads.append(int(bits.group(1)) // 8 if bits else 4)
    return number("REG"), number("STACK") + number("LOCAL"), loads


def main() -> str | int:
    bad = []
    print("| kernel | " + " | ".join(TARGETS) + " |\n" + "|---" * (1 + len(TARGETS)) + "|")
    for name, kernel, types, constants, scalars in variants():
        cells = []
        for label, target in TARGETS.items():
            amd = target.backend == "hip"
            most = min(constants["BLOCK"] // 512, 16 if amd else 32)  # see rows
            options = {} if scalars is None else {"num_warps": most}
            binary = compiled(kernel, types, constants, target, **options)
            registers, stack, loads = (on_amd if amd else on_nvidia)(binary)
            wide = sum(width >= 16 for width in loads)
            narrow = len(loads) - wide
            cells.append(f"{registers}, {stack}, {wide} + {narrow}")
            if stack > 0 or (scalars is not None and (narrow > scalars or not wide)):
                bad.append(f"{name} on {label} spills or reads narrowly: {cells[-1]}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return "\n".join(bad) or 0


if __name__ == "__main__":
    sys.exit(main())
