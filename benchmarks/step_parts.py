"""What each part of a pre-training step takes, and its memory, beside what `benchmarks.predict` says of them.

    python -m benchmarks.step_parts        # 96 clips on a GPU, two on a CPU; base model, 4 masks, bf16

Parts are those of the prediction; times are between CUDA events on a GPU, the clock's on a CPU. In the backward a part
begins when the gradient of its result is there. The error is the prediction's, relative to what was measured; there is
one where the shape is the one predicted.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory, predicted_step
from benchmarks.results import Results
from benchmarks.runner import Settings, arguments, finish, release, say, synchronize
from benchmarks.stem import inputs
from benchmarks.step_time import OPTIM, build_model
from benchmarks.trace import MARKS, model_parts
from cat.parts import PartTimer
from cat.training.step import PretrainStep

WARM_UP, STEPS = 3, 10


class Timer(PartTimer):
    """Of the parts that the prediction has: the backward is cut too."""

    def __init__(self, device: torch.device, model: Any) -> None:
        super().__init__(device)
        self._backward = contextlib.ExitStack()
        self._inside: dict[nn.Module, Any] = {}
        for module, name in model_parts(model):
            module.register_forward_pre_hook(lambda module, _, name=name: self._begin(module, name))
            module.register_forward_hook(lambda module, *_: self._end(module))
        blocks = model.student.blocks
        for module, name in (
            (model.student.stem, "student's stem"),
            (model.decoder, "decoder"),
            (blocks[-1], "blocks"),
        ):
            module.register_forward_hook(lambda _, given, result, name=name: self._mark(result, name))
        for module, name in (
            (model.decoder, "restore"),
            (blocks[0], "tokens"),
        ):  # whose gradient of their input is made
            module.register_forward_pre_hook(lambda _, given, name=name: self._mark(given, name))

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        backward = name == "backward"
        with super().span("loss, backward" if backward else MARKS.get(name, name)):
            yield
            if backward:
                self._backward.close()

    def _begin(self, module: nn.Module, name: str) -> None:
        self._inside[module] = super().span(name)
        self._inside[module].__enter__()

    def _end(self, module: nn.Module) -> None:
        self._inside.pop(module).__exit__(None, None, None)

    def _mark(self, tensors: Any, name: str) -> None:
        first = tensors if isinstance(tensors, Tensor) else tensors[0]
        if first.requires_grad:
            first.register_hook(lambda _: self._switch(f"{name}, backward"))

    def _switch(self, name: str) -> None:
        self._backward.close()
        self._backward.enter_context(super().span(name))


def run(s: Settings) -> Results:
    results, device = Results(), s.device
    shape = {"preset": s.preset, "clips": s.clips, "masks": s.masks, "frames": s.frames}
    dtype = s.dtypes[0]
    step = PretrainStep(build_model(s.preset, "auto", device), OPTIM, precision=dtype)
    batch = *inputs(shape, device), None, torch.tensor([0, 0], device=device)

    def update() -> None:
        step(*batch, lr=OPTIM.lr, decay=0.9998)

    for _ in range(WARM_UP):
        update()
    synchronize(device)
    peak = memory.peak_cuda(update, device) if device.type == "cuda" else None
    timer = Timer(device, step.model)
    with timer:
        for _ in range(STEPS):
            with timer.span("rest"):
                update()
    measured = {name: 1e3 * seconds / STEPS for name, seconds in timer.seconds().items()}
    results.parts = {f"{s.preset}, {s.clips} clips, {s.masks} masks, {s.frames} frames, {dtype}": {
        "parts": beside(measured, predicted_step.of(shape, dtype)), "peak_MiB": peak,
        "predicted_peak_MiB": predicted_step.peak_MiB(shape, dtype),
    }}  # fmt: skip
    results.notes += notes(results.parts)
    return results


def beside(measured: dict[str, float], predicted: dict[str, Any] | None) -> dict[str, dict[str, float | None]]:
    """Milliseconds measured and predicted, part by part and of the step."""
    measured = {**measured, "step": sum(measured.values())}
    found: dict[str, dict[str, float | None]] = {}
    for name, ms in measured.items():
        part, _, backward = name.partition(", ")
        found[name] = {"ms": ms, "predicted_ms": None}
        if predicted is not None and part in predicted["parts"]:
            field = "ms" if part == "step" else "backward_ms" if backward else "forward_ms"
            left_out = predicted["parts"]["features"]["ms"] if part == "step" else 0.0  # the batch has them already
            found[name]["predicted_ms"] = predicted["parts"][part][field] - left_out
    return found


def notes(parts: dict[str, Any]) -> list[str]:
    """The prediction's errors, in words."""
    told = []
    for name, found in parts.items():
        pairs = {part: (c["ms"], c["predicted_ms"], "ms") for part, c in found["parts"].items()}
        pairs["peak memory"] = found["peak_MiB"], found["predicted_peak_MiB"], "MiB"
        for part, (measured, predicted, unit) in pairs.items():
            if measured and predicted:
                error = predicted / measured - 1
                told.append(f"{name}: {part}: {predicted:.4g} {unit} predicted for an H200, {measured:.4g} measured, "
                            f"{100 * error:+.0f} %")  # fmt: skip
    return told


def main() -> int:
    s = Settings.of(arguments(__doc__.splitlines()[0]).parse_args(), clips_cpu=2, clips_cuda=96)
    if s.dtypes[0] not in ("fp32", "bf16"):
        raise SystemExit(f"--dtypes {s.dtypes[0]}: a pre-training step runs in bf16 or fp32")
    results = run(s)
    release()
    for found in results.parts.values():
        for part, c in found["parts"].items():
            say(f"{part}: {c['ms']:.3f} ms")
    return finish(results, s, [])


if __name__ == "__main__":
    sys.exit(main())
