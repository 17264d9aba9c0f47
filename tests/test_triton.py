"""kernels/triton_kernels.py in Triton's interpreter against float64; -m gpu: compiled, on a GPU."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from kernels import reference, token_logprobs, triton_kernels

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels" / "triton_kernels.py"
gpu = pytest.mark.gpu
# the interpreter's numpy warns where NaN is planted
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# ---------------------------------------------------------------------------- what is checked


def case(n, V, dtype, temperature, device="cpu"):
    """z, targets, g: hard rows of logits; log-probs and gradient by float64 autograd.

    The first row is -inf but for its last column, others lie far from zero; row 2 is left out.
    """
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(n, V, generator=generator)).to(dtype)
    targets, g = torch.randint(V, (n,), generator=generator), torch.randn(n, generator=generator)
    z[0, : V - 1], targets[0] = -math.inf, V - 1
    if n > 4:
        z[1] += 3e4
        g[2] = 0
        z[4] -= 3e4
    x = z.double().requires_grad_()
    logp = (x / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (grad,) = torch.autograd.grad((g * logp).sum(), x)
    z, targets, g = (t.to(device) for t in (z, targets, g))
    return z, targets, g, logp.detach(), grad.nan_to_num()


def close(got, want, bound, what):
    """bound: a number, or one per row (n,)."""
    got, want = got.double().cpu(), want.double()
    assert got.isfinite().all(), f"{what}: not finite"
    if isinstance(bound, torch.Tensor) and got.ndim == 2:
        bound = bound[:, None]
    excess = (got - want).abs() - bound
    assert (excess <= 0).all(), f"{what}: {excess.max().item()} over the bound"


def bounds(z, temperature, grad):
    """Of log-probs and of gradients, per row (n,).

    float32: 2e-6 (1e-5 of over a thousand columns), and 5e-6 of the largest gradient; more for
    logits above 10. bfloat16 gradients: 2^-8 of the power of two above the largest, as the
    interpreter truncates where a GPU rounds.
    """
    size = z.float().nan_to_num(neginf=0).abs().amax(1).cpu().double() / temperature
    scale = (size / 10).clamp(min=1)  # float32 knows such logits to 1e-7 of their size
    largest = max(1e-30, grad.abs().max().item())
    coarse = 2**-8 * 2 ** math.ceil(math.log2(largest))
    fine = 5e-6 * max(1.0, largest)
    of_logp = 2e-6 if z.shape[1] <= 1000 else 1e-5
    return of_logp * scale, (coarse if z.dtype == torch.bfloat16 else fine) * scale


def check_rows(m, n=6, V=37, block=16, dtype=torch.float32, temperature=0.7, device="cpu", gap=5):
    """m.rows on rows that lie `gap` apart, with NaN between them."""
    z, targets, g, logp, grad = case(n, V, dtype, temperature, device)
    of_logp, of_gradient = bounds(z, temperature, grad)
    chosen = {} if m is reference else {"block": block}

    def run(logits, *slopes):
        wide = torch.full((n, V + gap), math.nan, dtype=dtype, device=device)
        wide[:, :V] = logits
        out = m.rows(wide[:, :V], targets, temperature, *slopes, **chosen)
        assert wide[:, V:].isnan().all(), "wrote beyond the row"
        return out

    got, nothing = run(z)
    close(got, logp, of_logp, "logp")
    assert nothing is None
    got, dz = run(z, g)
    close(got, logp, of_logp, "logp")
    close(dz, grad, of_gradient, "gradient")
    rest = torch.ones(n, V, dtype=torch.bool).scatter_(1, targets.cpu()[:, None], False)
    close(dz.cpu().where(rest, 0), grad.where(rest, 0), of_gradient, "beside the target")
    if n > 4:
        z[2] = math.nan  # a row left out may hold anything
        assert (dz[2] == 0).all() and (run(z, g)[1][2] == 0).all(), "a row left out counts"
    if m is not reference:
        outside = m.rows(z, torch.full_like(targets, V), temperature, **chosen)[0]
        assert outside.isnan().all(), "a target outside of the vocabulary"


def check_advantage(m, P=5, G=7, dtype=torch.float32, device="cpu"):
    """m.advantage of strided rewards and alphas, one group equal, one with NaN."""
    g = torch.Generator().manual_seed(1)
    R = torch.randn(G, P, generator=g).to(device, dtype).T
    alpha = torch.rand(P, 1, generator=g).to(device, dtype).expand(P, G)
    R[0] = 0.1
    want = reference.advantage(R.double(), alpha.double(), 0.3).cpu()
    got = m.advantage(R, alpha, 0.3)
    assert (got[0] == 0).all(), "a group of equal rewards"
    close(got, want, 2e-6 if dtype == torch.float32 else 2**-7, "advantage")
    R[:, G - 1] = math.nan
    assert m.advantage(R, alpha, 0.3).isnan().all(), "NaN among the rewards"


def check_far(m, folder):
    """A row that begins 2^31 elements into a tensor (a sparse file, never filled)."""
    memory = numpy.memmap(folder / "far", dtype=numpy.int16, mode="w+", shape=2**32 + 64)
    z = torch.from_numpy(memory).view(torch.bfloat16).as_strided((3, 9), (2**30, 1), 2**31)
    logits, targets = torch.arange(27).view(3, 9), torch.tensor([0, 4, 8])
    z[:] = logits
    want = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    close(m.rows(z, targets, 1.0, block=16)[0], want, 2e-6, "logp")


# ---------------------------------------------------------------------------- in the interpreter

SIZES = ((1, 16), (16, 16), (37, 16), (130, 32), (130, 256))  # V, block
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("n", (1, 6))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", (1.0, 0.3, 1.7))
def test_rows(n, sizes, dtype, temperature):
    check_rows(triton_kernels, n, *sizes, dtype, temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype):
    check_rows(reference, dtype=dtype)
    check_advantage(reference, dtype=dtype)


@pytest.mark.parametrize("P, G", ((1, 1), (5, 2), (3, 7), (2, 8), (4, 33)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_advantage(P, G, dtype):
    check_advantage(triton_kernels, P, G, dtype)


def test_far_rows(tmp_path):
    check_far(triton_kernels, tmp_path)


def test_errors():
    z, targets, *_ = case(2, 8, torch.float32, 1.0)
    for bad in (z.double(), z.half(), z.T):
        with pytest.raises(ValueError, match="want float32 or bfloat16"):
            triton_kernels.rows(bad, targets, 1.0)
    with pytest.raises(ValueError, match="rewards are float64"):
        triton_kernels.advantage(z.double(), z, 0.1)


@pytest.mark.parametrize("trained", (False, True))
def test_both_backends_agree(monkeypatch, trained):
    """token_logprobs through the kernels and through torch: the same numbers and gradients."""
    g, out = torch.Generator().manual_seed(0), []
    h, W = torch.randn(9, 6, generator=g), torch.randn(21, 6, generator=g)
    targets, slopes = torch.randint(21, (9,), generator=g), torch.randn(9, generator=g)
    for name in ("torch", "triton"):
        monkeypatch.setenv("DRIRL_KERNELS", name)
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_(trained)
        logp = token_logprobs(a, b, targets, 0.7)
        logp.backward(slopes)
        out.append([logp.detach(), a.grad] + [b.grad] * trained)
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)


def test_compile_report():
    """Every kernel compiles for four GPUs as kernels/README.md says: no spills, wide loads."""
    command = [sys.executable, ROOT / "tests" / "compile_report.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\n") == 7
    assert result.stdout in (ROOT / "kernels" / "README.md").read_text()


# ---------------------------------------------------------------------------- planted bugs

FIRST_PASS = 'other=float("-inf")).to(tl.float32) * inv_temperature\n        higher'
BUGS = {  # name: what stands in the source, what is put there
    "none": ("@triton.jit\ndef row_kernel", "@triton.jit\ndef row_kernel"),
    "target off by one": ("target = tl.load(T + row)", "target = tl.load(T + row) + 1"),
    "no temperature": (FIRST_PASS, 'other=float("-inf")).to(tl.float32)\n        higher'),
    "no temperature in the gradient": ("slope * inv_temperature *", "slope *"),
    "columns beyond the row count": (FIRST_PASS, FIRST_PASS.replace('float("-inf")', "0.0")),
    "columns beyond the row are written": ("element_ty), mask=col < V)", "element_ty))"),
    "rows left out count": ("tl.where(slope == 0, 0.0, dz)", "dz"),
    "the sum is not rescaled": ("total * tl.exp(top - higher)", "total"),
    "the maximum starts at -inf": ("top, total = -3.4e38,", 'top, total = float("-inf"),'),
    "the maximum starts at -1e4": ("top, total = -3.4e38,", "top, total = -1e4,"),
    "int32 row offsets": ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    "sample std": ("centred * centred, 0) / samples)", "centred * centred, 0) / (samples - 1))"),
    "NaN rewards are equal": (
        "differ = tl.sum(tl.where(mine & (r != first), 1, 0), 0)",
        "differ = tl.max(tl.where(mine, tl.abs(r - first), 0.0), 0)",
    ),
    "alpha inside the normalisation": (
        "alpha * centred / (std + eps)",
        "alpha * centred / (alpha * std + eps)",
    ),
}


def planted(bug, folder):
    """triton_kernels with a bug in it."""
    text, (old, new) = SOURCE.read_text(), BUGS[bug]
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {SOURCE.name}"
    path = folder / "triton_kernels.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_noticed(bug, tmp_path):
    """In a process of its own, which a wrong address may end."""
    paths = [str(ROOT), str(ROOT / "tests")]
    code = f"""
