"""LayerNorm + MLP + residual in Triton, and its gradients, against PyTorch in float64 and in the same dtype."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from cat_kernels.stem.kernels import mlp
from cat_kernels.stem.kernels.conv import middle_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.either
EPS = 1e-5
NAMES = ("ln_weight", "ln_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def inputs(R: int, c: int, h: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, parameters (matrices in ``dtype``, vectors in float32) and the gradient of the result."""
    generator = torch.Generator().manual_seed(R * 1000 + c)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (2 * normal(R, c) + 0.5).to(dtype)
    vectors = 1 + 0.3 * normal(c), 0.3 * normal(c), 0.3 * normal(h), 0.3 * normal(c)
    vectors = tuple(vector.to(dtype).float() for vector in vectors)  # so that PyTorch in `dtype` starts from the same
    matrices = (normal(h, c) * c**-0.5).to(dtype), (normal(c, h) * h**-0.5).to(dtype)
    parameters = [vectors[0], vectors[1], matrices[0], vectors[2], matrices[1], vectors[3]]
    return x.to(DEVICE), [p.to(DEVICE) for p in parameters], normal(R, c).to(dtype).to(DEVICE)


def eager(x: Tensor, parameters: list[Tensor], grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The result and all gradients from PyTorch in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters)]
    x, ln_weight, ln_bias, fc1, b1, fc2, b2 = leaves
    y = x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[1:], ln_weight, ln_bias, EPS), fc1, b1)), fc2, b2)
    grads = torch.autograd.grad(y, leaves, grad.to(dtype))
    return {"y": y.detach(), **dict(zip(("x", *NAMES), grads, strict=True))}


def kernels(x: Tensor, parameters: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    y = mlp.norm_mlp_residual(x, *parameters, EPS)
    dx, *grads = mlp.norm_mlp_backward(grad, x, *parameters[:-1], EPS)
    return {"y": y, "x": dx, **dict(zip(NAMES, grads, strict=True))}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows as NaN."""
    empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


SHAPES = [(19, 48, 80), (20, 32, 48), (5, 16, 16), (1, 80, 112)]


def check(R: int, c: int, h: int, dtype: torch.dtype, middle: bool = False) -> None:
    """``middle``: x as the stem has it, float16 where the rest is bfloat16."""
    x, parameters, grad = inputs(R, c, h, dtype)
    if middle:
        x = x.to(middle_dtype(dtype))
    before = [t.clone() for t in (x, *parameters, grad)]
    found = kernels(x, parameters, grad)
    exact = eager(x, parameters, grad, torch.float64)
    same = eager(x, parameters, grad, dtype)
    for name, value in found.items():
        assert value.shape == exact[name].shape
        assert value.dtype == (dtype if name in ("y", "x") else torch.float32)
        assert value.is_contiguous()
        scale = exact[name].abs().max().item()
        allowed = 2 * (same[name].double() - exact[name]).abs().max().item() + 4 * torch.finfo(dtype).eps * scale
        assert (value.double() - exact[name]).abs().max().item() <= allowed, name
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *parameters, grad), strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("R", "c", "h"), SHAPES)
def test_parity(R: int, c: int, h: int, dtype: torch.dtype) -> None:
    check(R, c, h, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("R", "c", "h"), SHAPES)
def test_parity_of_what_the_stem_runs(R: int, c: int, h: int) -> None:
    assert mlp.tiles.mlp(c, h, torch.bfloat16, mlp.tiles.Chip())
    check(R, c, h, torch.bfloat16, middle=True)


def test_several_tiles_of_rows() -> None:
    check(130, 32, 32, torch.bfloat16)


@pytest.mark.parametrize("in_place", [False, True])
def test_gelu_backward(in_place: bool) -> None:
    """Several tiles either way, none of them full."""
    generator = torch.Generator().manual_seed(0)
    pre, grad = (torch.randn(70, 100, generator=generator).to(DEVICE) for _ in range(2))
    leaf = pre.double().requires_grad_()
    expected = F.gelu(leaf)
    (dpre,) = torch.autograd.grad(expected, leaf, grad.double())
    found = mlp.gelu_backward(pre, grad, **({"hidden": pre, "dpre": grad} if in_place else {}))
    assert (found[0] is pre, found[1] is grad) == (in_place, in_place)
    for actual, exact in zip(found, (expected, dpre, dpre.sum(0)), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("dtype", "middle"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_a_slice_of_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, middle: bool) -> None:
    """Where no fused kernel has room and the scratch memory holds fewer rows than there are."""
    monkeypatch.setattr(mlp, "scratch", lambda device: 1)
    monkeypatch.setattr(mlp.tiles, "mlp", lambda *args: None)
    assert [rows.stop for rows in mlp._slices(300, 64, torch.device(DEVICE))] == [128, 256, 300]
    check(140, 32, 32, dtype, middle=middle)


@pytest.mark.parametrize(("gib", "slices"), [(24, 4), (48, 2), (80, 1), (141, 1)])
def test_slices_go_by_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch, gib: int, slices: int) -> None:
    """Not by what is free: all ranks and all steps do the same. Rows of 96 clips of the base model."""
    monkeypatch.setattr(mlp.tiles.Chip, "of", lambda device: mlp.tiles.Chip(90, memory=gib << 30))
    assert len(list(mlp._slices(96 * 4 * 102 * 16, 2 * 1024 * 2, torch.device("meta")))) == slices


def test_no_rows() -> None:
    x, parameters, grad = inputs(0, 32, 64, torch.bfloat16)
    found = kernels(x, parameters, grad)
    assert found.pop("y").shape == found.pop("x").shape == (0, 32)
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, torch.zeros_like(parameters[NAMES.index(name)], dtype=torch.float32)), name


def test_twice_the_same_bits() -> None:
    x, parameters, grad = inputs(20, 32, 32, torch.bfloat16)
    first, second = kernels(x, parameters, grad), kernels(x, parameters, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("c", range(16, 1040, 16))
def test_split_width_covers_every_column(c: int) -> None:
    HI, LO = mlp.tiles.split_width(c)
    assert 16 <= HI <= c <= HI + LO
    assert all(part & (part - 1) == 0 for part in (HI, LO))
    assert LO == 0 or LO >= 16


@pytest.mark.gpu
@pytest.mark.parametrize("c", [256, 384, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parity_at_base_width(c: int, dtype: torch.dtype) -> None:
    check(1000, c, 4 * c, dtype)


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_two_to_the_31(gpu_memory: Callable[[float], None]) -> None:
    """The last rows of a tensor of more than 2^31 elements, forward and dx."""
    gpu_memory(24 << 30)
    c, h = 384, 48
    R = 2**31 // c + 200
    _, parameters, _ = inputs(1, c, h, torch.bfloat16)
    x = torch.zeros(R, c, device=DEVICE, dtype=torch.bfloat16)
    tail, _, grad_tail = inputs(200, c, h, torch.bfloat16)
    x[-200:] = tail
    y = mlp.norm_mlp_residual(x, *parameters, EPS)[-200:]
    torch.testing.assert_close(y, mlp.norm_mlp_residual(tail, *parameters, EPS))
    grad = torch.zeros_like(x)
    grad[-200:] = grad_tail
    dx = mlp.norm_mlp_backward(grad, x, *parameters[:-1], EPS)[0][-200:]
    torch.testing.assert_close(dx, mlp.norm_mlp_backward(grad_tail, tail, *parameters[:-1], EPS)[0])
