"""How long a training step waits for a checkpoint: written on the spot, and in the background.

    python -m benchmarks.checkpoints                  # the base model with its optimiser's moments
    python -m benchmarks.checkpoints --folder DIR     # on another disk than the temporary folder's

Both write the same in turn; what is on disk in the end is compared with the model. The first time counts apart: it
makes the memory for the copies.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.results import Key, Parity, Results
from benchmarks.runner import Settings, arguments, finish, say, synchronize
from benchmarks.step_time import build_model
from cat.checkpoints import store
from cat.checkpoints.background import BackgroundWriter
from cat.training.optim import trainable

GOAL = 0.2  # of the time that a step waits on the spot
KEEP = {"keep_last": 2, "keep_best": 0}


class Writer(Protocol):
    def save(self, **state: Any) -> None: ...
    def wait(self) -> None: ...


class OnTheSpot:
    """As `BackgroundWriter`, without a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, **state: Any) -> None:
        store.save(self._folder, **state)
        store.prune(self._folder, **KEEP)

    def wait(self) -> None:
        """Nothing is left to do."""


def state_of(preset: str, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """A model, and moments as AdamW has them."""
    model = build_model(preset, "auto", device)
    moments = {}
    for name, parameter in trainable(model).items():
        moments |= {f"{kind}.{name}": torch.randn_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        moments[f"step.{name}"] = torch.tensor(1.0)
    return {"model": model.state_dict(), "optimizer": moments}


def run(s: Settings, folder: Path) -> Results:
    """Rows of both."""
    results = Results()
    state = state_of(s.preset, s.device)
    size = sum(map(store.size_of, state.values()))
    folders = {name: folder / name.replace(" ", "-") for name in ("on the spot", "in the background")}
    writers: dict[str, Writer] = {
        "on the spot": OnTheSpot(folders["on the spot"]),
        "in the background": BackgroundWriter(folders["in the background"], **KEEP),
    }
    waits: dict[str, list[float]] = {name: [] for name in writers}
    written: dict[str, list[float]] = {name: [] for name in writers}
    for step in range(1 + s.min_rounds):
        for name, writer in writers.items():
            synchronize(s.device)
            began = time.perf_counter()
            writer.save(step=step, config={}, **state)
            waits[name].append(1e3 * (time.perf_counter() - began))
            writer.wait()
            written[name].append(1e3 * (time.perf_counter() - began))
            say(f"{name}: {size / 1e6:.0f} MB, a step waits {waits[name][-1]:.0f} ms, of {written[name][-1]:.0f} ms")
    key = Key(benchmark="checkpoint", mode="wait", dtype="fp32", shape={"preset": s.preset})
    for name in writers:
        work = {"bytes": size, "first_ms": waits[name][0], "written_ms": statistics.median(written[name][1:])}
        results.add(key, name, waits[name][1:], Parity(float(_differing(folders[name], state)), 0.0), work=work)
    return results


def _differing(folder: Path, state: dict[str, dict[str, Tensor]]) -> int:
    """How many tensors of the newest checkpoint are not the model's."""
    found = store.load(store.list_checkpoints(folder)[-1])
    pairs = (found.model, state["model"]), (found.optimizer, state["optimizer"])
    return sum(not torch.equal(saved[name], own[name].cpu()) for saved, own in pairs for name in own)


def missed(results: Results) -> list[str]:
    medians = {row["provider"]: row["median_ms"] for row in results.rows}
    if len(medians) < 2 or medians["in the background"] <= GOAL * medians["on the spot"]:
        return []
    background, spot = medians["in the background"], medians["on the spot"]
    return [f"a step waits {background:.0f} ms for a checkpoint in the background, goal {GOAL:g} of {spot:.0f} ms"]


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write and delete (default: a temporary folder)")
    options = parser.parse_args()
    s = Settings.of(options, clips_cpu=0, clips_cuda=0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = run(s, Path(folder))
    return finish(results, s, missed(results))


if __name__ == "__main__":
    sys.exit(main())
