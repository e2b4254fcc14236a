"""Under autocast the fused norms are as exact as PyTorch's: errors against float64.

Autocast of a GPU, where norms put out float32, on whatever is here: `low_dtype` is what it would be there.
"""

import dataclasses

import pytest
import torch

from cat.model import Encoder, ModelConfig, encoder, pretraining
from cat.model.pretraining import Decoder

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # Triton's interpreter cuts bfloat16 off
pytestmark = pytest.mark.either
CONFIG = ModelConfig(
    channels=(16, 32), embed_dim=64, depth=4, num_heads=2, decoder_dim=64, decoder_layers=4, decoder_groups=4
)


def blocks(config, dtype):
    """The encoder's blocks, from what the first one sees."""
    torch.manual_seed(0)
    model = Encoder(config).to(DEVICE, dtype)
    for block in model.blocks:  # as large for their width as those of the base model
        for linear in (block.qkv, block.proj, block.fc1, block.fc2):
            linear.weight.data.mul_((768 / 64) ** 0.5)
    x = torch.nn.functional.layer_norm(torch.randn(2, 17, 64, dtype=torch.float64), (64,)).to(DEVICE, dtype)
    model.embed = lambda *args, **options: x
    return lambda: model(torch.zeros(2, 1, 32, 128, device=DEVICE, dtype=dtype)), list(model.blocks.parameters())


def decoder(config, dtype):
    torch.manual_seed(0)
    model = Decoder(config).to(DEVICE, dtype)
    grid = torch.randn(2, 4, 4, 64, dtype=torch.float64).to(LOW)  # as tokens are restored under autocast
    grid = grid.to(DEVICE, dtype if dtype == torch.float64 else LOW)
    return lambda: model(grid), list(model.parameters())


def run(make, kernels, dtype, monkeypatch, low_dtype=None):
    """Output, and the gradients of the parameters, all in one vector."""
    for module in (encoder, pretraining):
        monkeypatch.setattr(module, "low_dtype", lambda x: low_dtype)
    call, parameters = make(dataclasses.replace(CONFIG, kernels=kernels), dtype)
    with torch.autocast(DEVICE.type, LOW, enabled=dtype != torch.float64):
        out = call()
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).cos().reshape(out.shape)
    grads = torch.autograd.grad(out, parameters, weight.to(out.dtype))
    return out.detach().double(), torch.cat([grad.double().flatten() for grad in grads])


@pytest.mark.parametrize("make", [blocks, decoder])
def test_fused_norms_are_as_exact_as_autocast(make, monkeypatch):
    def errors(kernels, low_dtype):
        found = run(make, kernels, torch.float32, monkeypatch, low_dtype)
        return [float((a - e).norm() / e.norm()) for a, e in zip(found, exact, strict=True)]

    exact = run(make, "reference", torch.float64, monkeypatch)
    autocast = errors("reference", LOW)
    fused = errors("triton", LOW)
    assert all(1e-5 < error < 2e-2 for error in autocast)
    # Which roundings fall which way is chance: up to 7 % apart over a few seeds.
    assert all(a <= 1.15 * b for a, b in zip(fused, autocast, strict=True)), (fused, autocast)


def test_a_block_hands_on_residual_and_operand(monkeypatch):
    """The next block's products have nothing to cast."""
    monkeypatch.setattr(encoder, "low_dtype", lambda x: LOW)
    block = Encoder(CONFIG).to(DEVICE).blocks[0]
    x = torch.randn(2, 5, 64, device=DEVICE)
    with torch.autocast(DEVICE.type, LOW):
        y, low, _ = block(x, encoder.for_products(x))
    assert y.dtype == torch.float32
    assert low.dtype == LOW
    assert torch.equal(low, y.to(LOW))
    monkeypatch.undo()
    y, low, _ = block(x)
    assert low is y


def test_a_residual_in_low_precision_is_not(monkeypatch):
    """What the norms' second result is for."""

    def error(make, low_dtype):
        found, _ = run(make, "reference", torch.float32, monkeypatch, low_dtype)
        exact, _ = run(make, "reference", torch.float64, monkeypatch)
        return (found - exact).norm()

    twice = {make: error(make, LOW) for make in (blocks, decoder)}
    if DEVICE.type == "cpu":  # on a GPU autocast's LayerNorm gives float32, and so its residual is
        assert error(decoder, None) > 1.1 * twice[decoder]
    norm = torch.nn.functional.layer_norm

    def rounded(x, *args):
        return norm(x, *args) if x.dtype == torch.float64 else norm(x, *args).to(LOW).to(x.dtype)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", rounded)
    assert error(blocks, None) > 1.5 * twice[blocks]
