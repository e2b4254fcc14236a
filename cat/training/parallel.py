"""A model that several processes train: each has a copy of it and computes its pieces of the batch.

Every loss of a piece is scaled so that the mean over all pieces, which is what DistributedDataParallel takes over the
processes, is the loss of the whole batch on one process; so are the gradients.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cat.distributed import Processes


def replicated(module: nn.Module, world: Processes) -> nn.Module:
    """The module as it is trained: in several processes backward makes its gradients their mean, and all begin with the
    weights of process 0. The module itself, and its state dict, stay as they are."""
    if not world.several:
        return module
    # Buffers are constants. The option's name until torch 2.12, and from then on:
    named = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    constant: dict[str, Any] = {"forward_sync_buffers" if named else "broadcast_buffers": False}
    return DistributedDataParallel(module, process_group=world.data, gradient_as_bucket_view=True, **constant)


def gathering(module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """For forward and backward of a piece: gradients stay in the process until its ``last`` one of the update."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def finished(device: torch.device, seconds: float) -> bool:
    """Wait until the device has done what it was given, but not for ever: a GPU may wait for a process that has ended.
    Whether it has."""
    if device.type != "cuda":
        return True
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    until = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
