"""What is particular to the extension's fbank: processes, threads, devices, what it leaves to PyTorch."""

import math
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cat_kernels import backends, extension, fbank
from cat_kernels.mel import FbankSettings, fbank_reference
from cat_kernels.mel.native import _device_tables
from cat_kernels.mel.reference import _spectrum, mel_matrix

ROOT = Path(__file__).parents[2]
REASON = extension.why_not("cpu")
needs_extension = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SMALL = {"sample_rate": 4000, "num_mel_bins": 6, "frame_length_ms": 15.0, "frame_shift_ms": 6.0}


def noise(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- numbers ---------------------------------------------------------------------------------------------------------


def bound_of(wave, settings, **options):
    """The reference in float64 and what float32 may be off by, both as square roots of energies."""
    wave = wave.double()
    expected = fbank_reference(wave, None, settings, **options).exp().sqrt()
    preemphasis, remove_dc = options.get("preemphasis", 0.97), options.get("remove_dc", True)
    eps = torch.finfo(torch.float32).eps
    rows = mel_matrix(settings, wave.device, torch.float64).sum(0).sqrt()

    def norm(preemphasis):
        power = _spectrum(wave, None, settings, preemphasis, remove_dc, 1.0).abs().square()
        return ((2 * power.sum(-1) - power[..., 0] - power[..., -1]) / settings.fft_length).sqrt()[..., None]

    # The frame before emphasis counts by its own rounding: emphasis takes away up to 97 % of low frequencies.
    return expected, (16 * norm(preemphasis) + norm(0.0)) * eps * rows + 4 * eps * expected


@needs_extension
@pytest.mark.parametrize("rate", [4000, 8000, 16000, 22050, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize("options", [{}, {"preemphasis": 0.0}, {"preemphasis": 0.9, "remove_dc": False}])
def test_error_bound_at_every_rate(rate, options):
    time_N = torch.arange(rate // 4, dtype=torch.float64) / rate
    waves = {
        "noise": 0.1 * torch.randn(len(time_N), generator=torch.Generator().manual_seed(rate), dtype=torch.float64),
        "chirp": 0.5 * torch.sin(2 * math.pi * (20 * time_N + rate * time_N.square())),
        "low tone on an offset": 0.3 + 0.5 * torch.sin(2 * math.pi * 50 * time_N),
        "faint noise on an offset": 0.5 + 1e-3 * torch.sin(time_N * 12345.6789 * (1 + time_N)),
    }
    settings = FbankSettings(sample_rate=rate, num_mel_bins=23)
    for name, wave in waves.items():
        wave = wave.float()[None]
        expected, bound = bound_of(wave, settings, **options)
        found = fbank(wave, sample_rate=rate, num_mel_bins=23, backend="native", **options).double().exp().sqrt()
        worst = ((found - expected).abs() / bound).max().item()
        assert worst <= 1, f"{name}: {worst:.2f} of the bound"


@needs_extension
def test_every_instruction_set_of_this_processor():
    module = extension.load()
    wave, lengths = noise(3, 20_000), torch.tensor([20_000, 400, 7777])
    before = module.about()["cpu"]
    try:
        found = []
        for name in module.about()["cpus"]:
            module.use_cpu_instruction_set(name)
            assert module.about()["cpu"] == name
            found.append(fbank(wave, lengths, backend="native"))
        for spec in found[1:]:
            torch.testing.assert_close(spec, found[0], rtol=0, atol=1e-3)
        with pytest.raises(ValueError, match="no instruction set sse9"):
            module.use_cpu_instruction_set("sse9")
    finally:
        module.use_cpu_instruction_set(before)


@needs_extension
@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="asks Linux on x86")
def test_no_instruction_set_is_overlooked():
    """The compiler's own way of asking finds none under zig."""
    from release.trial import instruction_sets

    assert extension.load().about()["cpus"] == instruction_sets()


# --- threads and processes -------------------------------------------------------------------------------------------


@needs_extension
def test_the_number_of_threads_changes_nothing(threads):
    wave = noise(5, 50_000)
    found = []
    for count in (1, 2, 7):
        threads(count)
        found.append(fbank(wave, backend="native"))
    assert found[1].equal(found[0])
    assert found[2].equal(found[0])


@needs_extension
def test_the_interpreter_runs_meanwhile(threads):
    """The lock of the interpreter is released: another thread's ticks fall into the time of the call."""
    threads(1)
    wave = noise(1, 160_000).expand(400, -1)
    fbank(wave[:1], backend="native")
    span = []

    def call():
        span.append(time.perf_counter())
        fbank(wave, backend="native")
        span.append(time.perf_counter())

    worker, ticks = threading.Thread(target=call), []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    quarter = (span[1] - span[0]) / 4
    assert any(span[0] + quarter < tick < span[1] - quarter for tick in ticks), (span, len(ticks))


class Waves(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        wave = torch.from_numpy(np.random.default_rng(i).normal(size=(4, 30_000)).astype(np.float32))
        torch.set_num_threads(2)  # for the extension: an operation of PyTorch's own would wait for the parent's threads
        return fbank(wave, backend="native")


@needs_extension
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_in_workers_that_were_forked(threads):
    """Threads of the parent do not exist in a forked child; nothing must wait for them there."""
    threads(2)
    dataset = Waves()
    expected = [dataset[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for found, wanted in zip(loader, expected, strict=True):
        assert found.equal(wanted)


# --- what it leaves to PyTorch ---------------------------------------------------------------------------------------


@needs_extension
def test_float64_is_left_to_pytorch():
    wave = noise(1, 800)
    with pytest.raises(backends.BackendError, match="computes in float32; use backend='torch'"):
        fbank(wave.double(), backend="native")
    with pytest.raises(backends.BackendError, match="float32"):
        fbank(wave, dtype=torch.float64, backend="native")
    assert fbank(wave.double()).equal(fbank(wave.double(), backend="torch"))


@needs_extension
def test_gradient_is_the_references():
    grads = []
    for backend in ("native", "torch"):
        wave = noise(2, 2000).requires_grad_()
        fbank(wave, target_length=9, mean=-4.0, std=4.5, backend=backend).square().sum().backward()
        grads.append(wave.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    wave = noise(1, 800).requires_grad_()
    (grad,) = torch.autograd.grad(fbank(wave, backend="native").sum(), wave, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_without_the_extension_pytorch_runs():
    """Explained, and an error only where the extension was asked for by name."""
    code = """
import sys
sys.modules["cat_kernels._C"] = None
import torch, cat_kernels
told = cat_kernels.explain("cpu")
row = next(row for row in told.rows if row.operator == "fbank")
assert row.backend == "torch", row
assert "not built" in row.others["native"], row
assert told.versions["extension"].startswith("none: ")
wave = torch.randn(1, 800)
assert cat_kernels.fbank(wave).equal(cat_kernels.fbank(wave, backend="torch"))
try:
    cat_kernels.fbank(wave, backend="native")
except RuntimeError as error:
    assert "docs/install.md" in str(error), error
else:
    raise AssertionError("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@needs_extension
def test_explain_tells_what_is_in_the_extension():
    told = str(backends.explain("cpu"))
    about = extension.load().about()
    assert about["compiler"] in told
    assert f"{about['cpu']} in use" in told
    assert ("CUDA " + about["cuda"] if about["cuda"] else "no CUDA") in told
    assert all(name.split("-")[0] in told for name in about["architectures"])


# --- on a GPU --------------------------------------------------------------------------------------------------------

SAMPLES = {
    "standard": ({}, 20_000),
    "ragged, padded, normalised": ({"target_length": 140, "mean": -4.268, "std": 4.569}, 20_003),
    "hamming, no emphasis": ({"window": "hamming", "preemphasis": 0.0, "remove_dc": False, "scale": 32768.0}, 5000),
    "80 bins": ({"num_mel_bins": 80, "low_freq": 50.0, "high_freq": -400.0}, 5000),
    "small": (SMALL, 2000),
    "44.1 kHz": ({"sample_rate": 44100}, 30_000),
    "odd shift": ({"frame_shift_ms": 10.1}, 9000),
}


@pytest.fixture
def cuda():
    reason = extension.why_not("cuda")
    return torch.device("cuda", 0) if reason is None else pytest.fail(f"the extension cannot run here: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("name", SAMPLES)
def test_gpu_gives_what_the_cpu_gives(cuda, name, given, dtype):
    options, samples = SAMPLES[name]
    wave = noise(3, samples)
    wave = (wave * 32768).round().to(given) if given == torch.int16 else wave.to(given)
    lengths = torch.tensor([samples, samples // 3, 450]) if "ragged" in name else None
    expected = fbank(wave, lengths, backend="native", dtype=torch.float32, **options)
    on_gpu = None if lengths is None else lengths.to(cuda)
    found = fbank(wave.to(cuda), on_gpu, backend="native", dtype=dtype, **options).cpu()
    assert found.dtype == dtype
    step = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=step, atol=2e-3 + step)


@pytest.mark.gpu
def test_gpu_bound_against_float64(cuda):
    wave = noise(2, 40_000)
    expected, bound = bound_of(wave, FbankSettings())
    found = fbank(wave.to(cuda), backend="native").cpu().double()
    slack = found.abs() * 2**-21 * expected  # of the fast logarithm
    assert ((found.exp().sqrt() - expected).abs() <= bound + slack).all()


@pytest.mark.gpu
def test_gpu_waits_for_nothing_and_can_be_captured(cuda):
    wave, lengths = noise(4, 20_000).to(cuda), torch.tensor([20_000, 400, 5000, 12_345], device=cuda)
    expected = fbank(wave, lengths, backend="native")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert fbank(wave, lengths, backend="native").shape == expected.shape
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fbank(wave, lengths, backend="native")
    wave.mul_(0.5)
    graph.replay()
    assert captured.equal(fbank(wave, lengths, backend="native"))


@pytest.mark.gpu
def test_gpu_capture_before_the_first_call_says_what_to_do(cuda):
    _device_tables.cache_clear()
    wave = noise(1, 8000).to(cuda)
    with pytest.raises(RuntimeError, match="call fbank once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fbank(wave, backend="native")


@pytest.mark.gpu
def test_gpu_runs_on_the_current_stream(cuda):
    wave = torch.zeros(8, 160_000, device=cuda)
    fbank(wave, backend="native")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        wave.copy_(noise(8, 160_000).to(cuda))
        found = fbank(wave, backend="native")
    stream.synchronize()
    assert found.equal(fbank(wave, backend="native"))


@pytest.mark.gpu
def test_gpu_that_is_not_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    wave = noise(2, 8000)
    found = fbank(wave.to("cuda:1"), backend="native")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found.cpu(), fbank(wave.to(cuda), backend="native").cpu(), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.alone
def test_gpu_offsets_past_2_to_the_31(cuda, gpu_memory):
    gpu_memory(16 << 30)
    clips = 2**31 // 160_000 + 2
    wave = torch.zeros(clips, 160_000, dtype=torch.int16, device=cuda)
    wave[-1] = (noise(160_000) * 32768).to(torch.int16)
    found = fbank(wave, dtype=torch.bfloat16, backend="native")
    assert found[-1].equal(fbank(wave[-1], dtype=torch.bfloat16, backend="native"))
    assert found[0].float().max() < -15.9


@pytest.mark.gpu
def test_gpu_leaves_long_ffts_to_pytorch(cuda):
    wave = noise(1, 20_000).to(cuda)
    options = {"sample_rate": 192_000, "frame_length_ms": 50.0}
    with pytest.raises(backends.BackendError, match=r"16384 points.*use backend='torch'"):
        fbank(wave, backend="native", **options)
    assert fbank(wave, **options).equal(fbank(wave, backend="torch", **options))
