"""Compiles every kernel ahead of time, without a GPU, and prints what the compiler made of it:

    python kernels/compile_report.py

registers and bytes of stack (spills) a thread, shared memory a block, and loads from memory: 16 bytes wide, and narrower. Exit status 1 if anything
spills, or if row_kernel reads logits narrowly although rows are aligned (V a multiple of 16): only its scalars may be, 2, 3 or 6 by mode.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's stand-ins cannot be compiled
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
MODES = ("log-probs", "with gradient", "GRPO-S loss")


def variants():
    """(name, kernel, types of its arguments, constants, whether 16-byte loads are demanded)."""
    for dtype in ("bf16", "fp32"):
        types = {
            "Z": f"*{dtype}",
            "stride": "i32",
            "T": "*i64",
            **{k: "*fp32" for k in ("G", "LOGP", "LOSS", "OLD", "REF", "A", "WEIGHT")},
            "inv_temperature": "fp32",
            "clip": "fp32",
            "beta_kl": "fp32",
            "V": "i32",
        }
        for mode, name in enumerate(MODES):
            yield (
                f"rows, {name}, {dtype}",
                row_kernel,
                types,
                {"MODE": mode, "HAS_OLD": True, "BLOCK": 16384},
                True,
            )
    yield (
        "advantage",
        advantage_kernel,
        {
            "R": "*fp32",
            "r_prompt": "i32",
            "r_sample": "i32",
            "ALPHA": "*fp32",
            "a_prompt": "i32",
            "a_sample": "i32",
            "OUT": "*fp32",
            "eps": "fp32",
            "samples": "i32",
        },
        {"BLOCK": 8},
        False,
    )


def compiled(kernel, types: dict, constants: dict, target: GPUTarget):
    signature = {**types, **{k: "constexpr" for k in constants}}
    at = {name: i for i, name in enumerate(kernel.arg_names)}
    aligned = {
        (at[name],): [["tt.divisibility", 16]]
        for name, t in types.items()
        if t[0] == "*" or name in ("stride", "V")
    }
    warps = {} if "MODE" not in constants else {"num_warps": 16 if target.backend == "hip" else 32}
    return triton.compile(
        ASTSource(kernel, signature, {(at[k],): v for k, v in constants.items()}, aligned),
        target=target,
        options=warps,
    )


def resources(binary, target: GPUTarget) -> dict:
    """registers, stack in bytes, width in bytes of each load from global memory in the code."""
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: E731
        loads = [
            {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}.get(w, 2)
            for w in re.findall(r"(?:global|buffer)_load_(\w+)", text)
        ]
        return {
            "registers": number("vgpr_count"),
            "stack": number("private_segment_fixed_size") + number("vgpr_spill_count"),
            "loads": loads,
        }
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"])
        f.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", f.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        code = subprocess.run(
            [tools / "nvdisasm", f.name], capture_output=True, text=True, check=True
        ).stdout
    found = {
        key: int(re.search(rf"\b{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")
    }
    loads = [
        int((re.search(r"\.(128|64|U16|U8)\b", line) or [0, "32"])[1].replace("U", "")) // 8
        for line in code.splitlines()
        if "LDG" in line
    ]
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"], "loads": loads}


def main() -> int:
    bad = 0
    print(
        "| kernel | target | registers | stack | shared | wide loads | narrow loads |\n"
        + "|---" * 7
        + "|"
    )
    for name, kernel, types, constants, wide in variants():
        for label, target in TARGETS.items():
            binary = compiled(kernel, types, constants, target)
            r = resources(binary, target)
            wide_loads = sum(w >= 16 for w in r["loads"])
            narrow = len(r["loads"]) - wide_loads
            wrong = r["stack"] > 0 or (
                wide and (narrow > (2, 3, 6)[constants["MODE"]] or not wide_loads)
            )
            bad += wrong
            print(
                f"| {name} | {label} | {r['registers']} | {r['stack']} | {binary.metadata.shared} | {wide_loads} | {narrow} |{' <- spills or reads narrowly' if wrong else ''}",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
