"""Philox against the published test vectors, Triton's definition and the normal distribution."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cat_kernels import philox

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, expected.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    words = philox.philox_words(seed, *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == expected
    assert all(w.dtype == torch.int64 for w in words)
    # Counters as ints, and a seed on the device (as an int64 bit pattern), are the same thing.
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    again = philox.philox_words(torch.tensor(signed), *counter)
    assert tuple(int(w) for w in again) == expected


def test_counters_broadcast():
    words = philox.philox_words(7, torch.arange(3)[:, None], torch.arange(4))
    assert all(w.shape == (3, 4) for w in words)
    single = philox.philox_words(7, 2, 3)
    assert [int(w[2, 3]) for w in words] == [int(w) for w in single]
    assert all(int(w.min()) >= 0 and int(w.max()) <= philox.WORD for w in words)


def test_counter_dtype_is_checked():
    with pytest.raises(TypeError, match=r"int64 tensor, got torch.int32.*\.long\(\)"):
        philox.philox_words(0, torch.zeros(2, dtype=torch.int32))


def test_uniform_is_tritons():
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    expected = torch.tensor([0, 1, 0x7FFFFFFF, 0x7FFFFFFF, 0], dtype=torch.float32) * 4.6566127342e-10
    assert torch.equal(philox.uniform(words), expected)
    assert float(philox.uniform(words).max()) < 1.0


def test_box_muller_is_finite_at_zero():
    radius = math.sqrt(-2 * math.log(1e-7))
    cosine, sine = philox.box_muller(torch.tensor([0.0]), torch.tensor([0.25]))
    assert float(sine) == pytest.approx(radius, rel=1e-6)
    assert abs(float(cosine)) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_normal_depends_on_the_element_only(device, monkeypatch):
    rng = torch.tensor([1234, 1 << 33], device=device)
    full = philox.normal(rng, 1003)
    assert torch.equal(philox.normal(rng, 10), full[:10])
    assert torch.equal(philox.normal(rng + torch.tensor([0, 5], device=device), 100), full[20:120])
    monkeypatch.setattr(philox, "CHUNK_CPU", 16)
    monkeypatch.setattr(philox, "CHUNK_ACCELERATOR", 16)
    assert torch.equal(philox.normal(rng, 1003), full)
    assert not torch.equal(philox.normal(torch.tensor([1235, 1 << 33], device=device), 1003), full)
    # The high word of the counter counts: offsets 2^32 apart are different streams.
    assert not torch.equal(philox.normal(torch.tensor([1234, 1 << 32], device=device), 1003), full)


def test_normal_is_standard_normal():
    count = 200_000
    sample = philox.normal(torch.tensor([42, 0]), count).double()
    assert abs(float(sample.mean())) < 4 / math.sqrt(count)
    assert abs(float(sample.var()) - 1) < 4 * math.sqrt(2 / count)
    # Kolmogorov-Smirnov distance to the normal distribution; 1.95 / sqrt(n) is the 0.1 % point.
    ordered = torch.special.ndtr(sample.sort().values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((ordered - steps).abs().max()) < 1.95 / math.sqrt(count)
    lanes = torch.corrcoef(sample.view(-1, 4).T) - torch.eye(4)
    assert float(lanes.abs().max()) < 4 / math.sqrt(count / 4)


@pytest.mark.gpu
def test_words_agree_across_devices():
    counter = torch.arange(4096) * 0x1E3779B97F4A7C15
    low, high = philox.split_words(counter)
    on_cpu = philox.philox_words(99, low, high)
    on_gpu = philox.philox_words(99, low.cuda(), high.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))
    rng = torch.tensor([3, 17])
    torch.testing.assert_close(philox.normal(rng, 4097), philox.normal(rng.cuda(), 4097).cpu(), atol=4e-6, rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_normal_is_tritons_randn4x(device):
    """On the CPU in Triton's interpreter, on a GPU compiled. log, sqrt, sin and cos differ in the last places."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(here / "triton_randn4x.py"), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
