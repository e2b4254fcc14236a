"""The stem's depthwise kernels against `torch.conv2d` on the gathered halos, in float64 and in the same dtype.

Without a GPU they run in Triton's interpreter.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from cat_kernels.stem.kernels import conv
from cat_kernels.stem.layout import block_order, block_places, halo_rows

if not torch.cuda.is_available() and not conv.triton.knobs.runtime.interpret:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

pytestmark = pytest.mark.either
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


class Case:
    """A halo of ``N`` clones that see ``K`` patches of a 4 x 3 grid, and every tensor the kernels take.

    ``factors`` are those of `layout.block_order`: p is their product. Without ``K``: some 20 to 130 rows.
    """

    def __init__(
        self,
        factors: tuple[int, ...],
        kk: int,
        c: int,
        dtype: torch.dtype,
        device: str,
        N: int = 2,
        K: int | None = None,
    ) -> None:
        grid = (4, 3)
        K = K or max(1, min(11, 20 // math.prod(factors) ** 2))
        chances = torch.rand(N, grid[0] * grid[1], generator=torch.Generator().manual_seed(1))
        visible = chances.argsort(1)[:, :K]  # in no order
        self.factors, self.places = factors, block_places(factors, torch.device(device)).int()
        rows = N * K * self.places.numel()
        halo = halo_rows(visible, grid, factors, kk // 2)
        self.halo = torch.where(halo == rows, -1, halo).int().to(device)
        self.kk, self.dtype = kk, dtype

        def tensor(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return drawn(*shape, seed=seed, scale=scale).to(device, dtype)

        self.x, self.y = tensor(rows, c, seed=2), tensor(rows, c, seed=3)
        self.grad = tensor(rows, c, seed=4)
        self.dw_weight = tensor(c, kk * kk, seed=5, scale=1 / kk, dtype=torch.float32)
        self.dw_bias, self.bias = (tensor(c, seed=seed, dtype=torch.float32) for seed in (6, 7))
        self.weight = tensor(c, c, seed=8, scale=c**-0.5)

    def depthwise(self, y: Tensor, dw_weight: Tensor, dw_bias: Tensor) -> Tensor:
        """The formula: halos gathered (a row of zeros for -1), convolved without padding, back in block order."""
        side = round(self.halo.shape[1] ** 0.5)
        window = F.pad(y, (0, 0, 0, 1))[self.halo.long()].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        out = F.conv2d(window, dw_weight.unflatten(1, (self.kk, self.kk)).unsqueeze(1), dw_bias, groups=y.shape[1])
        return out.flatten(2).transpose(1, 2)[:, block_order(self.factors, self.places.device)].flatten(0, 1)

    def linear(self, dtype: torch.dtype) -> Tensor:
        return self.x.to(dtype) + F.linear(self.plain(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def plain(self, dtype: torch.dtype) -> Tensor:
        return self.depthwise(self.y.to(dtype), self.dw_weight.to(dtype), self.dw_bias.to(dtype))

    def gradients(self, dtype: torch.dtype) -> list[Tensor]:
        """Of y, of the weight and of the bias, by autograd."""
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (self.y, self.dw_weight, self.dw_bias)]
        return list(torch.autograd.grad(self.depthwise(*inputs), inputs, self.grad.to(dtype)))


def assert_close(found: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    """At most twice eager PyTorch's error in the same dtype, and 4 units in the last place of the largest value."""
    assert found.shape == exact.shape
    limit = 2 * (eager.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    error = (found.double() - exact).abs().max()
    assert error <= limit, f"error {error:.3g}, allowed {limit:.3g}"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that a kernel is given to write starts as NaN: an element left out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned(device: str) -> None:
    like = torch.zeros(4, device=device)
    assert torch.empty_like(like).isnan().all()
    assert like.new_empty(2, 3).isnan().all()


# (factors, kernel size, c): p = 4, 2, 1, 3, 6 and 8, in groups of 4, 2, 1, 1, 2 and 4; widths below, at and beyond
# a chunk; every kernel size. The rows do not fill the last tile.
SHAPES = [
    ((2, 2), 5, 48),
    ((2,), 5, 80),
    ((), 11, 32),
    ((3,), 7, 16),
    ((2, 3), 1, 16),
    ((2, 2, 2), 3, 16),
]
CASES = [(*SHAPES[0], dtype) for dtype in DTYPES] + [(*shape, DTYPES[i % 2]) for i, shape in enumerate(SHAPES[1:])]
# Float32 products are PyTorch's.
FUSED_CASES = [(*SHAPES[0], dtype) for dtype in DTYPES] + [(*shape, torch.bfloat16) for shape in SHAPES[1:]]


@pytest.mark.parametrize(("factors", "kk", "c", "dtype"), FUSED_CASES)
def test_conv_linear_residual(factors: tuple[int, ...], kk: int, c: int, dtype: torch.dtype, device: str) -> None:
    case = Case(factors, kk, c, dtype, device)
    tensors = (case.x, case.y, case.halo, case.places, case.dw_weight, case.dw_bias, case.weight, case.bias)
    before = [tensor.clone() for tensor in tensors]
    found = conv.conv_linear_residual(*tensors)
    assert found.dtype == conv.middle_dtype(dtype)
    assert_close(found, case.linear(torch.float64), case.linear(dtype), dtype)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_a_middle_beyond_float16(fused: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bfloat16 rows may hold and float16 ones not is the largest there; what is no number stays none."""
    if not fused:
        monkeypatch.setattr(conv.tiles, "conv_linear", lambda *args: None)
    case = Case((2,), 1, 16, torch.bfloat16, device)
    case.x[:3, 0] = torch.tensor([1e6, -1e6, math.nan], device=device, dtype=torch.bfloat16)
    tensors = (case.x, case.y, case.halo, case.places, case.dw_weight, case.dw_bias, case.weight, case.bias)
    found = conv.conv_linear_residual(*tensors)
    assert found.dtype == torch.float16
    assert found[:2, 0].tolist() == [65504, -65504]
    assert found.isnan().nonzero().tolist() == [[2, 0]]


@pytest.mark.parametrize(("factors", "kk", "c", "dtype"), CASES)
def test_depthwise(factors: tuple[int, ...], kk: int, c: int, dtype: torch.dtype, device: str) -> None:
    case = Case(factors, kk, c, dtype, device)
    found = conv.depthwise(case.y, case.halo, case.places, case.dw_weight, case.dw_bias)
    assert found.dtype == dtype
    assert_close(found, case.plain(torch.float64), case.plain(dtype), dtype)


@pytest.mark.parametrize(("factors", "kk", "c", "dtype"), CASES)
def test_gradients(factors: tuple[int, ...], kk: int, c: int, dtype: torch.dtype, device: str) -> None:
    """Of y by the transposed kernel, of weight and bias by theirs, against autograd."""
    case = Case(factors, kk, c, dtype, device)
    dy = conv.depthwise(case.grad, case.halo, case.places, case.dw_weight, None, transpose=True)
    dweight, dbias = conv.depthwise_backward_weight(case.grad, case.y, case.halo, case.places, kk)
    assert (dweight.dtype, dbias.dtype) == (torch.float32, torch.float32)
    for found, exact, eager in zip(
        (dy, dweight, dbias), case.gradients(torch.float64), case.gradients(dtype), strict=True
    ):
        assert_close(found, exact, eager, dtype)


def test_weight_gradient_of_few_shares(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that owns several tiles of rows sums over them; the same twice, to the bit."""
    case = Case((2, 2), 5, 16, torch.float32, device, N=3, K=3)
    monkeypatch.setattr(conv, "SHARES", 2)
    runs = [conv.depthwise_backward_weight(case.grad, case.y, case.halo, case.places, 5) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    exact, eager = case.gradients(torch.float64)[1:], case.gradients(torch.float32)[1:]
    for found, double, single in zip(runs[0], exact, eager, strict=True):
        assert_close(found, double, single, torch.float32)


@pytest.mark.parametrize("K", [1, 12])
def test_one_patch_and_all(K: int, device: str) -> None:
    case = Case((2, 2), 5, 16, torch.float32, device, N=1, K=K)
    tensors = (case.x, case.y, case.halo, case.places, case.dw_weight, case.dw_bias, case.weight, case.bias)
    found = conv.conv_linear_residual(*tensors)
    assert_close(found, case.linear(torch.float64), case.linear(torch.float32), torch.float32)


def test_a_masked_neighbour_is_not_read(device: str) -> None:
    """Not even as 0 * NaN: rows that no halo names may hold anything."""
    case = Case((2, 2), 5, 16, torch.float32, device, N=1, K=12)
    case.halo[case.halo >= 5 * 16] = -1
    found = conv.depthwise(case.y, case.halo, case.places, case.dw_weight, case.dw_bias)
    case.y[5 * 16 :] = float("nan")
    assert torch.equal(conv.depthwise(case.y, case.halo, case.places, case.dw_weight, case.dw_bias), found)


def test_no_rows(device: str) -> None:
    case = Case((2,), 5, 32, torch.float32, device)
    x, halo = case.x[:0], case.halo[:0]
    weights = (case.dw_weight, case.dw_bias, case.weight, case.bias)
    assert conv.conv_linear_residual(x, x, halo, case.places, *weights).shape == (0, 32)
    assert conv.depthwise(x, halo, case.places, case.dw_weight, None).shape == (0, 32)
    dweight, dbias = conv.depthwise_backward_weight(x, x, halo, case.places, 5)
    assert torch.equal(dweight, torch.zeros_like(case.dw_weight))
    assert torch.equal(dbias, torch.zeros_like(case.dw_bias))


def test_halo_that_does_not_fit(device: str) -> None:
    case = Case((2,), 5, 16, torch.float32, device)
    with pytest.raises(ValueError, match="kk = 3"):
        conv.depthwise_backward_weight(case.grad, case.y, case.halo, case.places, 3)


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_two_to_the_31(device: str, gpu_memory: Callable[[float], None]) -> None:
    """Copies of a small case one after the other: the last one, beyond 2^31 elements, gives what the first gives."""
    gpu_memory(24 << 30)
    case = Case((2, 2), 5, 256, torch.bfloat16, device, K=8)
    rows = case.y.shape[0]
    copies = 2**31 // case.y.numel() + 1
    first = torch.arange(copies, dtype=torch.int32, device=device)[:, None, None] * rows
    halo = torch.where(case.halo < 0, -1, case.halo + first).flatten(0, 1)
    x, y = case.x.repeat(copies, 1), case.y.repeat(copies, 1)
    taps, last = (case.dw_weight, case.dw_bias), (case.weight, case.bias)
    small = conv.depthwise(case.y, case.halo, case.places, *taps)
    assert torch.equal(conv.depthwise(y, halo, case.places, *taps)[-rows:], small)
    small = conv.conv_linear_residual(case.x, case.y, case.halo, case.places, *taps, *last)
    assert torch.equal(conv.conv_linear_residual(x, y, halo, case.places, *taps, *last)[-rows:], small)
