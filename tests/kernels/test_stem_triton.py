"""The stem in Triton as a whole: what is special about it. Parity over all samples is test_operators.py's part."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cat_kernels import MultiResConv
from cat_kernels import spec as S
from cat_kernels.backends import BackendError
from cat_kernels.stem import fused, products
from cat_kernels.stem.layout import block_places, halo_rows
from cat_kernels.stem.spec import SPEC, draw_visible

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.either
SMALL = {"resolutions": (4, 8), "channels": (16,), "embed_dim": 48, "depth": 1}


def make(B=2, M=2, grid=(3, 2), K=3, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    stem = MultiResConv(**{**SMALL, **settings}, backend="triton").to(DEVICE, dtype)
    P = stem.patch_size
    g = torch.Generator().manual_seed(1)
    spec = torch.randn(B, stem.in_chans, grid[0] * P, grid[1] * P, generator=g).to(DEVICE, dtype)
    return stem, spec, draw_visible(B * M, grid[0] * grid[1], K, g, DEVICE)


def tokens_and_gradients(stem, spec, visible, autocast=None):
    spec = spec.clone().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        tokens = stem(spec, visible)
    weight = torch.linspace(-1, 1, tokens[0, 0].numel(), device=DEVICE).to(tokens.dtype)
    grads = torch.autograd.grad(tokens, [spec, *stem.parameters()], weight.expand(tokens.shape))
    return S.Run([tokens.detach()], list(grads))


def by(backend, stem):
    other = copy.deepcopy(stem)
    other.backend = backend
    return other


@pytest.mark.parametrize(
    "settings",
    [
        {"in_chans": 2, "kernel_size": 3, "mlp_ratio": 1.5},
        {"resolutions": (16,), "channels": (), "embed_dim": 48},
        {"resolutions": (4, 16), "channels": (16,), "embed_dim": 32},
        {"resolutions": (8, 16), "channels": (48,)},
        {"resolutions": (2, 4, 8, 16), "channels": (16, 32, 48)},
        {"resolutions": (4, 8, 16, 32), "channels": (16, 32, 48)},
        {"resolutions": (3, 6)},
    ],
    ids=str,
)
def test_every_setting(settings):
    """What the specification's samples leave out; one block a stage is enough for it."""
    stem, spec, visible = make(B=1, grid=(2, 2), K=2, **settings)
    actual = tokens_and_gradients(stem, spec, visible)
    eager = tokens_and_gradients(by("dense", stem), spec, visible)
    exact = tokens_and_gradients(by("dense", stem).double(), spec.double(), visible)
    S.compare_runs(str(settings), actual, eager, exact, pooled=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype):
    stem, spec, visible = make(B=1, K=2, dtype=dtype)
    actual = tokens_and_gradients(stem, spec, visible)
    eager = tokens_and_gradients(by("dense", stem), spec, visible)
    exact = tokens_and_gradients(by("dense", stem).double(), spec.double(), visible)
    S.compare_runs(str(dtype), actual, eager, exact, pooled=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Weights stay float32 and get float32 gradients, at least as close as eager's."""
    stem, spec, visible = make()
    actual = tokens_and_gradients(stem, spec, visible, dtype)
    eager = tokens_and_gradients(by("visible", stem), spec, visible, dtype)
    exact = tokens_and_gradients(by("dense", stem).double(), spec.double(), visible)
    assert actual.outputs[0].dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in actual.grads)
    for kind in ("outputs", "grads"):
        eager_error, error = 0.0, 0.0
        for a, e, x in zip(getattr(actual, kind), getattr(eager, kind), getattr(exact, kind), strict=True):
            scale = float(x.abs().max())
            error = max(error, S.max_error(a, x) / scale)
            eager_error = max(eager_error, S.max_error(e, x) / scale)
        assert error <= 2 * eager_error + 4 * torch.finfo(dtype).eps, kind


def test_as_close_as_autocast(monkeypatch):
    """Tokens in bfloat16, norm of their error: hardly above PyTorch's as on a GPU, where LayerNorm and with
    it the residual are float32 (on an H100 by 11 %; in the interpreter, whose products sum in another order, less)."""

    def wide(x, *arguments, layer_norm=torch.nn.functional.layer_norm):
        with torch.autocast(x.device.type, enabled=False):
            return layer_norm(x.float(), *arguments)

    stem, spec, visible = make(resolutions=(4, 8, 16), channels=(32, 48), embed_dim=64, depth=2)
    spec = spec.roll(2, 2) + 0.2
    with torch.no_grad():
        exact = by("dense", stem).double()(spec.double(), visible)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            found = stem(spec, visible)
            monkeypatch.setattr(torch.nn.functional, "layer_norm", wide)
            eager = by("visible", stem)(spec, visible)
    assert (found - exact).norm() <= 1.15 * (eager - exact).norm()


