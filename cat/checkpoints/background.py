"""Checkpoints written while training goes on: a step waits until the tensors are copied, a thread does the rest.

On a GPU the copies go to pinned memory, in the order of the device's work, so the host waits for nothing and later
updates cannot get into them. They take as much of the host's memory as a checkpoint is large, and keep it for the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cat.checkpoints.store as store


class BackgroundWriter:
    """The one writer of a run's checkpoints; at most one is being written.

    What goes wrong in the thread is raised, once, by the next `check`, `wait` or `save`. The thread outlives the
    interpreter's main thread until its checkpoint is whole.

    Args:
        directory: ``checkpoints/`` of the run.
        keep: what `store.prune` keeps; it follows every checkpoint.
    """

    def __init__(self, directory: Path, **keep: int) -> None:
        self.newest: Path | None = None  # the newest that is whole
        self.error: BaseException | None = None  # why the latest could not be written
        self._directory, self._keep = directory, keep
        # Not `Thread.join`: interrupted by Ctrl-C it takes the thread for ended (Python 3.11).
        self._done = threading.Event()
        self._done.set()
        self._raise: BaseException | None = None
        self._held: dict[str, Tensor] = {}

    def save(
        self,
        *,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        config: Mapping[str, Any],
        score: float | None = None,
        extra: Mapping[str, Any] | None = None,
        prune: bool = True,
        copied: bool = False,
    ) -> None:
        """As `store.save`, then `store.prune`. Waits for the checkpoint before, and until the tensors are copied; where
        there is no memory for copies, until all is done. ``copied``: the tensors are copies already."""
        self.wait()
        write = partial(self._write, prune=prune, step=step, config=config, score=score, extra=extra)
        try:
            copies = (model, optimizer)
            if not copied:
                copies = self._copies("model", model), self._copies("optimizer", optimizer)
            thread = threading.Thread(target=write, args=(*copies, _arrival(model)), name="checkpoint")
            self._done.clear()
            thread.start()
        except (MemoryError, RuntimeError):  # torch says the latter of memory, Python of threads
            self._held = {}
            write(model, optimizer, lambda: None)
            self.check()

    @property
    def busy(self) -> bool:
        return not self._done.is_set()

    def check(self) -> None:
        """Raises what went wrong since the last time; does not wait."""
        error, self._raise = self._raise, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until nothing is being written. Raises as `check`."""
        self.settle()
        self.check()

    def settle(self) -> None:
        """Until nothing is being written, whatever became of it."""
        self._done.wait()

    def _write(
        self,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        arrived: Callable[[], None],
        *,
        prune: bool,
        **rest: Any,
    ) -> None:
        try:
            arrived()
            self.newest = store.save(self._directory, model=model, optimizer=optimizer, **rest)
            self.error = None
            if prune:
                self._prune()
        except BaseException as error:
            self.error = self._raise = error
        finally:
            self._done.set()

    def _prune(self) -> None:
        try:
            store.prune(self._directory, **self._keep)
        except BaseException as error:
            self._raise = error

    def _copies(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU, in memory that is kept."""
        copies = {}
        for name, tensor in tensors.items():
            key = f"{group}.{name}"
            held = self._held.get(key)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._held[key] = held
            copies[name] = held.copy_(tensor.detach(), non_blocking=True)
        return copies


def _arrival(tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """Waits until the copies made so far are there."""
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
