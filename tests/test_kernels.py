"""Log-probs against log_softmax in float64, group advantages against numbers by hand."""

from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import backend, group_advantage, token_logprobs

ROWS = 32  # of a chunk of float64 logits


@pytest.fixture(autouse=True)
def keep_chunks(monkeypatch):
    monkeypatch.setitem(kernels.CHUNK, "cpu", kernels.CHUNK["cpu"])  # problem() changes it


def problem(n, D=7, V=11, dtype=torch.float64, product_dtype=None):
    """h, W, targets and weights (n,); a chunk then holds ROWS rows."""
    kernels.CHUNK["cpu"] = ROWS * V * (product_dtype or dtype).itemsize
    g = torch.Generator().manual_seed(0)
    h, W = (torch.randn(k, D, generator=g, dtype=torch.float64).to(dtype) for k in (n, V))
    targets, weights = torch.randint(V, (n,), generator=g), torch.randn(n, generator=g)
    return h.requires_grad_(), W.requires_grad_(), targets, weights.double()


def direct(h, W, targets, temperature):
    return (h @ W.T / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("n", (1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 17))
@pytest.mark.parametrize("temperature", (1.0, 0.5, 1.7))
def test_values_and_gradients(n, temperature):
    h, W, targets, weights = problem(n)
    got, want = token_logprobs(h, W, targets, temperature), direct(h, W, targets, temperature)
    assert got.shape == (n,) and got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    ours, oracle = (torch.autograd.grad(x, (h, W), weights) for x in (got, want))
    torch.testing.assert_close(ours, oracle, atol=1e-11, rtol=1e-11)
    # another target is another number
    assert (got - direct(h, W, (targets + 1) % 11, temperature)).abs().max() > 0.1


@pytest.mark.parametrize("n, temperature", ((5, 1.0), (ROWS + 3, 0.5)))
def test_gradcheck(n, temperature):
    h, W, targets, _ = problem(n, D=2, V=4)
    score = lambda h, W: token_logprobs(h, W, targets, temperature)
    assert torch.autograd.gradcheck(score, (h, W))
    assert torch.autograd.gradcheck(lambda h: score(h, W.detach()), (h,))  # a frozen head


@pytest.mark.parametrize(
    "V, dtype, rows",
    (
        (49152, torch.float32, 160),
        (49152, torch.bfloat16, 336),
        (2**21, torch.float32, 4),
        (2**24, torch.float32, 1),
    ),
)
def test_rows_of_a_chunk(V, dtype, rows):
    _, z = next(kernels.chunks(torch.zeros(400, 1), torch.zeros(V, 1, dtype=dtype)))
    assert z.shape == (rows, V)


def test_only_one_gradient_wanted():
    h, W, targets, weights = problem(ROWS + 3)
    both = torch.autograd.grad(token_logprobs(h, W, targets), (h, W), weights)
    dh = torch.autograd.grad(token_logprobs(h, W.detach(), targets), h, weights)[0]
    dW = torch.autograd.grad(token_logprobs(h.detach(), W, targets), W, weights)[0]
    torch.testing.assert_close(dh, both[0], atol=1e-12, rtol=1e-12)
    assert torch.equal(dW, both[1])


def test_the_slope_of_a_loss_comes_from_autograd():
    """A loss that is not linear in logp, some of its slopes zero; both ways to the gradient."""
    h, W, targets, A = problem(ROWS + 3)
    loss = lambda logp: torch.minimum(logp.exp() * A, logp.exp().clamp(0.05, 0.2) * A).sum()
    want = torch.autograd.grad(loss(direct(h, W, targets, 0.7)), (h, W))
    got = torch.autograd.grad(loss(token_logprobs(h, W, targets, 0.7)), (h, W))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    (dh,) = torch.autograd.grad(loss(token_logprobs(h, W.detach(), targets, 0.7)), h)
    torch.testing.assert_close(dh, want[0], atol=1e-12, rtol=1e-12)
    assert 0 < (dh == 0).all(1).sum() < len(h)


def test_no_second_derivative():
    """The gradient is a constant to autograd, so a derivative of it must be an error."""
    h, W, targets, _ = problem(3)
    loss = token_logprobs(h, W.detach(), targets).pow(2).sum()
    (first,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_float32_far_from_zero():
    """Logits of some hundreds: the log-sum-exp must not overflow."""
    h, W, targets, _ = problem(ROWS + 3, dtype=torch.float32)
    got, want = (
        token_logprobs(h * 100, W, targets),
        direct(h.double() * 100, W.double(), targets, 1),
    )
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got.double(), want, atol=2e-3, rtol=1e-5)


def near(got, want):
    return (got.double() - want.double()).norm() < 0.02 * want.double().norm()


def test_bfloat16():
    """Products in bfloat16, the rest in float32; gradients come back in the inputs' dtype."""
    h, W, targets, weights = problem(ROWS + 3, dtype=torch.bfloat16)
    got, want = token_logprobs(h, W, targets, 0.5), direct(h.double(), W.double(), targets, 0.5)
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.1
    ours = torch.autograd.grad(got, (h, W), weights.float())
    oracle = torch.autograd.grad(want, (h, W), weights)
    frozen = torch.autograd.grad(token_logprobs(h, W.detach(), targets, 0.5), h, weights.float())
    for a, b in zip((*ours, *frozen), (*oracle, oracle[0])):
        assert a.dtype == torch.bfloat16 and near(a, b)


def test_autocast():
    """Products run in bfloat16; float32 weights still get float32 gradients."""
    h, W, targets, weights = problem(ROWS + 3, dtype=torch.float32, product_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(h, W, targets)
    want = direct(h, W, targets, 1.0)
    assert got.dtype == torch.float32 and 0 < (got - want).abs().max() < 0.1
    ours, oracle = (torch.autograd.grad(x, (h, W), weights.float()) for x in (got, want))
    for a, b in zip(ours, oracle):
        assert a.dtype == torch.float32 and near(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_no_tokens(dtype):
    h, W, targets, _ = problem(0, dtype=dtype)
    got = token_logprobs(h, W, targets)
    assert got.shape == (0,)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    got.sum().backward()


def test_half_precision():
    """float16 is no error; its logits are rounded, the rest is in float32."""
    h, W, t, _ = problem(4)
    got = token_logprobs(h.half(), W.half(), t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, token_logprobs(h, W, t).float(), atol=0.02, rtol=0.01)


def test_logprob_errors():
    h, W, t, _ = problem(4)
    shapes = ((h[0], W, t), (h[:, :3], W, t), (h, W, t[:3]), (h, W[0], t), (h, W, t[:, None]))
    for bad in shapes:
        with pytest.raises(ValueError, match=r"want \(N, D\), \(V, D\), \(N,\)"):
            token_logprobs(*bad)
    with pytest.raises(ValueError, match="want one device"):
        token_logprobs(h, W, t.to("meta"))
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_logprobs(h, W, t, temperature)


def test_one_rule_chooses_the_backend(monkeypatch):
    x = torch.zeros(1)
    assert backend(x).__name__ == "kernels.reference"
    on_gpu = lambda dtype: backend(SimpleNamespace(is_cuda=True, dtype=dtype)).__name__
    for dtype in (torch.float32, torch.bfloat16):
        assert on_gpu(dtype) == "kernels.triton_kernels"
    for dtype in (torch.float64, torch.float16):  # the kernel of rows takes neither
        assert on_gpu(dtype) == "kernels.reference"
    monkeypatch.setenv("DRIRL_KERNELS", "triton")
    assert backend(x).__name__ == "kernels.triton_kernels"
    monkeypatch.setenv("DRIRL_KERNELS", "cuda")
    with pytest.raises(ValueError, match="want triton or torch"):
        backend(x)


# ---------------------------------------------------------------------------- group advantage


def test_hand_numbers():
    """Rewards 1 2 3 6: mean 3, population variance 14 / 4 (the sample's would be 14 / 3)."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 4.0]], dtype=torch.double)
    centred = torch.tensor([[-2.0, -1.0, 0.0, 3.0], [-1.0, -1.0, -1.0, 3.0]], dtype=torch.double)
    std = torch.tensor([[3.5**0.5], [3**0.5]], dtype=torch.double)
    torch.testing.assert_close(group_advantage(rewards, eps=0.5), centred / (std + 0.5))


@pytest.mark.parametrize("value", (0.0, 0.1, -1 / 3, 1e6 + 0.3, 1e-8))
@pytest.mark.parametrize("size", (1, 3, 7, 8))
def test_equal_rewards_give_exactly_zero(value, size):
    """Also where their mean rounds to another number, and with eps 0; other groups stay."""
    rewards = torch.stack((torch.full((size,), value), torch.arange(size).float()))
    before = rewards.clone()
    for eps in (1e-12, 0.0):
        got = group_advantage(rewards, eps=eps)
        assert (got[0] == 0).all() and got.isfinite().all()
        assert size == 1 or (got[1] != 0).any()
    assert torch.equal(rewards, before)


def test_alpha_scales_and_rewards_do_not():
    """Scaling or shifting the rewards changes nothing, scaling alpha scales A."""
    g = torch.Generator().manual_seed(1)
    rewards = torch.randn(5, 6, generator=g, dtype=torch.double)
    plain = group_advantage(rewards, eps=0)
    assert plain.mean(1).abs().max() < 1e-12 and (plain.pow(2).mean(1) - 1).abs().max() < 1e-12
    torch.testing.assert_close(group_advantage(rewards * 7 + 2, eps=0), plain)
    for shape in ((), (5, 1), (5, 6)):
        alpha = torch.rand(shape, generator=g, dtype=torch.double)
        torch.testing.assert_close(group_advantage(rewards, alpha, eps=0), alpha * plain)


def test_advantage_errors():
    R = torch.zeros(2, 3)
    for bad in (torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"rewards must be \(P, G\)"):
            group_advantage(bad)
    for shape in ((2,), (1,), (1, 1), (3, 3), (1, 2, 3), (4, 2, 3)):
        with pytest.raises(ValueError, match="alpha must be a number"):
            group_advantage(R, torch.ones(shape))
    for bad in (float("nan"), torch.tensor([[1.0], [float("inf")]])):
        with pytest.raises(ValueError, match="alpha must be finite"):
            group_advantage(R, bad)
    with pytest.raises(ValueError, match="eps not negative; eps is -0.001"):
        group_advantage(R, 1.0, -1e-3)
    assert group_advantage(torch.zeros(0, 3)).shape == (0, 3)
