"""Runs in a fresh environment with nothing but a wheel in it: the module alone, and with PyTorch where that is there.

Prints one JSON object. Imports nothing of this folder, so that it can be given to any Python: `python trial.py`.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import re
import sys
import sysconfig
from array import array
from pathlib import Path

NAME = "cat_kernels._C"
SAMPLES, FRAMES, BINS = 16000, 98, 128


def module():
    """cat_kernels._C by its path: importing the package, which then takes this one, would import PyTorch."""
    folder = Path(sysconfig.get_path("platlib"), "cat_kernels")
    (path,) = folder.glob("_C*.so")
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    found = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
    loader.exec_module(found)
    sys.modules[NAME] = found  # loaded once only
    return found


def features(_C) -> dict[str, str]:
    """A digest of the log-mel frames of a fixed clip, an instruction set each: the same for every Python."""
    # A triangle wave with a step: exact in float32, and loud and quiet bins.
    wave = array("f", [((i * 37) % 401 - 200) / 256 * (1 if i < 9000 else 0.125) for i in range(SAMPLES)])
    tables = _C.FbankTables(
        frame_length=400, frame_shift=160, fft_length=512, num_mel_bins=BINS, sample_rate=16000.0, low_freq=20.0,
        high_freq=8000.0, window="hanning",
    )  # fmt: skip
    digests = {}
    for name in _C.about()["cpus"]:
        _C.use_cpu_instruction_set(name)
        out = array("f", bytes(4 * FRAMES * BINS))
        call = _C.FbankCall(
            waveform=wave.buffer_info()[0], input="float32", clips=1, samples=SAMPLES, row_stride=SAMPLES, lengths=0,
            output=out.buffer_info()[0], dtype="float32", frames=FRAMES, preemphasis=0.97, remove_dc=True, scale=1.0,
            mean=0.0, factor=1.0,
        )  # fmt: skip
        _C.fbank_cpu(tables, call, 2)
        digests[name] = hashlib.sha256(out.tobytes()).hexdigest()[:16]
    _C.use_cpu_instruction_set(next(iter(digests)))  # the best again
    return digests


def instruction_sets() -> list[str]:
    """Those that the module should find here: asked of Linux, not of the processor."""
    flags = set(re.findall(r"\w+", re.search("^flags.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]))
    avx2 = {"avx2", "fma", "f16c"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    return ["avx512"] * avx512 + ["avx2"] * avx2 + ["baseline"]


def with_torch() -> dict:
    import torch

    import cat_kernels
    from cat_kernels.backends import resolve

    waveform = torch.randn(2, SAMPLES, generator=torch.Generator().manual_seed(0))
    error = (cat_kernels.fbank(waveform) - cat_kernels.fbank(waveform, backend="torch")).abs().max().item()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "torch": torch.__version__,
        "backends": {device: resolve("fbank", "auto", device) for device in devices},
        "error": error,
        "explain": str(cat_kernels.explain()),
    }


def main() -> None:
    _C = module()
    digests = features(_C)
    strangers = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy"})
    report = {"python": sys.version.split()[0], "about": _C.about(), "features": digests, "imported": strangers}
    report["expected"] = instruction_sets()
    if importlib.util.find_spec("torch"):
        report |= with_torch()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
