"""LayerNorm of the stem: PyTorch's results, and gradients of weight and bias that do not stand still in bf16."""

import pytest
import torch
from torch import nn

from cat_kernels import MultiResConv
from cat_kernels.stem import norm as stem_norm
from cat_kernels.stem.norm import LayerNorm

LOW = (torch.bfloat16, torch.float16)


def pair(shape, dtype, **options):
    """PyTorch's and ours, with the same weights."""
    torch.manual_seed(0)
    theirs, ours = nn.LayerNorm(shape, **options).to(dtype), LayerNorm(shape, **options).to(dtype)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def rows_of(count, shape, dtype):
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, *shape, generator=g).to(dtype).requires_grad_()


def gradients(layer, x, **options):
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return torch.autograd.grad(y, [p for p in (x, *layer.parameters()) if p.requires_grad], grad, **options)


def exact(layer, x):
    double = type(layer)(layer.normalized_shape, layer.eps, layer.elementwise_affine, layer.bias is not None).double()
    double.load_state_dict(layer.state_dict())
    y = double(wide := x.detach().double().requires_grad_())
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype).double()
    return torch.autograd.grad(y, [wide, *double.parameters()], grad)


def errors(found, expected):
    return [float((a.double() - e).abs().max() / e.abs().max()) for a, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_results_are_pytorchs(shape, options, dtype):
    theirs, ours = pair(shape, dtype, **options)
    for count in (0, 1, 300):
        x = rows_of(count, shape, dtype)
        for recording in (True, False):
            with torch.set_grad_enabled(recording):
                assert torch.equal(ours(x), theirs(x))
                assert ours(x).requires_grad == recording
        assert [g.dtype for g in gradients(ours, x)] == [g.dtype for g in gradients(theirs, x)]


@pytest.mark.parametrize("weights", ["as rows", "float32"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("pieces", [1 << 17, 100])
def test_sums_of_many_rows_are_rounded_once(pieces, dtype, weights, monkeypatch):
    monkeypatch.setattr(stem_norm, "PIECE_ELEMENTS", pieces)
    _, ours = pair((24,), dtype if weights == "as rows" else torch.float32)
    x = rows_of(10_000 if dtype == torch.float16 else 1_000, (24,), dtype)
    limit = torch.finfo(dtype).eps if weights == "as rows" else 1e-5
    dx, *sums = errors(gradients(ours, x), exact(ours, x))
    assert max(sums) <= limit
    assert dx <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_what_needs_no_gradient_gets_none(frozen):
    _, ours = pair((24,), torch.bfloat16)
    x = rows_of(50, (24,), torch.bfloat16)
    expected = dict(zip(("x", "weight", "bias"), gradients(ours, x), strict=True))
    for name in frozen:
        ours.get_parameter(name).requires_grad_(False)
    kept = [value for name, value in expected.items() if name not in frozen]
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours, x), kept, strict=True))
    assert ours(x.detach()).requires_grad == (len(frozen) == 1)


def test_rows_in_any_layout():
    _, ours = pair((24,), torch.bfloat16)
    x = rows_of(50, (24,), torch.bfloat16)
    y = ours(x.transpose(0, 1))
    (found,) = torch.autograd.grad(y, ours.weight, torch.ones(()).bfloat16().expand(y.shape))
    y = ours(x)
    (expected,) = torch.autograd.grad(y, ours.weight, torch.ones_like(y))
    torch.testing.assert_close(found, expected)


def test_derivatives_of_the_gradients():
    theirs, ours = pair((24,), torch.bfloat16)
    x = rows_of(20, (24,), torch.bfloat16)
    second = []
    for layer in (theirs, ours):
        first = gradients(layer, x, create_graph=True)
        second.append(torch.autograd.grad(sum(g.float().square().sum() for g in first), [x, layer.weight]))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def test_what_transforms_and_traces_sees_pytorchs_operations(monkeypatch):
    def refused(*args):
        raise AssertionError("gradients of our own, where they are not seen through")

    monkeypatch.setattr(stem_norm._SummedWide, "apply", refused)
    _, ours = pair((24,), torch.bfloat16)
    x = rows_of(20, (24,), torch.bfloat16)
    torch.jit.trace(ours, x.detach())
    torch.func.grad(lambda x: ours(x).float().sum())(x)
    torch.func.jvp(ours, (x.detach(),), (x.detach(),))
    torch.export.export(ours, (x,))
    with pytest.raises(AssertionError, match="of our own"):
        ours(x)


def test_the_stem_in_training():
    """Of 2,048 positions: the gradients of the norms are as good as those of the products beside them."""
    torch.manual_seed(0)
    low = MultiResConv((4, 8), (16,), 32, backend="visible")
    spec = torch.randn(8, 1, 64, 64)
    grads = []
    for dtype, enabled in ((torch.float64, False), (torch.float32, True)):
        stem = MultiResConv((4, 8), (16,), 32, backend="visible").to(dtype)
        stem.load_state_dict(low.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            tokens = stem(spec.to(dtype))
        grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
        tokens.backward(grad.to(tokens.dtype))
        grads.append({name: p.grad.double() for name, p in stem.named_parameters()})
    exact, found = grads
    error = {name: float((found[name] - g).norm() / g.norm()) for name, g in exact.items()}
    assert max(error.values()) < 0.015, error
