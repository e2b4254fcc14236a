"""Clips embedded by several processes, bit for bit as by one.

On the CPU a process computes with one thread, so that no sum depends on how many there are; what is faster on more
cores is more processes. (Three blocks of a ViT, 768 wide, 513 tokens, on two cores of which others used one: two
processes 1.34 times the clips of one thread, two threads 1.03 times.) On a GPU one process embeds, and others read for
it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cat.data.workers import cores, prefetched
from cat.encoders.frozen import FrozenEncoder
from cat.encoders.identity import device_of
from cat.encoders.partial import Block

_MOST = 8  # processes, unless asked for: each needs memory for a batch of its own


class EncoderError(RuntimeError):
    """The encoder failed on a batch of clips."""


Produce = Callable[[range], Iterator[Block]]  # of some places, any number of blocks that follow one another


def pick_jobs(asked: int | None, encoder: FrozenEncoder) -> int:
    """How many processes embed. None: as many as there are cores, 8 at the most; one for an encoder of the user's,
    which may have threads that end where a process is copied.

    Raises: ValueError for a number that cannot be.
    """
    device, threads = device_of(encoder), getattr(encoder, "threads", 1)
    # Not get_start_method alone, which would settle it for the whole program.
    start = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if asked is None:
        ours = type(encoder).__module__.startswith("cat.")
        return min(cores(), _MOST) if device.type == "cpu" and threads == 1 and ours and start == "fork" else 1
    if asked < 1:
        raise ValueError(f"{asked} jobs; expected at least 1")
    if asked > 1 and device.type != "cpu":
        raise ValueError(
            f"{asked} jobs on {device}; expected 1: a GPU is used by one process, for which others read (--num-workers)"
        )
    if asked > 1 and threads > 1:
        raise ValueError(
            f"{asked} jobs, but {encoder.name} was made with {threads} threads of its own, which other processes do "
            "not have; expected one that was made after torch.set_num_threads(1)"
        )
    return asked


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU torch computes with one thread in this block."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_blocks(produce: Produce, todo: Sequence[range], *, batch_size: int, end: int, jobs: int) -> Iterator[Block]:
    """What ``produce`` makes of all places to do, in order, `batch_size` places a block (the last one of all, which has
    the place ``end`` - 1, may have fewer); the same whatever the number of ``jobs``.

    Raises: `EncoderError`, and what reading data in workers does.
    """
    begins = [begin for places in todo for begin in range(places.start, places.stop, batch_size)]
    if min(jobs, len(begins)) < 2:
        for places in todo:
            yield from _whole(produce(places), batch_size, end)
        return
    for made in prefetched(_Blocks(produce, batch_size, end), begins, num_workers=min(jobs, len(begins))):
        if isinstance(made, str):
            raise EncoderError(made)
        yield made


def _whole(parts: Iterator[Block], batch_size: int, end: int) -> Iterator[Block]:
    waiting: list[Block] = []
    for part in parts:
        waiting.append(part)
        if part.end % batch_size == 0 or part.end == end:
            yield Block.joined(waiting)
            waiting = []


class _Blocks:
    """A data set whose items are blocks, or the message of an EncoderError: raised, it would come with a traceback."""

    def __init__(self, produce: Produce, batch_size: int, end: int) -> None:
        self._produce, self._batch_size, self._end = produce, batch_size, end

    def __getitem__(self, begin: int) -> Block | str:
        places = range(begin, min(begin + self._batch_size, self._end))
        try:
            return next(_whole(self._produce(places), self._batch_size, self._end))
        except EncoderError as error:
            return str(error)


def peak_memory() -> tuple[int, int]:
    """Bytes that this process, and the largest of those that have ended below it, held at their most."""
    import resource

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    usage: Any = [resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return usage[0], usage[1]
