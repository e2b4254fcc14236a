"""`grouped_conv2d` in Triton: what is special about it. Parity over all samples is test_operators.py's part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cat_kernels import grouped_conv2d
from cat_kernels.backends import BackendError

pytest.importorskip("triton")

from cat_kernels._triton import Chip
from cat_kernels.grid_conv import kernels

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.either


def inputs(N, H, W, G, I, O, k=3, dtype=torch.bfloat16):
    """Small integers: every sum is exact, in any order."""
    generator = torch.Generator().manual_seed(0)
    shapes = (N, H, W, G * I), (G * O, I, k, k), (G * O,), (N, H, W, G * O)
    return [torch.randint(-2, 3, shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def expected(x, weight, bias, grad, groups):
    """Result and gradients of x, weight and bias, in float64."""
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    padding = weight.shape[2] // 2
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad.double())


def test_lines_are_shared_out(monkeypatch):
    x, weight, bias, grad = inputs(1, 19, 2, 1, 2, 3)
    tiles = kernels.conv_tiles(2, 3, 3, x.dtype, Chip())
    exact = expected(x, weight, bias, grad, 1)[0]
    for programs in (1, 512):  # one program, and 3 of at most 8 lines
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        assert torch.equal(kernels.conv(x, weight, bias, 1, tiles).double(), exact)


@pytest.mark.parametrize("architecture", [80, 90])
def test_tiles_of_other_chips(architecture):
    """Groups of three pieces: 32 + 16 channels in, and two tiles of channels out before Hopper."""
    if torch.cuda.is_available():
        architecture = Chip.of(DEVICE).architecture
    x, weight, bias, grad = inputs(1, 2, 2, 1, 35, 40)
    chip = Chip(architecture)
    y, dx, dweight, dbias = expected(x, weight, bias, grad, 1)
    found = kernels.conv(x, weight, bias, 1, kernels.conv_tiles(35, 40, 3, x.dtype, chip))
    assert torch.equal(found, y.to(x.dtype))
    found = kernels.conv_backward(grad, weight, 1, kernels.conv_tiles(40, 35, 3, x.dtype, chip))
    assert torch.equal(found, dx.to(x.dtype))
    tiles = kernels.weight_tiles(35, 40, 3, x.dtype, chip)
    found_weight, found_bias = kernels.backward_weight(grad, x, 1, 3, tiles, with_bias=True)
    assert torch.equal(found_weight.double(), dweight)
    assert torch.equal(found_bias.double(), dbias)


def test_groups_of_48_channels_waste_no_product():
    assert [kernels.conv_tiles(i, 48, 3, torch.bfloat16, Chip())["HI"] for i in (5, 16, 20, 32, 48, 64)] == [
        16, 16, 16, 32, 32, 64,
    ]  # fmt: skip
    assert kernels.conv_tiles(48, 48, 3, torch.bfloat16, Chip())["LO"] == 16


def test_what_is_left_to_the_library():
    x, weight, bias, _ = inputs(1, 2, 3, 1, 4, 5, dtype=torch.float32)
    assert torch.equal(
        grouped_conv2d(x, weight, bias, backend="triton"), grouped_conv2d(x, weight, bias, backend="torch")
    )
    for sizes in ((65, 8, 3), (8, 65, 3), (64, 64, 5)):
        assert kernels.conv_tiles(*sizes, torch.bfloat16, Chip()) is None
        assert kernels.weight_tiles(*sizes, torch.bfloat16, Chip()) is None
    assert kernels.conv_tiles(48, 48, 3, torch.float32, Chip()) is None
    assert kernels.conv_tiles(16, 16, 5, torch.bfloat16, Chip(100)) is None
    with pytest.raises(BackendError, match=r"not torch.float64; use backend='torch' or 'auto'"):
        grouped_conv2d(x.double(), weight, bias, backend="triton")


COMPILED = """
import torch
from compile_only import instantiations, kernels
from cat_kernels import grouped_conv2d

def compiled(N, H, W):
    x = torch.randn(N, H, W, 96, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(96, 48, 3, 3, requires_grad=True), torch.randn(96, requires_grad=True)
    y = grouped_conv2d(x, weight, bias, groups=2, backend="triton")
    y.backward(torch.ones_like(y))
    return instantiations()

for shape in ((2, 3, 8), (1, 1, 1), (16, 16, 16), (5, 40, 7)):
    print(compiled(*shape), len(kernels))
"""


def test_a_new_batch_or_grid_compiles_nothing():
    """Kernels are compiled, and not run, in a process with a GPU's name but no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(__file__)  # compile_only
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["3", "2"] * 4  # with a bias, without, and the weight's gradient


@pytest.mark.parametrize("autocast", [False, True])
def test_the_decoder_gives_what_its_convolutions_gave(autocast):
    """On the CPU, bit for bit, gradients too: `torch.nn.Conv2d` on the permuted grid."""
    from cat.model import PRESETS
    from cat.model.pretraining import Decoder

    torch.manual_seed(0)
    decoder, grid = Decoder(PRESETS["tiny"]), torch.randn(2, 5, 8, PRESETS["tiny"].embed_dim)
    conv, found = decoder.convs[0], []
    calls = (
        lambda x: conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
        lambda x: grouped_conv2d(x, conv.weight, conv.bias, groups=conv.groups, backend=decoder.backend),
    )
    for call in calls:
        x = grid.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), (x, conv.weight, conv.bias))])
    assert found[0][0].stride() == found[1][0].stride()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