def test_masked_pixels_change_nothing():
    stem, spec, visible = make(M=1)
    P = stem.patch_size
    seen = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE).scatter(1, visible, True).reshape(2, 1, 3, 2)
    seen = seen.repeat_interleave(P, 2).repeat_interleave(P, 3)
    run = tokens_and_gradients(stem, spec, visible)
    other = tokens_and_gradients(stem, torch.where(seen, spec, torch.nan), visible)
    for a, b in zip(run.outputs + run.grads, other.outputs + other.grads, strict=True):
        assert torch.equal(a, b)
    assert (run.grads[0][~seen] == 0).all()
    assert (run.grads[0][seen] != 0).any()


def test_permuting_the_list_permutes_the_tokens():
    stem, spec, visible = make()
    order = torch.tensor([2, 0, 1], device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(stem(spec, visible[:, order]), stem(spec, visible)[:, order], rtol=0, atol=1e-5)


def test_clones_are_independent():
    stem, spec, visible = make(B=2, M=2)
    with torch.no_grad():
        together = stem(spec, visible)
        for row in range(4):
            alone = stem(spec[row // 2 : row // 2 + 1], visible[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_keeping_less_changes_nothing_and_runs_are_the_same_bit_for_bit():
    stem, spec, visible = make()
    first = tokens_and_gradients(stem, spec, visible)
    stem.recompute = True
    second = tokens_and_gradients(stem, spec, visible)
    for a, b in zip(first.outputs + first.grads, second.outputs + second.grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"embed_dim": 40}, torch.float32, "embed_dim=40 is no multiple of 16; use backend='visible' or 'auto'"),
        ({"channels": (20,)}, torch.float32, "channels=20"),
        ({}, torch.float64, "torch.float64 input"),
    ],
)
def test_what_the_kernels_do_not_take(settings, dtype, message):
    stem, spec, visible = make(dtype=dtype, **settings)
    with pytest.raises(BackendError, match=message), torch.no_grad():
        stem(spec, visible)
    stem.backend = "auto"
    with torch.no_grad():
        torch.testing.assert_close(stem(spec, visible), by("visible", stem)(spec, visible))


def test_opcheck():
    stem, spec, visible = make(B=1, M=1, grid=(2, 2), K=2)
    embed, norm, block = stem.embeds[0], stem.embeds[0].norm, stem.stages[0][0]
    x = torch.randn(2 * 4, 16, device=DEVICE)
    places = block_places((2,), DEVICE).int()
    halo = fused._stem_halo_rows(visible, places, [2, 2], 2, backend="triton")
    weight = embed.proj.weight.detach().flatten(1)
    pixels = (spec, visible, weight, embed.proj.bias, embed.norm.weight, embed.norm.bias, [4, 8], 1e-5)
    weights = [p.detach().flatten(1) if p.ndim == 4 else p.detach() for p in block.parameters()]
    rows = torch.randn(6, 16, device=DEVICE)
    with torch.no_grad():
        _, *kept = fused._stem_conv_block(x, halo, places, weights, 1e-5, True, backend="triton")
    calls = [
        (fused._stem_embed_pixels, pixels),
        (fused._stem_embed_pixels_backward, (torch.ones_like(x), *pixels[:5], [4, 8], 1e-5, True)),
        (fused._stem_halo_rows, (visible, places, [2, 2], 2)),
        (fused._stem_layer_norm, (rows, norm.weight, norm.bias, 1e-5)),
        (fused._stem_layer_norm_backward, (torch.ones_like(rows), rows, norm.weight, norm.bias, 1e-5)),
        (fused._stem_conv_block, (x, halo, places, weights, 1e-5, True)),
        (fused._stem_conv_block, (x, halo, places, weights, 1e-5, False)),
        (fused._stem_conv_block_backward, (torch.ones_like(x), x, *kept, halo, places, weights, 1e-5, True)),
    ]
    matrix = rows.new_ones(3, 16)
    calls += [(products._stem_add_product, (total, rows, matrix)) for total in (None, rows[0, :3], rows[:, :3])]
    for wanted in ((True, False), (False, True)):
        calls.append((products._stem_add_product_backward, (rows[:, :3], rows, matrix, *wanted)))
    for overload, arguments in calls:
        arguments = tuple(a.detach() if isinstance(a, torch.nn.Parameter) else a for a in arguments)
        torch.library.opcheck(overload, arguments, {"backend": "triton"}, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("factors", "kernel_size"), [((2, 2), 5), ((2,), 5), ((), 11), ((3,), 7), ((2, 3), 1), ((2, 2, 2), 3)]
)
def test_table_of_neighbours(factors, kernel_size):
    """Clones that see patches in no order, all or one; none."""
    from cat_kernels.stem.kernels import halo

    g = torch.Generator().manual_seed(0)
    grid, radius, places = (4, 3), kernel_size // 2, block_places(factors, DEVICE).int()
    for N, K in ((3, 5), (1, 12), (2, 1), (0, 3)):
        visible = draw_visible(N, 12, K, g, DEVICE)
        expected = halo_rows(visible, grid, factors, radius)
        expected = torch.where(expected == N * K * places.numel(), -1, expected).int()
        assert torch.equal(halo.halo_rows(visible, places, grid, radius), expected)
    everything = torch.arange(12, device=DEVICE).expand(2, 12)
    expected = halo.halo_rows(everything.contiguous(), places, grid, radius)
    assert torch.equal(halo.halo_rows(everything, places, grid, radius), expected)


