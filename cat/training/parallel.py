"""A model that several processes train, each on its pieces of the batch: with a copy of the model (DDP), or with a
shard of every weight, gradient and moment (FSDP2), from which the weights of a block are gathered when it computes.

Every loss of a piece is scaled so that the mean over all pieces, which is what DistributedDataParallel takes over the
processes, is the loss of the whole batch on one process; so are the gradients. FSDP takes the same mean.

Sharded weights are `DTensor`s but within forward and backward. Checkpoints know nothing of it: they are gathered whole,
and read whole. (FSDP is imported where it is used: that takes seconds.)
"""

from __future__ import annotations

import contextlib
import inspect
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cat.checkpoints.store import load_tensors
from cat.distributed import Processes


def replicated(module: nn.Module, world: Processes) -> nn.Module:
    """The module as it is trained: in several processes backward makes its gradients their mean, and all begin with the
    weights of process 0. The module itself, and its state dict, stay as they are. A sharded one does so by itself."""
    if not world.several or is_sharded(module):
        return module
    # Buffers are constants. The option's name until torch 2.12, and from then on:
    named = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    constant: dict[str, Any] = {"forward_sync_buffers" if named else "broadcast_buffers": False}
    return DistributedDataParallel(module, process_group=world.data, gradient_as_bucket_view=True, **constant)


def gathering(module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """For forward and backward of a piece: gradients stay in the process until its ``last`` one of the update."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    if is_sharded(module):
        cast(Any, module).set_requires_gradient_sync(last)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- FSDP


def shard(module: nn.Module, world: Processes, *, blocks: Iterable[nn.Module], kept: nn.Module | None = None) -> None:
    """Leave this process a shard of every parameter, in place: the weights, which must be the same in all processes,
    are gathered by ``blocks``, and what is in none of them for all of the module's forward, and again its backward.

    ``kept``: a part of the module that does not compute, and is not gathered for it.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    # The view is that of a block's output, which nothing here writes into.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device = next(module.parameters()).device.type
    assert world.data is not None  # there are several
    mesh = DeviceMesh.from_group(world.data, device)
    for part in (*blocks, *([] if kept is None else [kept]), module):
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True)
        if device == "cpu":  # gloo's means in a reduce-scatter are sums in some versions (pytorch issue 162338)
            sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "unshard")  # an FSDPModule


@contextlib.contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """While entered, which all processes do together, the weights are whole in each, so that one may compute what the
    others do not. Without gradients."""
    parts: list[Any] = [part for part in module.modules() if is_sharded(part)]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process has of each; changing it in place changes the tensor."""
    return [cast(Any, tensor).to_local().data if _is_shard(tensor) else tensor.data for tensor in tensors]


def _is_shard(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


@contextlib.contextmanager
def swapped(some: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """While entered, some tensors have the values of others, and those theirs."""
    _swap(some, others)
    try:
        yield
    finally:
        _swap(some, others)


@torch.no_grad()
def _swap(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for one, other in zip(local(some), local(others), strict=True):
        held = one.clone()
        one.copy_(other)
        other.copy_(held)


def whole(tensors: Mapping[str, Tensor], world: Processes) -> dict[str, Tensor]:
    """The tensors as one process would have them. Where any is sharded, process 0 gets copies of all on the CPU, and
    the others, which must call this too, nothing. One after the other: a GPU needs no more memory than for the largest.
    """
    if not any(map(_is_shard, tensors.values())):
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        full = joint(tensor)
        if world.main:
            found[name] = full.to("cpu", copy=full is tensor)
    return found


def joint(tensor: Tensor) -> Tensor:
    """A tensor whole, in all processes, which must all ask for it."""
    return cast(Any, tensor).full_tensor() if _is_shard(tensor) else tensor


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """`cat.checkpoints.store.load_tensors` of tensors that all processes have."""
    own = module.state_dict()
    load_tensors(module, {name: share_of(tensor, own.get(name)) for name, tensor in tensors.items()}, source)


def share_of(tensor: Tensor, holder: Any) -> Tensor:
    """Of a tensor that all processes have what this one does, where ``holder`` is sharded: nothing is sent."""
    if not _is_shard(holder):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = holder.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, holder.placements, src_data_rank=None)


# ----------------------------------------------------------------


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
