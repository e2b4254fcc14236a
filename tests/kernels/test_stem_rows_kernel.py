"""The LayerNorm and LayerNorm + linear kernels, in the interpreter or on a GPU, by the tolerance rule."""

import pytest
import torch
import torch.nn.functional as F

from cat_kernels.spec import error_bound, max_error

pytest.importorskip("triton")
from cat_kernels.stem.kernels.linear import norm_linear
from cat_kernels.stem.kernels.rows import layer_norm, layer_norm_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.either
SHAPES = [(50, 48, 48), (1, 16, 32), (130, 80, 144), (0, 32, 32)]
EPS = 1e-5


def noise(*shape, seed=0, dtype=torch.float32, scale=1.0, shift=0.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return (values * scale + shift).to(DEVICE, dtype)


def check(actual, eager, exact, what):
    assert actual.shape == exact.shape, what
    assert max_error(actual, exact) <= error_bound(eager, exact, actual.dtype), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("R", "c", "n"), SHAPES)
def test_layer_norm_and_linear(R, c, n, dtype):
    x, weight = noise(R, c, dtype=dtype, shift=0.5), noise(n, c, seed=1, dtype=dtype, scale=c**-0.5)
    g, b, bias = noise(c, seed=2, scale=0.1, shift=1), noise(c, seed=3, scale=0.1), noise(n, seed=4, scale=0.1)
    exact = F.layer_norm(x.double(), (c,), g.double(), b.double(), EPS)
    eager = F.layer_norm(x, (c,), g.to(dtype), b.to(dtype), EPS)
    check(layer_norm(x, g, b, EPS), eager, exact, "layer_norm")
    exact = F.linear(exact, weight.double(), bias.double())
    eager = F.linear(eager, weight, bias.to(dtype))
    check(norm_linear(x, g, b, weight, bias, EPS), eager, exact, "norm_linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("R", "c", "_n"), SHAPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_layer_norm_backward(R, c, _n, dtype, with_residual):
    x, grad = noise(R, c, dtype=dtype, shift=0.5), noise(R, c, seed=1, dtype=dtype)
    weight, residual = noise(c, seed=2, scale=0.1, shift=1), noise(R, c, seed=3, dtype=dtype)
    given = residual if with_residual else None

    def formula(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, torch.zeros_like(weight))]
        y = F.layer_norm(leaves[0], (c,), leaves[1], leaves[2], EPS)
        dx, dweight, dbias = torch.autograd.grad(y, leaves, grad.to(dtype))
        return (
            (dx + residual.to(dtype), dweight, dbias, residual.to(dtype).sum(0))
            if with_residual
            else (dx, dweight, dbias)
        )

    out = torch.full_like(x, torch.nan)
    dx, sums = layer_norm_backward(grad, x, weight, EPS, given, out)
    assert dx is out
    assert sums.dtype == torch.float32
    names = ("dx", "dweight", "dbias", "dresidual")[: 4 if with_residual else 3]
    for a, eager, exact, name in zip((dx, *sums), formula(dtype), formula(torch.float64), names, strict=True):
        check(a, eager, exact, name)


def test_more_rows_than_programs():
    """Each program of the backward has several tiles."""
    from cat_kernels.stem.kernels import rows

    x, grad, weight = noise(300, 16), noise(300, 16, seed=1), noise(16, seed=2)
    expected = layer_norm_backward(grad, x, weight, EPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PROGRAMS", 1)
        patch.setattr(rows.tiles, "layer_norm", lambda c: {"BLOCK_R": 32, "num_warps": 4, "num_stages": 2})
        for a, e in zip(layer_norm_backward(grad, x, weight, EPS), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_offsets_do_not_cost_digits():
    """A mean a thousand times the deviation."""
    x = noise(40, 48, shift=1000.0)
    ones, zeros = torch.ones(48, device=DEVICE), torch.zeros(48, device=DEVICE)
    torch.testing.assert_close(
        layer_norm(x, ones, zeros, EPS).double(), F.layer_norm(x.double(), (48,)), rtol=0, atol=2e-3
    )


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_two_to_the_31(gpu_memory):
    """The last rows of a tensor of more than 2^31 elements, forward and backward."""
    gpu_memory(24 << 30)
    c, n, tail = 256, 16, 200
    R = 2**31 // c + tail
    x = torch.zeros(R, c, device=DEVICE, dtype=torch.bfloat16)
    x[-tail:] = noise(tail, c, dtype=torch.bfloat16)
    g, b, bias = noise(c, seed=2), noise(c, seed=3), noise(n, seed=4)
    weight = noise(n, c, seed=1, dtype=torch.bfloat16)
    assert torch.equal(layer_norm(x, g, b, EPS)[-tail:], layer_norm(x[-tail:], g, b, EPS))
    torch.testing.assert_close(
        norm_linear(x, g, b, weight, bias, EPS)[-tail:], norm_linear(x[-tail:], g, b, weight, bias, EPS)
    )
    dx, _ = layer_norm_backward(x, x, g, EPS, x)
    assert torch.equal(dx[-tail:], layer_norm_backward(x[-tail:], x[-tail:], g, EPS, x[-tail:])[0])
