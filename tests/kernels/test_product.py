"""Sums over many rows, in slices: `_triton.product`, which gradients of weights go by."""

import pytest
import torch

pytest.importorskip("triton")

from cat_kernels import _triton
from cat_kernels._triton import Chip, product, row_slices

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.either
H200 = 132  # multiprocessors


@pytest.mark.parametrize(
    ("rows", "m", "n", "slices"),
    [
        (626_688, 256, 256, 64),  # 2 tiles, in 64 slices 128
        (65_536, 1024, 256, 16),  # 8 tiles
        (156_672, 384, 384, 20),  # 6 tiles: 120; in 32 slices, which divide the rows, they are 73 % of two rounds
        (39_552, 768, 768, 7),  # 18 tiles; nothing up to 14 divides the rows
        (39_168, 768, 4096, 4),  # 96 tiles: 384 in three rounds
        (39_168, 4096, 4096, 1),  # tiles enough
        (1_500, 256, 256, 1),  # too few rows
        (3_000, 256, 256, 2),
        (0, 256, 256, 1),
        (626_688, 0, 256, 1),
    ],
)
def test_slices_fill_a_gpu(rows, m, n, slices):
    assert row_slices(rows, m, n, H200) == slices


def test_slices_are_as_many_as_the_rule_says():
    generator = torch.Generator().manual_seed(0)
    for rows, m, n, chip in torch.randint(1, 2**20, (200, 4), generator=generator).tolist():
        m, n, chip = m % 3000 + 1, n % 3000 + 1, chip % 160 + 1
        slices = row_slices(rows, m, n, chip)
        assert 1 <= slices <= 128
        assert slices == 1 or rows // slices >= 1024
        tiles = -(-m // 128) * -(-n // 256)
        assert tiles < chip or slices == 1


def operands(rows, m, n, dtype):
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(rows, width, generator=generator).to(DEVICE, dtype) for width in (m, n))
    return grad, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "slices"), [(96, 4), (101, 4), (3, 4), (0, 4), (64, 1), (64, 64)])
def test_sums_in_slices_are_right_and_the_same_every_time(rows, slices, dtype):
    grad, x = operands(rows, 16, 24, dtype)
    total = torch.full((16, 24), 2.0, device=DEVICE)
    found = product(grad.t(), x, slices=slices)
    exact = grad.double().t() @ x.double()
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) <= 1e-6 * max(rows, 1) if rows else not found.any()
    assert torch.equal(found, product(grad.t(), x, slices=slices))
    assert product(grad.t(), x, total, slices=slices) is total
    torch.testing.assert_close(total, found + 2)


def test_slices_are_views(monkeypatch):
    """Of a gradient that comes transposed, too; and each is what the library takes without a copy."""
    grad, x = operands(101, 16, 24, torch.float32)
    given = []
    monkeypatch.setattr(torch, "bmm", lambda a, b: given.extend((a, b)) or a @ b)
    product(grad.t(), x, slices=4)
    a, b = given
    assert a.shape == (4, 16, 25)
    assert b.shape == (4, 25, 24)
    assert (a.data_ptr(), b.data_ptr()) == (grad.data_ptr(), x.data_ptr())
    assert (a.stride(), b.stride()) == ((25 * 16, 1, 16), (25 * 24, 24, 1))


def test_rows_are_cut_by_the_rule_on_a_gpu_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(_triton, "row_slices", lambda *sizes: asked.append(sizes) or 3)
    grad, x = operands(30, 16, 24, torch.float32)
    found = product(grad.t(), x)
    assert asked == ([(30, 16, 24, Chip.of(DEVICE).multiprocessors)] if DEVICE.type == "cuda" else [])
    torch.testing.assert_close(found, grad.t() @ x)
