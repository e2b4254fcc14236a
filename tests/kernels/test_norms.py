"""`residual_layer_norm` and `layer_norm_gelu` in Triton: what is special about them. Parity over all samples is
test_operators.py's part."""

import importlib

import pytest
import torch

from cat_kernels import layer_norm_gelu, residual_layer_norm
from cat_kernels.backends import BackendError
from cat_kernels.norm_gelu.spec import SPEC as NORM_GELU
from cat_kernels.residual_norm.spec import SPEC as RESIDUAL_NORM

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.either
both = pytest.mark.parametrize("spec", [RESIDUAL_NORM, NORM_GELU], ids=lambda s: s.name)


def sample(spec, name="plain"):
    return next(s for s in spec.samples(DEVICE, torch.float32) if s.name == name)


@both
def test_opcheck(spec):
    for name in ("plain", "plain, twice", "plain, without weight and bias"):
        for overload, arguments in spec.overload_calls(sample(spec, name)):
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(overload, arguments, {"backend": "triton"}, test_utils=checks)


@both
def test_what_the_kernels_do_not_take(spec):
    inputs = {name: t.double() for name, t in sample(spec).inputs.items()}
    with pytest.raises(BackendError, match=r"not torch.float64; use backend='torch' or 'auto'"):
        spec.operator(**inputs, backend="triton")
    second = next(name for name in inputs if name != "x")
    wide = {name: torch.ones(1, 8193, device=DEVICE) for name in ("x", second)}
    with pytest.raises(BackendError, match=r"up to a width of 8192, not 8193; use backend='torch' or 'auto'"):
        spec.operator(**wide, backend="triton")
    assert spec.operator(**wide)[0].shape == (1, 8193)


@both
def test_programs_go_through_many_rows(spec, monkeypatch):
    """Sums over all turns of all programs, in a fixed order."""
    kernels = importlib.import_module(f"cat_kernels.{spec.operator.__module__.split('.')[1]}.kernels")
    found = {}
    for programs in (1, 3, 1024):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        inputs = {name: t.detach().requires_grad_() for name, t in sample(spec, "odd").inputs.items()}
        monkeypatch.setattr(kernels, "config", lambda D: {"BLOCK_R": 2, "num_warps": 1})
        y, _ = spec.operator(**inputs, backend="triton")
        found[programs] = torch.autograd.grad(y, list(inputs.values()), y.detach().cos())
    for programs in (1, 3):
        for actual, expected in zip(found[programs], found[1024], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_one_gradient_is_one_tensor():
    """Of the sum's two inputs where their dtypes agree; of the decoder's residual where nothing is added to it."""
    x, branch = (torch.randn(3, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    y, low = residual_layer_norm(x, branch, backend="triton")
    assert low is y
    dx, dbranch = torch.autograd.grad(y, [x, branch], torch.randn_like(y))
    assert dx.data_ptr() == dbranch.data_ptr()
    y, low = layer_norm_gelu(x, branch, backend="triton")
    assert low is y
    grad = torch.randn_like(y)
    assert torch.autograd.grad(y, branch, grad)[0].data_ptr() == grad.data_ptr()


@both
@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_is_not_used(spec, used):
    wanted = sample(spec, "plain, twice")
    found = []
    for backend in ("triton", "torch"):
        inputs = {name: wanted.inputs[name].detach().requires_grad_() for name in wanted.differentiable}
        out = spec.operator(**inputs, low_dtype=torch.bfloat16, backend=backend)[used]
        found.append(torch.autograd.grad(out, list(inputs.values()), torch.linspace(-1, 1, 24).to(out).expand_as(out)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@both
def test_what_torch_runs_is_pytorchs_own(spec):
    """Bit for bit what is written without the operator, and no node of its own in the graph."""
    i = {name: t.detach().requires_grad_() for name, t in sample(spec).inputs.items()}
    leaves = list(i.values())
    norm, D = torch.nn.functional.layer_norm, (24,)
    if spec is RESIDUAL_NORM:
        expected = norm(i["x"] + i["branch"], D, i["weight"], i["bias"], 1e-6)
    else:
        expected = i["residual"] + torch.nn.functional.gelu(norm(i["x"], D, i["weight"], i["bias"], 1e-5))
    y, _ = spec.operator(**i, backend="torch")
    assert torch.equal(y, expected)
    assert type(y.grad_fn) is type(expected.grad_fn)
    grads = [torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
