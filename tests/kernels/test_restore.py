"""`restore_tokens` in Triton: what is special about it. Parity over all samples is test_operators.py's part."""

import pytest
import torch

from cat_kernels import philox, restore_tokens
from cat_kernels.backends import BackendError
from cat_kernels.restore.spec import SPEC

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from cat_kernels.restore import kernels  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.either


def sample(name="few, std 1"):
    return next(s for s in SPEC.samples(DEVICE, torch.float32) if s.name == name)


@triton.jit
def both_words(seed_ptr, words_ptr, ours_ptr, tritons_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    counter = tl.load(seed_ptr + 1) + at
    k0 = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    k1 = tl.load(words_ptr + 1).to(tl.uint32, bitcast=True)
    a, b, c, d = kernels._words(k0, k1, counter)
    tl.store(ours_ptr + at, a.to(tl.int64) + (b.to(tl.int64) << 32))
    tl.store(ours_ptr + BLOCK + at, c.to(tl.int64) + (d.to(tl.int64) << 32))
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), counter)
    tl.store(tritons_ptr + at, a.to(tl.int64) + (b.to(tl.int64) << 32))
    tl.store(tritons_ptr + BLOCK + at, c.to(tl.int64) + (d.to(tl.int64) << 32))


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1234567890123, (5 << 32) + 3), (-7, -2), (1, (1 << 32) - 10)])
def test_words_are_tritons_and_philox(seed, offset):
    rng = torch.tensor([seed, offset], device=DEVICE)
    ours, tritons = torch.zeros(2, 2, 32, dtype=torch.int64, device=DEVICE)
    both_words[(1,)](rng, rng.view(torch.int32), ours, tritons, BLOCK=32)
    assert torch.equal(ours, tritons)
    low, high = philox.split_words(torch.arange(32, device=DEVICE) + offset)
    w0, w1, w2, w3 = philox.philox_words(rng[0], low, high)
    assert torch.equal(ours, torch.stack((w0 + (w1 << 32), w2 + (w3 << 32))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [4, 6, 200])
def test_noise_is_philox_s(D, dtype):
    """On a grid without tokens; over a row's end, and over 2^32 counters'."""
    seed = torch.tensor([3, (1 << 32) - 2], device=DEVICE)
    tokens, visible = (
        torch.zeros(1, 0, D, device=DEVICE, dtype=dtype),
        torch.zeros(1, 0, dtype=torch.long, device=DEVICE),
    )
    L = 3 if DEVICE.type == "cpu" else 3000
    noise = restore_tokens(tokens, visible, L, seed, noise_std=2.0, backend="triton")
    expected = 2 * philox.normal(seed, L * D).view(1, L, D)
    # In 16 bits: a rounding that falls to the other side, and the hardware's log2 near 1.
    rtol, atol = (0, 1e-5) if dtype == torch.float32 else (torch.finfo(dtype).eps, 2e-3)
    torch.testing.assert_close(noise.float(), expected, rtol=rtol, atol=atol)


def test_opcheck():
    for overload, arguments in SPEC.overload_calls(sample()):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(overload, arguments, {"backend": "triton"}, test_utils=checks)


def test_what_the_kernels_do_not_take():
    inputs = {**sample().inputs, "tokens": sample().inputs["tokens"].double()}
    with pytest.raises(BackendError, match=r"not torch.float64; use backend='torch' or 'auto'"):
        restore_tokens(**inputs, backend="triton")
    assert torch.equal(restore_tokens(**inputs), restore_tokens(**inputs, backend="torch"))


def test_a_strided_seed_and_an_int_are_seeds():
    inputs = {**sample().inputs, "backend": "triton"}
    strided = torch.tensor([5, 9, 0, 9], device=DEVICE)[::2]
    out = restore_tokens(**{**inputs, "seed": strided})
    assert torch.equal(out, restore_tokens(**{**inputs, "seed": 5}))
    assert not torch.equal(out, restore_tokens(**{**inputs, "seed": 6}))


def test_an_index_outside_the_grid_is_left_out():
    """What a GPU does with it: values are looked at on the CPU, before the kernels are called."""
    tokens = torch.ones(1, 3, 8, device=DEVICE)
    seed = torch.tensor([0, 0], device=DEVICE)
    out = kernels.restore(tokens, torch.tensor([[4, 1, -1]], device=DEVICE), 4, seed, 0.0)
    assert out[0, :, 0].tolist() == [0, 1, 0, 0]