import pathlib, sys
sys.path[:0] = {paths}
import test_triton
test_triton.check_all({bug!r}, pathlib.Path({str(tmp_path)!r}))"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "about to check" in result.stdout, result.stderr
    # a crash counts, and a check that says so
    noticed = result.returncode < 0 or "AssertionError" in result.stderr
    assert noticed == (bug != "none"), result.stderr
    assert bug != "none" or result.returncode == 0, result.stderr


def check_all(bug, folder):
    m = planted(bug, folder)
    print("about to check", flush=True)
    check_rows(m)
    check_advantage(m)
    check_far(m, folder)


# ---------------------------------------------------------------------------- on a GPU


@gpu
@pytest.mark.parametrize("V", (1000, 49152, 151936, 262144))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", (5, 16))  # aligned rows are other machine code
def test_rows_compiled(V, dtype, gap):
    check_rows(triton_kernels, 6, V, 0, dtype, 0.7, "cuda", gap)


@gpu
@pytest.mark.parametrize("trained", (False, True))
def test_log_probs_on_the_gpu(monkeypatch, trained):
    """Under autocast, as in training: the kernels against torch on the same device."""
    g, out = torch.Generator().manual_seed(0), []
    h, W = torch.randn(700, 64, generator=g).cuda(), torch.randn(49152, 64, generator=g).cuda() / 8
    targets = torch.randint(len(W), (700,), generator=g).cuda()
    slopes = torch.randn(700, generator=g).cuda()
    for name in ("torch", "triton"):
        monkeypatch.setenv("DRIRL_KERNELS", name)
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_(trained)
        with torch.autocast("cuda", torch.bfloat16):
            logp = token_logprobs(a, b, targets, 0.5)
        logp.backward(slopes)
        out.append([logp.detach(), a.grad] + [b.grad] * trained)
    torch.testing.assert_close(*out, atol=2e-2, rtol=2e-2)


