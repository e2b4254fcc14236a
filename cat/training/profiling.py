"""``cat-audio pretrain --profile``: where the time of a training step goes.

Some steps of the recipe are timed part by part (`cat.parts`), a few more are traced by PyTorch's profiler, for
https://ui.perfetto.dev or chrome://tracing. Nothing is saved: no metrics, no checkpoint.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from cat.files import replacing
from cat.parts import PartTimer, part
from cat.training.loop import Trainer
from cat.training.step import EAGER_STEPS

STEPS = 10
WARM_UP = EAGER_STEPS + 2  # and the step that is recorded, and the first replay
TRACED = 2
TRACE = Path("profile", "trace.json")  # in the run directory

# In the order of a step; "rest" is the loop itself.
PARTS = (
    *("data wait", "guides", "input", "teacher", "targets", "stem", "blocks", "decoder", "loss", "forward, rest"),
    *("backward", "optimiser", "EMA", "graph", "rest"),
)


@dataclass(frozen=True)
class StepProfile:
    """Milliseconds a step, by part; they add up to the step."""

    device: str
    precision: str
    clips: int
    steps: int
    parts: dict[str, float]
    trace: Path

    @property
    def step_ms(self) -> float:
        return sum(self.parts.values())

    def table(self) -> str:
        whole = self.step_ms
        lines = [f"{'part':<14} {'ms a step':>10} {'share':>7}"]
        lines += [f"{name:<14} {ms:>10.2f} {ms / whole:>7.1%}" for name, ms in self.parts.items()]
        lines.append(f"{'step':<14} {whole:>10.2f} {self.clips / whole * 1e3:>7.1f} clips/s")
        clock = "device time" if self.device == "cuda" else "time"
        lines.append(f"\n{clock}, mean of {self.steps} steps of {self.clips} clips, {self.device} in {self.precision}")
        return "\n".join([*lines, f"trace of {TRACED} steps: {self.trace}"])


def profile_steps(trainer: Trainer, steps: int = STEPS) -> StepProfile:
    """Time ``steps`` updates after a warm-up, then trace two more, from where the trainer stands.

    They change the trainer's model: it must not be saved.
    """
    updates = trainer.unrecorded(WARM_UP + steps + TRACED)
    for _ in range(WARM_UP):
        next(updates)
    _wait(trainer.device)
    timer = PartTimer(trainer.device)
    with timer:
        for _ in range(steps):
            with part("rest"):
                clips = next(updates)
    milliseconds = {name: 1e3 * seconds / steps for name, seconds in timer.seconds().items()}

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in updates:
            pass
        _wait(trainer.device)
    if trainer.world.main:
        with replacing(trainer.run_dir / TRACE) as temporary:
            profiler.export_chrome_trace(str(temporary))
            _check_whole(temporary)
    return StepProfile(
        device=trainer.device.type,
        precision=trainer.precision,
        clips=clips,
        steps=steps,
        parts={name: milliseconds[name] for name in PARTS if name in milliseconds},
        trace=trainer.run_dir / TRACE,
    )


def _check_whole(trace: Path) -> None:
    """PyTorch logs that it could not write all of it, and goes on."""
    try:
        json.loads(trace.read_bytes())
    except (OSError, ValueError):
        raise OSError(errno.ENOSPC, "PyTorch could not write all of the trace", str(trace)) from None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
