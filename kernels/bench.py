"""Time and memory of token log-probs with their backward pass, alternating; on the CPU each variant in a process of its own:

    python kernels/bench.py                       CPU, the default model's sizes: N 4096, V 49152, D 576
    python kernels/bench.py --device cuda --dtype bfloat16    and the bytes a second against a device copy

ours and grpo_loss (kernels/), log_softmax + gather, and TRL's selective_log_softmax and Liger's GRPO loss where they are installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import Objective, grpo_loss, token_logprobs  # noqa: E402


def plain(h, W, targets, o):
    return (h @ W.T).log_softmax(-1).gather(1, targets[:, None]).sum()


def trl(h, W, targets, o):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax((h @ W.T)[None], targets[None]).sum()


def liger(h, W, targets, o):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=o.beta_kl, epsilon_low=o.clip, epsilon_high=o.clip)
    return loss(
        h.view(8, -1, h.shape[1]),
        W,
        targets.view(8, -1),
        torch.ones(8, len(h) // 8, device=h.device),
        o.advantage.view(8, -1)[:, 0],
        old_per_token_logps=o.logp_old.view(8, -1),
        ref_per_token_logps=o.logp_ref.view(8, -1),
    )[0]


VARIANTS = {
    "ours": lambda h, W, t, o: token_logprobs(h, W, t).sum(),
    "grpo_loss": lambda h, W, t, o: grpo_loss(h, W, t, o)[0],
    "log_softmax": plain,
    "TRL": trl,
    "Liger": liger,
}


def memory(key: str) -> float:
    return (
        next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(key)
        )
        / 2**20
    )


def measure(name: str, a) -> dict:
    """One process: seconds of a forward and backward pass (median of `repeat`), peak memory in GB above what the inputs take (Linux)."""
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(a.N, a.D, generator=g), torch.randn(a.V, a.D, generator=g) / a.D**0.5
    t = torch.randint(a.V, (a.N,), generator=g)
    o = Objective(*(torch.randn(a.N, generator=g).to(a.device) for _ in range(4)), 0.2, 0.02)
    h, W, t = (
        x.to(a.device, getattr(torch, a.dtype) if x.is_floating_point() else None)
        for x in (h, W, t)
    )
    h.requires_grad_(), W.requires_grad_(a.head == "trained")
    cuda, times = a.device == "cuda", []
    VARIANTS[name](
        h[:64],
        W,
        t[:64],
        Objective(*(x[:64] for x in (o.advantage, o.weight, o.logp_ref, o.logp_old)), 0.2, 0.02),
    ).backward()  # allocator and imports
    h.grad = W.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30
    for _ in range(a.repeat):
        h.grad = W.grad = None
        start = time.perf_counter()
        VARIANTS[name](h, W, t, o).backward()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    after = torch.cuda.max_memory_allocated() / 2**30 if cuda else memory("VmHWM")
    return {"seconds": statistics.median(times), "gb": after - before}


def rows_bandwidth(a) -> None:
    """On CUDA: effective GB/s of the row kernel by columns at a time (6 bytes per bfloat16 logit; the second read may come from the cache)
    against a device copy (4) in the same process."""
    from kernels.triton_kernels import rows

    z, t, g = (
        torch.randn(a.N, a.V, device="cuda", dtype=torch.bfloat16),
        torch.randint(a.V, (a.N,), device="cuda"),
        torch.ones(a.N, device="cuda"),
    )
    copy, found = torch.empty_like(z), {}
    cases = [("copy", lambda: copy.copy_(z), 4)]
    for block in (16384, 8192, 4096):
        cases += [
            (f"with gradient, {block}", lambda b=block: rows(z, t, 1.0, g, block=b), 6),
            (f"log-probs, {block}", lambda b=block: rows(z, t, 1.0, block=b), 2),
        ]
    for name, f, size in cases:
        f()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            f()
        torch.cuda.synchronize()
        found[name] = 20 * size * a.N * a.V / (time.perf_counter() - start) / 1e9
    print(
        f"{torch.cuda.get_device_name()}: "
        + ", ".join(f"{k} {v:.0f} GB/s" for k, v in found.items())
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("N", 4096), ("V", 49152), ("D", 576), ("repeat", 3), ("rounds", 3)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--head", default="trained", choices=("trained", "frozen"))
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        print(json.dumps(measure(a.one, a)))
        return
    results = {name: [] for name in VARIANTS}
    alone = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }  # large tensors go back to the system when freed: the peak is what was needed
    for _ in range(a.rounds):  # alternating: the machine's moods hit all alike
        for name in list(results):
            if a.device == "cuda":  # its allocator counts by itself
                try:
                    results[name].append(measure(name, a))
                except Exception as e:  # not installed, or its compiler gives up
                    if name in ("ours", "grpo_loss"):
                        raise
                    print(f"left out: {name} ({type(e).__name__}: {e})")
                    del results[name]
                continue
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", name],
                capture_output=True,
                text=True,
                env=alone,
            )
            if run.returncode:
                why = (
                    run.stderr.strip().splitlines()[-1]
                    if run.stderr.strip()
                    else f"ended by signal {-run.returncode}"
                )
                print(f"left out: {name} ({why})")
                del results[name]
            else:
                results[name].append(json.loads(run.stdout))
    seconds, gb = (
        {k: statistics.median(r[key] for r in v) for k, v in results.items()}
        for key in ("seconds", "gb")
    )
    print(
        f"N {a.N}, V {a.V}, D {a.D}, {a.dtype}, head {a.head}, {a.device}, {torch.get_num_threads()} threads\n"
    )
    print(
        "| forward and backward | seconds | over ours | peak memory, GB | over ours |\n"
        + "|---" * 5
        + "|"
    )
    for name in results:
        print(
            f"| {name} | {seconds[name]:.4f} | {seconds[name] / seconds['ours']:.2f} | {gb[name]:.3f} | {gb[name] / max(1e-3, gb['ours']):.1f} |"
        )
    if a.device == "cuda":
        rows_bandwidth(a)


if __name__ == "__main__":
    main()