@gpu
@pytest.mark.parametrize("P, G", ((1, 1), (64, 8), (3, 33)))
def test_advantage_compiled(P, G):
    check_advantage(triton_kernels, P, G, device="cuda")


@gpu
def test_many_logits_on_the_gpu():
    """N * V beyond 2^31 through token_logprobs, forward and backward."""
    g = torch.Generator(device="cuda").manual_seed(0)
    h, W = (torch.randn(n, 64, generator=g, device="cuda") for n in (17000, 131072))
    h, W = h.requires_grad_(), W.requires_grad_()
    targets = torch.randint(len(W), (len(h),), generator=g, device="cuda")
    token_logprobs(h, W, targets).sum().backward()
    last, head = slice(-8, None), W.detach()
    x = h[last].detach().double().requires_grad_()
    want = (x @ head.double().T).log_softmax(-1).gather(1, targets[last, None])[:, 0]
    got = token_logprobs(h[last].detach(), head, targets[last]).double()
    torch.testing.assert_close(got, want.detach(), atol=1e-3, rtol=1e-4)  # TF32 may be on
    (dh,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(h.grad[last].double(), dh, atol=1e-2, rtol=1e-2)


@gpu
def test_more_than_65535_rows():
    """70,000 rows in one launch; 65,535 is the limit of a grid's second and third axis."""
    g = torch.Generator(device="cuda").manual_seed(0)
    z = torch.randn(70000, 33, generator=g, device="cuda")
    targets = torch.randint(33, (len(z),), generator=g, device="cuda")
    want = z.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got, _ = triton_kernels.rows(z, targets, 1.0)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
