"""Sums over many rows: `_triton.product`, which gradients of weights go by."""

import pytest
import torch

pytest.importorskip("triton")

from cat_kernels._triton import product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.either


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 96, 5001])
def test_sums_are_float32_and_the_same_every_time(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(rows, width, generator=generator).to(DEVICE, dtype) for width in (16, 24))
    found = product(grad.t(), x)
    exact = grad.double().t() @ x.double()
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) <= 1e-6 * rows
    assert torch.equal(found, product(grad.t(), x))
