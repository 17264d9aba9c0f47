"""kernels/triton_kernels.py in Triton's interpreter, on CPU tensors, against float64; `-m gpu` runs the same checks compiled, on a CUDA device."""

import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import Objective, clipped_objective, grpo_loss, token_logprobs
from kernels import reference

SOURCE = Path(__file__).resolve().parent.parent / "kernels" / "triton_kernels.py"
triton_kernels = importlib.import_module("kernels.triton_kernels")
gpu = pytest.mark.gpu
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # the interpreter's numpy speaks up where NaN is planted


def case(n, V, dtype, temperature, on_policy, beta_kl, seed=0, device="cpu"):
    """Logits with a row of -inf columns and extreme ones, an objective with clipped and masked tokens; what float64 autograd makes of them."""
    g = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(n, V, generator=g)).to(dtype)
    targets = torch.randint(V, (n,), generator=g)
    z[0, : V - 1], targets[0] = -math.inf, V - 1  # the first blocks hold nothing
    if n > 1:
        z[1] += 3e4  # far from zero
    x = z.double().requires_grad_()
    logp = (x / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    A, old, ref = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(3))
    o = Objective(
        A,
        torch.rand(n, generator=g, dtype=torch.float64),
        logp.detach() + 0.4 * ref,
        None if on_policy else logp.detach() + 0.3 * old,
        0.2,
        beta_kl,
    )
    if n > 3:
        o.weight[2] = 0  # a masked token
        o.logp_ref[3] = logp[3].detach() - 30  # beyond the clamp of k3
    loss = -o.weight * clipped_objective(logp, o)[0]
    (grad,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    (unit,) = torch.autograd.grad((A * logp).sum(), x)
    small = Objective(
        *(
            None if t is None else t.float().to(device)
            for t in (o.advantage, o.weight, o.logp_ref, o.logp_old)
        ),
        o.clip,
        o.beta_kl,
    )
    return (
        z.to(device),
        targets.to(device),
        small,
        logp.detach(),
        loss.detach(),
        grad.nan_to_num(),
        unit.nan_to_num(),
    )


def close(got, want, dtype, what, scale=1.0):
    """float32: 2e-6 for log-probs (1e-5 of over a thousand columns), 5e-6 of the largest for gradients. bfloat16 gradients: 2^-8 of the power of two above the largest, one unit in its
    last place, as the interpreter truncates where a GPU rounds. scale (n,): of each row."""
    got, want = got.double().cpu(), want.double()
    assert got.isfinite().all(), f"{what}: not finite"
    largest = max([1e-30, *want.abs().flatten().tolist()])
    bound = (
        {"logp": 2e-6, "logp of many": 1e-5}[what]
        if what.startswith("logp")
        else 2**-8 * 2 ** math.ceil(math.log2(largest))
        if dtype == torch.bfloat16
        else 5e-6 * max(1.0, largest)
    )
    error = (
        ((got - want).abs() / (scale if got.ndim == 1 else torch.as_tensor(scale)[..., None]))
        .flatten()
        .tolist()
    )
    assert max([0.0, *error]) <= bound, f"{what}: {max(error)} over {bound}"


def check_rows(
    m,
    n=6,
    V=37,
    block=16,
    dtype=torch.float32,
    temperature=0.7,
    on_policy=False,
    beta_kl=0.3,
    device="cpu",
    gap=5,
):
    z, targets, o, logp, loss, grad, unit = case(
        n, V, dtype, temperature, on_policy, beta_kl, device=device
    )
    size = z.float().nan_to_num(neginf=0).abs().amax(1).cpu().double() / temperature
    scale = (size / 20).clamp(min=1)  # float32 knows logits of this size to 1e-7 of it
    name = "logp" if V <= 1000 else "logp of many"
    padded = torch.full(
        (n, V + gap), math.nan, dtype=dtype, device=device
    )  # rows apart, NaN between them

    chosen = {} if m is reference else {"block": block}

    def run(*args, **more):
        rows = padded.clone()[:, :V]
        rows.copy_(z)
        wide = rows._base
        out = m.rows(rows, targets, temperature, *args, **chosen, **more)
        assert wide[:, V:].isnan().all(), "wrote beyond the row"
        return out

    got, nothing, untouched = run()
    close(got, logp, dtype, name, scale)
    assert nothing is None and untouched is None
    got, nothing, dz = run(o.advantage)
    close(got, logp, dtype, name, scale), close(dz, unit, dtype, "gradient", scale)
    got, got_loss, dz = run(objective=o)
    (
        close(got, logp, dtype, name, scale),
        close(got_loss, loss, torch.float32, "loss", scale),
        close(dz, grad, dtype, "objective's gradient", scale),
    )
    others = torch.ones(n, V, dtype=torch.bool).scatter_(1, targets.cpu()[:, None], False)
    close(
        dz.cpu().where(others, 0),
        grad.where(others, 0),
        dtype,
        "gradient of columns beside the target",
        scale,
    )
    if n > 3:
        assert (dz[2] == 0).all() and got_loss[2] == 0, "a masked token counts"
        broken = z.clone()
        broken[2] = math.nan  # a masked token may hold anything
        _, got_loss, dz = m.rows(broken.clone(), targets, temperature, objective=o, **chosen)
        assert (dz[2] == 0).all() and got_loss[2] == 0, "a masked token counts"
        _, _, dz = m.rows(
            broken, targets, temperature, torch.where(o.weight == 0, 0.0, o.advantage), **chosen
        )
        assert (dz[2] == 0).all(), "a token without a gradient has one"
    if m is not reference:
        assert (
            m.rows(z.clone(), torch.full_like(targets, V), temperature, **chosen)[0].isnan().all()
        ), "a target outside of the vocabulary"


def check_advantage(m, P=5, G=7, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(1)
    R, alpha = (
        torch.randn(G, P, generator=g).to(device, dtype).T,
        torch.rand(P, 1, generator=g).to(device, dtype).expand(P, G),
    )  # strided both
    R[0] = 0.1
    got = m.advantage(R, alpha, 0.3)
    assert (got[0] == 0).all(), "a group of equal rewards"
    error = (got.double() - reference.advantage(R.double(), alpha.double(), 0.3)).abs().max().item()
    assert error < (2e-6 if dtype == torch.float32 else 2**-7), f"advantage: {error}"
    broken = R.clone()
    broken[:, G - 1] = math.nan
    assert m.advantage(broken, alpha, 0.3).isnan().all(), "NaN among the rewards"


def check_far(m, folder):
    """A row that begins 2^31 elements into a tensor (a sparse file, never filled)."""
    import numpy

    memory = numpy.memmap(folder / "far", dtype=numpy.int16, mode="w+", shape=2**32 + 64)
    z = torch.from_numpy(memory).view(torch.bfloat16).as_strided((3, 9), (2**30, 1), 2**31)
    z[:] = torch.arange(27).view(3, 9)
    got = m.rows(z, torch.tensor([0, 4, 8]), 1.0, block=16)[0]
    close(
        got,
        torch.arange(27)
        .view(3, 9)
        .double()
        .log_softmax(-1)
        .gather(1, torch.tensor([[0], [4], [8]]))[:, 0],
        torch.float32,
        "logp",
    )


COMBINATIONS = [
    *itertools.product(
        (1, 6),
        ((1, 16), (16, 16), (37, 16), (130, 32), (130, 256)),
        (torch.float32, torch.bfloat16),
        ((1.0, True, 0.0), (0.5, False, 0.3)),
    ),
    *(
        (5, (37, 16), torch.float32, (t, p, b))
        for t in (0.3, 1.7)
        for p in (True, False)
        for b in (0.0, 0.1)
    ),
]


@pytest.mark.parametrize("n, sizes, dtype, more", COMBINATIONS, ids=str)
def test_rows(n, sizes, dtype, more):
    check_rows(triton_kernels, n, *sizes, dtype, *more)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_reference_rows(dtype):
    check_rows(reference, dtype=dtype)
    check_advantage(reference)


@pytest.mark.parametrize("P, G", ((1, 1), (5, 2), (3, 7), (2, 8), (4, 33)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_advantage(P, G, dtype):
    check_advantage(triton_kernels, P, G, dtype)


def test_far_rows(tmp_path):
    check_far(triton_kernels, tmp_path)


def test_rows_errors():
    z, targets, *_ = case(2, 8, torch.float32, 1.0, True, 0.0)
    for bad in (z.double(), z.half(), z.T):
        with pytest.raises(ValueError, match="want float32 or bfloat16"):
            triton_kernels.rows(bad, targets, 1.0)


@pytest.mark.parametrize("trained", (False, True))
def test_both_backends_agree(monkeypatch, trained):
    """token_logprobs and grpo_loss through the kernels and through torch: the same numbers and gradients."""
    g, out = torch.Generator().manual_seed(0), {}
    h, W, targets = (
        torch.randn(9, 6, generator=g),
        torch.randn(21, 6, generator=g),
        torch.randint(21, (9,), generator=g),
    )
    o = Objective(
        torch.randn(9, generator=g),
        torch.rand(9, generator=g),
        -3 * torch.rand(9, generator=g),
        -3 * torch.rand(9, generator=g),
        0.2,
        0.1,
    )
    for name in ("torch", "triton"):
        monkeypatch.setenv("DRIRL_KERNELS", name)
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_(trained)
        logps, (loss, _) = token_logprobs(a, b, targets, 0.7), grpo_loss(a, b, targets, o, 0.7)
        out[name] = [
            logps,
            loss,
            *torch.autograd.grad(logps.sum() + 2 * loss, (a, b) if trained else (a,)),
        ]
    for x, y in zip(out["torch"], out["triton"]):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_compile_report():
    """Every kernel compiles for all four targets without spills and with wide loads; kernels/README.md shows what the script prints."""
    root = SOURCE.parent
    result = subprocess.run(
        [sys.executable, root / "compile_report.py"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\n") == 30 and result.stdout in (root / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ planted bugs

BUGS = {  # name: what stands in the source, what is put there
    "none": (
        "@triton.jit\ndef row_kernel",
        "@triton.jit\ndef row_kernel",
    ),  # the checks pass without a bug
    "target off by one": ("target = tl.load(T + row)", "target = tl.load(T + row) + 1"),
    "no temperature": (
        'other=float("-inf")).to(tl.float32) * inv_temperature\n        higher',
        'other=float("-inf")).to(tl.float32)\n        higher',
    ),
    "no temperature in the gradient": ("slope * inv_temperature *", "slope *"),
    "sign of the KL": ("slope -= beta_kl", "slope += beta_kl"),
    "sample std": ("centred * centred, 0) / samples)", "centred * centred, 0) / (samples - 1))"),
    "columns beyond the row count": (
        'mask=col < V, other=float("-inf")).to(tl.float32) * inv_temperature\n        higher',
        "mask=col < V, other=0.0).to(tl.float32) * inv_temperature\n        higher",
    ),
    "masked tokens count": ("tl.where(slope == 0, 0.0, dz)", "dz"),
    "running maximum starts at -inf": (
        "top, total = -3.4e38, 0.0",
        'top, total = float("-inf"), 0.0',
    ),
    "int32 row offsets": ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    "clip on the wrong side": ("free <= held", "free >= held"),
    "clip of the loss on the wrong side": ("tl.minimum(free, held)", "tl.maximum(free, held)"),
    "NaN rewards are equal": (
        "tl.sum(tl.where(mine & (r != first), 1, 0), 0) == 0",
        'tl.max(tl.where(mine, r, float("-inf")), 0) == tl.min(tl.where(mine, r, float("inf")), 0)',
    ),
    "alpha inside the normalisation": (
        "alpha * centred / (std + eps)",
        "alpha * centred / (alpha * std + eps)",
    ),
}


def planted(bug, folder):
    text, (old, new) = SOURCE.read_text(), BUGS[bug]
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {SOURCE.name}"
    path = folder / "triton_kernels.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, tmp_path):
    """In a process of its own, as a wrong address may end it."""
    code = f"import sys; sys.path[:0] = {[str(SOURCE.parent.parent), str(Path(__file__).parent)]}; import test_triton, pathlib; test_triton.see_red({bug!r}, pathlib.Path({str(tmp_path)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert "about to check" in result.stdout, result.stderr
    noticed = (
        result.returncode < 0 or "AssertionError" in result.stderr
    )  # a crash, or a check that says so
    assert noticed == (bug != "none"), (
        f"{'nobody noticed' if bug != 'none' else 'red without a bug'}: {bug}\n{result.stderr}"
    )
    assert bug != "none" or result.returncode == 0, result.stderr


def see_red(bug, folder):
    m = planted(bug, folder)
    print("about to check", flush=True)
    check_rows(m)
    check_advantage(m)
    check_far(m, folder)


# ------------------------------------------------------------------------------------------------ on a GPU


@gpu
@pytest.mark.parametrize("V", (1000, 49152, 151936, 262144))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "gap", (5, 16)
)  # rows apart by no multiple of 16, and by one: other machine code
def test_rows_compiled(V, dtype, gap):
    check_rows(triton_kernels, 6, V, None, dtype, 0.7, False, 0.3, "cuda", gap)


@gpu
def test_grpo_loss_on_the_gpu(monkeypatch):
    """Under autocast, as training calls it: the kernels against torch on the same device."""
    g, out = torch.Generator(device="cuda").manual_seed(0), []
    h, W = (
        torch.randn(700, 64, generator=g, device="cuda"),
        torch.randn(49152, 64, generator=g, device="cuda") / 8,
    )
    targets, o = (
        torch.randint(len(W), (700,), generator=g, device="cuda"),
        Objective(*torch.randn(4, 700, generator=g, device="cuda"), 0.2, 0.02),
    )
    for name in ("torch", "triton"):
        monkeypatch.setenv("DRIRL_KERNELS", name)
        a = h.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            loss, logp = grpo_loss(a, W, targets, o, 0.5)
        out.append((loss, logp, *torch.autograd.grad(loss, a)))
    for x, y in zip(*out):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)


@gpu
@pytest.mark.parametrize("P, G", ((1, 1), (64, 8), (3, 33)))
def test_advantage_compiled(P, G):
    check_advantage(triton_kernels, P, G, device="cuda")


@gpu
def test_many_logits_on_the_gpu():
    """N * V beyond 2^31 through token_logprobs, forward and backward."""
    g = torch.Generator(device="cuda").manual_seed(0)
    h, W = (
        torch.randn(n, 64, generator=g, device="cuda").requires_grad_() for n in (17000, 131072)
    )
    targets = torch.randint(len(W), (len(h),), generator=g, device="cuda")
    token_logprobs(h, W, targets).sum().backward()
    s = slice(-8, None)
    x = h[s].detach().double().requires_grad_()
    want = (x @ W.detach().double().T).log_softmax(-1).gather(1, targets[s, None])[:, 0]
    torch.testing.assert_close(
        token_logprobs(h[s].detach(), W.detach(), targets[s]).double(),
        want.detach(),
        atol=1e-3,
        rtol=1e-4,
    )  # TF32 may be on
    torch.testing.assert_close(
        h.grad[s].double(), torch.autograd.grad(want.sum(), x)[0], atol=1e-2, rtol=1e-2
    )
