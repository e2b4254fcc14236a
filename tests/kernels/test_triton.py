"""What every Triton kernel takes for granted, in the interpreter as on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from cat_kernels._triton import input_precision, launch

if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

pytestmark = pytest.mark.either


@triton.jit
def _copy(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    values = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    ends = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-9, torch.inf, -torch.inf, torch.nan]
    values[: len(ends)] = torch.tensor(ends)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.empty(1024, dtype=dtype, device=device)
    launch(_copy, (1,), values.to(device), found, N=1024)
    torch.testing.assert_close(found.cpu(), values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(found[:2]).tolist() == [False, True]


@pytest.mark.parametrize(
    ("setting", "value", "kept"),
    [
        ("fp32_precision", "none", "ieee"),
        ("fp32_precision", "ieee", "ieee"),
        ("fp32_precision", "tf32", "tf32"),
        ("allow_tf32", True, "tf32"),
    ],
)
def test_float32_products_keep_what_pytorchs_keep(setting, value, kept) -> None:
    """Said by either of PyTorch's settings. (allow_tf32 cannot be read where fp32_precision says tf32.)"""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        setattr(products, setting, value)
        assert input_precision(torch.float32) == kept
        assert input_precision(torch.bfloat16) == "ieee"
    finally:
        products.fp32_precision = before
