"""masked_regression_loss beyond its specification: what is kept, what backward may overwrite, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from cat_kernels import backends, masked_regression_loss
from cat_kernels.loss.spec import SPEC

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [
    name
    for name in backends.OPERATORS["masked_regression_loss"]
    if backends.why_not("masked_regression_loss", name, DEVICE.type) is None
]
pytestmark = pytest.mark.either
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(dtype=torch.float32, B=2, M=2, L=12, K=5, D=8):
    g = torch.Generator().manual_seed(0)
    prediction = torch.randn(B * M, L, D, generator=g).to(DEVICE, dtype).requires_grad_()
    target = torch.randn(B, L, D, generator=g).to(DEVICE)
    visible = torch.rand(B * M, L, generator=g).argsort(1)[:, :K].to(DEVICE)
    return prediction, target, visible


def saved_shapes(function):
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        result = function()
    return result, shapes


@every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_it_is_torchs_loss_of_the_masked_tokens(backend, beta):
    prediction, target, visible = make()
    mask = torch.ones(4, 12, dtype=torch.bool, device=DEVICE).scatter(1, visible, False)
    p, y = prediction[mask], target.repeat_interleave(2, 0)[mask]
    loss = F.smooth_l1_loss(p, y, beta=beta, reduction="sum") if beta else F.mse_loss(p, y, reduction="sum")
    result = masked_regression_loss(prediction, target, visible, beta=beta, backend=backend)
    torch.testing.assert_close(result.loss, loss / (len(p) * 8**0.5))
    torch.testing.assert_close(result.prediction_std, (p.detach().var(0) + 1e-6).sqrt().mean())
    torch.testing.assert_close(result.target_std, (y.var(0) + 1e-6).sqrt().mean())
    assert [t.requires_grad for t in result] == [True, False, False]


@every_backend
def test_only_the_gradient_is_kept_for_backward(backend):
    prediction, target, visible = make()
    _, shapes = saved_shapes(lambda: masked_regression_loss(prediction, target, visible, backend=backend))
    assert sorted(shapes) == [(), (4, 12, 8)]


@every_backend
def test_no_gradient_is_made_where_none_is_asked_for(backend, monkeypatch):
    made = []
    op = torch.ops.cat_kernels.masked_regression_loss

    def spy(*args, **kwargs):
        made.append(args[-1])
        return op(*args, **kwargs)

    monkeypatch.setattr(torch.ops.cat_kernels, "masked_regression_loss", spy)
    prediction, target, visible = make()
    for inputs in ((prediction, target), (prediction.detach(), target), (prediction.detach(), target.requires_grad_())):
        masked_regression_loss(*inputs, visible, backend=backend)
    with torch.no_grad():
        masked_regression_loss(prediction, target, visible, backend=backend)
    masked_regression_loss(prediction.half(), target, visible, backend=backend)
    assert made == [True, False, False, False, False]
    *_, gradient = op(prediction, target, visible, 0.0, "mean", False, backend=backend)
    assert gradient.numel() == 0


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backward_pass_scales_anew(backend, dtype):
    """The last one may overwrite what was kept; those before, and what they returned, must not notice."""
    prediction, target, visible = make(dtype)
    loss = masked_regression_loss(prediction, target, visible, backend=backend).loss
    (one,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    factors = (4.0, 0.0, 0.5, 1.0, 8.0)  # powers of two: no rounding
    found = []
    for i, factor in enumerate(factors):
        grad = torch.tensor(factor, device=DEVICE)
        found += torch.autograd.grad(loss, prediction, grad, retain_graph=i < len(factors) - 1)
    for factor, gradient in zip(factors, found, strict=True):
        torch.testing.assert_close(gradient, one * factor, rtol=0, atol=5e-7 if dtype == torch.float16 else 0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, prediction)


@every_backend
def test_accumulated_gradients(backend):
    """loss.backward() twice, as gradients are accumulated: .grad must not share memory with what is overwritten."""
    prediction, target, visible = make()
    loss = masked_regression_loss(prediction, target, visible, backend=backend).loss
    loss.backward(retain_graph=True)
    once = prediction.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(prediction.grad, 4 * once)


@every_backend
@pytest.mark.parametrize("linear", [True, False], ids=["of the loss", "of its square"])
def test_a_second_derivative_is_refused(backend, linear):
    """Also where another path leads to the input: a part of it must not be missing silently."""
    x, target, visible = make()
    loss = masked_regression_loss(x.square(), target, visible, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss if linear else loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.autograd.grad(gradient.sum(), x)


@every_backend
def test_float16_gradients_are_scaled_before_they_are_rounded(backend):
    """The mean's factor, 1 / (N * (L - K) * sqrt(D)), takes them below float16's smallest number."""
    prediction, target, visible = make(torch.float16)
    with torch.no_grad():
        prediction.mul_(1e-4)
    loss = masked_regression_loss(prediction, torch.zeros_like(target), visible, backend=backend).loss
    (gradient,) = torch.autograd.grad(2.0**16 * loss, prediction)
    expected = 2.0**17 * prediction.detach().double() / (4 * 7 * 8**0.5)
    expected.scatter_(1, visible[..., None].expand(-1, -1, 8), 0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-7)


@every_backend
def test_deviations_of_channels_far_from_zero(backend):
    """sqrt(E[x^2] - E[x]^2) would give nothing of a deviation of 1 at 10 000."""
    prediction, target, visible = make(B=3, L=40, K=8, D=20)
    shifted = prediction.detach() + 1e4 * torch.arange(20, device=DEVICE)
    exact = SPEC.reference(shifted.double(), target.double(), visible)
    result = masked_regression_loss(shifted, target, visible, backend=backend)
    torch.testing.assert_close(result.prediction_std.double(), exact.prediction_std, rtol=1e-4, atol=0)


@every_backend
def test_deviations_of_the_only_masked_tokens_far_from_zero(backend):
    """Of targets as well, and where nothing is to be counted at most patches."""
    prediction, target, visible = make(B=3, L=40, K=39, D=20)
    far = 1e4 * torch.arange(20, device=DEVICE)
    prediction, target = prediction.detach() + far, target - far
    exact = SPEC.reference(prediction.double(), target.double(), visible)
    result = masked_regression_loss(prediction, target, visible, backend=backend)
    torch.testing.assert_close(result.prediction_std.double(), exact.prediction_std, rtol=1e-4, atol=0)
    torch.testing.assert_close(result.target_std.double(), exact.target_std, rtol=1e-4, atol=0)


@every_backend
def test_the_same_bits_every_time(backend):
    inputs = make(B=2, M=3, L=300 if DEVICE.type == "cuda" else 40, K=20)
    runs = []
    for _ in range(2):
        result = masked_regression_loss(*inputs, backend=backend)
        runs.append((*result, *torch.autograd.grad(result.loss, inputs[0])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_of_many_programs(monkeypatch):
    """The parts of several programs, each with several rows, are merged."""
    kernels = pytest.importorskip("cat_kernels.loss.kernels")
    if "triton" not in BACKENDS:
        pytest.skip("Triton does not run here")
    monkeypatch.setattr(kernels, "programs", lambda device, smooth: 3)
    monkeypatch.setattr(kernels, "MERGED", 2)
    prediction, target, visible = make(B=3, M=2, L=50, K=20)
    result = masked_regression_loss(prediction, target, visible, backend="triton")
    for a, b in zip(result, SPEC.reference(prediction, target, visible), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [512, 700])
def test_a_gradient_of_several_programs_is_scaled(monkeypatch, size):
    """The last of them may have less to do."""
    kernels = pytest.importorskip("cat_kernels.loss.kernels")
    if "triton" not in BACKENDS:
        pytest.skip("Triton does not run here")
    monkeypatch.setattr(kernels, "SCALED", 256)
    gradient, grad = torch.arange(size, dtype=torch.float32, device=DEVICE), torch.tensor(3.0, device=DEVICE)
    out = torch.full_like(gradient, torch.nan)
    kernels.scale(gradient, grad, out)
    assert torch.equal(out, 3 * gradient)
    kernels.scale(gradient, grad, gradient)
    assert torch.equal(gradient, out)


def test_opcheck_of_the_kernels():
    if "triton" not in BACKENDS:
        pytest.skip("Triton does not run here")
    sample = next(SPEC.samples(DEVICE, torch.float32))
    for overload, arguments in SPEC.overload_calls(sample):
        torch.library.opcheck(overload, arguments, {"backend": "triton"}, test_utils=("test_schema", "test_faketensor"))


def test_float64_is_not_for_the_kernels():
    if "triton" not in BACKENDS:
        pytest.skip("Triton does not run here")
    prediction, target, visible = make(torch.float64)
    with pytest.raises(backends.BackendError, match="float64 input; use backend='torch' or 'auto'"):
        masked_regression_loss(prediction, target, visible, backend="triton")


def test_a_batch_of_incoming_gradients():
    """The saved gradient, which one backward may overwrite, serves each of them."""
    prediction, target = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 9, 8)
    visible = torch.tensor([[1, 2], [3, 4]])
    losses = [masked_regression_loss(prediction, target, visible).loss for _ in range(2)]
    (one,) = torch.autograd.grad(losses[0], prediction)
    (batch,) = torch.autograd.grad(losses[1], prediction, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(batch, torch.stack([one, 2 * one]))