COMPILED = """
import torch
from compile_only import instantiations, kernels
from cat_kernels import MultiResConv

def compiled(B, M, T, K, dtype):
    stem = MultiResConv((4, 8), (16,), 32, depth=1, backend="triton").to(dtype)
    spec = torch.randn(B, 1, T, 16, dtype=dtype, requires_grad=True)
    visible = None if K is None else torch.rand(B * M, T // 8 * 2).argsort(1)[:, :K]
    tokens = stem(spec, visible)
    tokens.backward(torch.ones_like(tokens))
    return instantiations()

for dtype in (torch.float32, torch.bfloat16):
    for shape in ((2, 3, 32, 3), (1, 1, 16, 1), (3, 16, 64, 16), (2, 1, 24, None)):
        print(dtype, shape, compiled(*shape, dtype), len(kernels))
"""


def test_a_new_batch_or_length_compiles_nothing():
    """Kernels are compiled, and not run, in a process with a GPU's name but no GPU: for the first shape only."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(__file__)  # compile_only
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    for dtype in ("torch.float32", "torch.bfloat16"):
        counts = [int(line[-2]) for line in lines if line[0] == dtype]
        assert len(counts) == 4
        assert counts[0] > 5
        assert set(counts) == {counts[0]}, done.stdout


def test_the_specification_covers_the_kernels():
    """Every sample's widths are ones that the kernels take."""
    for sample in SPEC.samples(torch.device("cpu"), torch.float32):
        resolutions, channels, dim = sample.inputs["settings"]
        stem = MultiResConv(resolutions, channels, dim, backend="triton")
        assert fused.why_not_fused(stem, torch.float32) is None, sample.name


def test_products_keep_their_weights_gradient_in_float32():
    """Of bf16 rows; and the sum that they are added to may be none, a vector or rows."""
    generator = torch.Generator().manual_seed(0)
    x, whole = (torch.randn(50, c, generator=generator).to(DEVICE, torch.bfloat16) for c in (16, 3))
    weight, vector = (torch.randn(*s, generator=generator).to(DEVICE) for s in ((3, 16), (3,)))
    for total in (None, vector, whole):
        leaves = [t.detach().requires_grad_() for t in (x, weight, total) if t is not None]
        found = products.add_product(leaves[2] if len(leaves) > 2 else None, *leaves[:2])
        assert found.dtype == torch.bfloat16
        exact = x.double() @ weight.bfloat16().double().t() + (0 if total is None else total.double())
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=0.02)
        dx, dweight, *dtotal = torch.autograd.grad(found, leaves, whole)
        torch.testing.assert_close(dx.double(), whole.double() @ weight.bfloat16().double(), rtol=2**-7, atol=0.02)
        torch.testing.assert_close(dweight.double(), whole.double().t() @ x.double(), rtol=1e-5, atol=1e-5)
        for found in dtotal:
            expected = whole if total.ndim == 2 else whole.float().sum(0)
            torch.testing.assert_close(found, expected)
