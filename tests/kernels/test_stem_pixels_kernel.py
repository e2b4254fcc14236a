"""Kernels of the stem's first embedding against `layout.patchify`, a linear layer and LayerNorm.

On CPU tensors in Triton's interpreter, on a GPU where there is one.
"""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from cat_kernels.stem.kernels import pixels as kernel
from cat_kernels.stem.layout import patchify
from cat_kernels.stem.spec import draw_visible

pytestmark = pytest.mark.either
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Resolutions, width and channels, patch grid, visible patches: the first embedding of every stem, narrower.
SHAPES = {
    "4-8-16": ((4, 8, 16), 48, 1, (2, 2), 3),
    "16": ((16,), 16, 1, (3, 2), 5),
    "4-8": ((4, 8), 32, 1, (2, 4), 5),
    "8-16": ((8, 16), 16, 1, (2, 2), 3),
    "2-4-8-16": ((2, 4, 8, 16), 16, 1, (2, 1), 1),
    "4-8-16-32": ((4, 8, 16, 32), 16, 1, (1, 2), 1),
    "3-6": ((3, 6), 36, 1, (3, 2), 4),
    "two channels": ((4, 16), 16, 2, (2, 2), 3),
    "8, two channels": ((8,), 20, 2, (3, 2), 4),
}


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that is asked for uninitialised holds NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        fresh = new_empty(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def problem(device, dtype, resolutions, c, C, grid, K, B=2, M=2):
    """spec, visible, (weight, bias, ln_weight, ln_bias), gradient of the result."""
    g = torch.Generator().manual_seed(0)
    P, r0 = resolutions[-1], resolutions[0]

    def randn(*shape, scale=1.0, shift=0.0, dtype=dtype):
        return (torch.randn(*shape, generator=g) * scale + shift).to(device, dtype)

    spec = randn(B, C, grid[0] * P, grid[1] * P)
    visible = draw_visible(B * M, grid[0] * grid[1], K, g, device)
    inner = r0 * r0 * C
    vectors = (randn(c, scale=0.3), randn(c, scale=0.3, shift=1.0), randn(c, scale=0.3))
    return spec, visible, (randn(c, inner, scale=inner**-0.5), *vectors), randn(B * M * K * (P // r0) ** 2, c)


def reference(spec, visible, weights, grad, resolutions):
    """y, dweight, dbias, dln_weight, dln_bias, dpixels by PyTorch, in the inputs' dtype."""
    weights = [w.clone().requires_grad_() for w in weights]
    pixels = patchify(spec, resolutions)
    if visible is not None:
        clip = torch.arange(visible.shape[0], device=spec.device) // (visible.shape[0] // spec.shape[0])
        pixels = pixels[clip[:, None], visible]
    pixels = pixels.flatten(0, -2).requires_grad_()
    pre = F.linear(pixels, *weights[:2])
    y = F.layer_norm(pre, pre.shape[1:], *weights[2:], EPS)
    return y.detach(), *torch.autograd.grad(y, [*weights, pixels], grad)


def run(spec, visible, weights, grad, resolutions, need_pixels=True):
    y = kernel.embed_pixels(spec, visible, *weights, resolutions, EPS)
    weight, bias, ln_weight, _ = weights
    return y, *kernel.embed_pixels_backward(grad, spec, visible, weight, bias, ln_weight, resolutions, EPS, need_pixels)


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def check(spec, visible, weights, grad, resolutions):
    """err(kernel) <= 2 err(PyTorch in the same dtype) + 4 eps(dtype) scale, and inputs as they were."""
    tensors = [spec, grad, *weights]
    before = [t.clone() for t in tensors]
    actual = run(spec, visible, weights, grad, resolutions)
    eager = reference(spec, visible, weights, grad, resolutions)
    expected = reference(*double(spec, visible), double(*weights), grad.double(), resolutions)
    dtypes = [spec.dtype, *[torch.float32] * 4, spec.dtype]
    names = ("y", "dweight", "dbias", "dln_weight", "dln_bias", "dpixels")
    for name, got, low, exact, dtype in zip(names, actual, eager, expected, dtypes, strict=True):
        assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, exact.shape, True), name
        error = (got.double() - exact).abs().max()
        allowed = 2 * (low.double() - exact).abs().max() + 4 * torch.finfo(spec.dtype).eps * exact.abs().max()
        assert error <= allowed, f"{name}: {error} > {allowed}"
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_embedding_of_every_stem(device, shape):
    resolutions, *sizes = SHAPES[shape]
    check(*problem(device, torch.float32, resolutions, *sizes), resolutions)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", ["4-8-16", "16", "two channels"])
def test_low_precision(device, dtype, shape):
    resolutions, *sizes = SHAPES[shape]
    check(*problem(device, dtype, resolutions, *sizes), resolutions)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("resolutions", "c", "K"), [((8,), 592, 3), ((4, 8), 528, 2), ((8, 16), 272, 1)])
def test_rows_in_pieces(device, dtype, resolutions, c, K):
    """More than 512 channels, or a gradient of the weight larger than a tile, with a last piece that is not full."""
    spec, visible, weights, grad = problem(device, dtype, resolutions, c, 1, (3, 1), K, M=1)
    # Pieces of very different means.
    weights[1][-100:] += 3
    check(spec, visible, weights, grad, resolutions)


@pytest.mark.parametrize("K", [1, 6])
@pytest.mark.parametrize("M", [1, 3])
def test_one_patch_visible_and_all(device, K, M):
    spec, visible, weights, _ = problem(device, torch.float32, (4, 16), 16, 1, (3, 2), K, M=M)
    order = torch.randperm(visible.shape[1], generator=torch.Generator().manual_seed(3))
    visible = visible[:, order.to(device)]  # neither ascending nor contiguous
    grad = torch.randn(visible.numel() * 16, 16, device=device)
    check(spec, visible, weights, grad, (4, 16))


@pytest.mark.parametrize("grid", [(3, 2), (1, 1)])
def test_all_patches(device, grid):
    """Without ``visible`` every patch of every clip, as with all of them in order."""
    L = grid[0] * grid[1]
    spec, _, weights, _ = problem(device, torch.float32, (4, 8, 16), 16, 1, grid, 1)
    grad = torch.randn(2 * L * 16, 16, device=device)
    check(spec, None, weights, grad, (4, 8, 16))
    everything = torch.arange(L, device=device).expand(2, L)
    for a, b in zip(
        run(spec, None, weights, grad, (4, 8, 16)), run(spec, everything, weights, grad, (4, 8, 16)), strict=True
    ):
        assert torch.equal(a, b)


def awkward(spec):
    B, C, T, F = spec.shape
    yield "transposed", spec.transpose(2, 3).contiguous().transpose(2, 3)
    yield "channels last", spec.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    wide = torch.full((B + 1, C, T + 3, 2 * F + 1), float("nan"), dtype=spec.dtype, device=spec.device)
    cut = wide[1:, :, 2 : T + 2, 1::2]
    yield "cut out", cut.copy_(spec)


@pytest.mark.parametrize("C", [1, 2])
def test_any_strides(device, C):
    spec, visible, weights, grad = problem(device, torch.bfloat16, (4, 8), 16, C, (3, 2), 2, M=1)
    expected = run(spec, visible, weights, grad, (4, 8))
    for name, strided in awkward(spec):
        for a, b in zip(run(strided, visible, weights, grad, (4, 8)), expected, strict=True):
            assert torch.equal(a, b), name
    one = spec[:1]
    expanded, copied = one.expand(2, -1, -1, -1), one.repeat(2, 1, 1, 1)
    for a, b in zip(*(run(s, visible, weights, grad, (4, 8)) for s in (expanded, copied)), strict=True):
        assert torch.equal(a, b)


def test_many_tiles_a_program(device, monkeypatch):
    """Programs that take more than one tile of rows, and not all as many; and twice the same sum."""
    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    monkeypatch.setattr(kernel.tiles, "pixels", lambda *args, config=kernel.tiles.pixels: {
        name: {**options, "BLOCK_R": 16} for name, options in config(*args).items()
    })  # fmt: skip
    inputs = problem(device, torch.float32, (4, 8), 16, 1, (4, 3), 9, M=1)
    check(*inputs, (4, 8))
    for a, b in zip(run(*inputs, (4, 8)), run(*inputs, (4, 8)), strict=True):
        assert torch.equal(a, b)


def test_pixels_only_when_needed(device):
    inputs = problem(device, torch.float32, (8, 16), 16, 1, (2, 1), 1, M=1)
    *gradients, none = run(*inputs, (8, 16), need_pixels=False)
    assert none is None
    for a, b in zip(gradients, run(*inputs, (8, 16)), strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("empty", ["no clip", "nothing visible"])
def test_empty(device, empty):
    spec, visible, weights, grad = problem(device, torch.bfloat16, (4, 8, 16), 16, 1, (2, 1), 1)
    spec, visible = (spec[:0], visible[:0]) if empty == "no clip" else (spec, visible[:, :0])
    y, *gradients, dpixels = run(spec, visible, weights, grad[:0], (4, 8, 16))
    assert y.shape == (0, 16)
    assert dpixels.shape == (0, 16)
    assert [tuple(d.shape) for d in gradients] == [(16, 16), (16,), (16,), (16,)]
    assert all(d.dtype == torch.float32 and not d.any() for d in gradients)
    if empty == "no clip":
        assert run(spec, None, weights, grad[:0], (4, 8, 16))[0].shape == (0, 16)


def test_vectors_of_another_dtype(device):
    """Biases and LayerNorm's weights are float32 under autocast."""
    spec, visible, (weight, *vectors), grad = problem(device, torch.bfloat16, (4, 8), 16, 1, (2, 2), 2, M=1)
    same = run(spec, visible, (weight, *vectors), grad, (4, 8))
    mixed = run(spec, visible, (weight, *(v.float() for v in vectors)), grad, (4, 8))
    for a, b in zip(mixed, same, strict=True):
        assert torch.equal(a, b)


def test_table_of_inference_mode_serves_training(device):
    kernel.cell_order.cache_clear()
    with torch.inference_mode():
        table = kernel.cell_order((4, 8, 16), device)
    assert not table.is_inference()
    assert table.dtype == torch.int32
    assert table.tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert kernel.cell_order((4, 8, 16), device) is table


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_2_31(gpu_memory):
    """More than 2^31 elements in the result: its last rows are those of a small call."""
    gpu_memory(24 << 30)
    device, c = torch.device("cuda"), 256
    spec, _, weights, _ = problem(device, torch.bfloat16, (4, 8, 16), c, 1, (64, 8), 1, B=2, M=1)
    clips = 2**31 // (512 * 16 * c) + 2
    big = spec[:1].expand(clips, -1, -1, -1).clone()
    big[-1] = spec[1]
    rows = 512 * 16
    y = kernel.embed_pixels(big, None, *weights, (4, 8, 16), EPS)
    small = kernel.embed_pixels(spec, None, *weights, (4, 8, 16), EPS)
    assert torch.equal(y[-rows:], small[-rows:])
    assert torch.equal(y[:rows], small[:rows])
    grad = torch.zeros_like(y)
    grad[-rows:] = small[-rows:]
    weight, bias, ln_weight, _ = weights
    large = kernel.embed_pixels_backward(grad, big, None, weight, bias, ln_weight, (4, 8, 16), EPS, True)
    grad_small = torch.zeros_like(small)
    grad_small[-rows:] = small[-rows:]
    expected = kernel.embed_pixels_backward(grad_small, spec, None, weight, bias, ln_weight, (4, 8, 16), EPS, True)
    for a, b in zip(large[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert torch.equal(large[4][-rows:], expected[4][-rows:])


def test_instantiations_name_every_argument():
    for dtype in ("fp32", "bf16", "fp16"):
        for one in kernel.ahead(dtype):
            assert {*one.signature, *one.constexprs} == set(one.kernel.arg_names), one.name
