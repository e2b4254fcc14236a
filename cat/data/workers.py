"""Items of a data set, made ready by worker processes, of which none is lost and none is waited for in vain.

torch's DataLoader leaves sharing an item's memory to a thread of the worker. When that fails there (`/dev/shm` is full,
a TMPDIR is too long for a socket's name, no file descriptor is left) the thread prints the error and drops the item,
the worker lives on, and the main process waits for ever. Here the worker shares an item itself, where an error can be
caught, and sends it as plain bytes through the pipe when it cannot be shared.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, queues
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import FrameType, TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cat.progress import say

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_NEEDS = (
    "sharing memory needs room in /dev/shm (docker run --shm-size=8g), a TMPDIR that can be written and whose path is "
    "short (TMPDIR=/tmp), and file descriptors (ulimit -n 4096)"
)
_DYING = 1.0  # seconds: a process that is killed closes what it shares a moment before its end can be seen
_COPIED = f"batches are copied, which is slower; {_NEEDS}"


# Of what a process of this one's own has sent, and of nothing else: as in every queue of multiprocessing.
_loads = ForkingPickler.loads


class WorkerDied(RuntimeError):
    """A data worker ended before its work did."""


class Items(Protocol[T_co]):
    """A data set; it has to be picklable where processes are not forked."""

    def __getitem__(self, key: int, /) -> T_co: ...


def prefetched(
    dataset: Items[T],
    keys: Sequence[int],
    *,
    num_workers: int,
    prefetch: int = 2,
    warn: Callable[[str], None] = say,
) -> Iterator[T]:
    """``dataset[key]`` for every key, in order, made by ``num_workers`` processes (0: by this one) that have
    ``prefetch`` items each ready. Where there is a GPU, items that have a method ``pin_memory`` come pinned.

    The items are the same whatever goes wrong on their way: ones that cannot be shared are copied, which is slower, and
    where no worker can be started this process makes them. ``warn`` is told so, once.

    Raises: what ``dataset[key]`` raises; `WorkerDied` when a worker was killed, within seconds of waiting for it.
    """
    done, share = 0, True
    while num_workers and done < len(keys):
        try:
            workers = _Workers(_Packing(dataset, share=share), keys[done:], num_workers, prefetch)
        except (OSError, RuntimeError) as error:  # no process, no thread, no file descriptor
            warn(f"data workers cannot be started ({_text(error)}): this process reads the data, which is slower")
            break
        with workers:
            for packed in workers:
                packed.check()
                try:
                    packed.open()
                except Exception as error:  # whatever it is, other workers can send the item another way
                    workers.check(_DYING)
                    warn(f"what data workers share cannot be opened ({_text(error)}): {_COPIED}")
                    share = False
                    break
                if packed.trouble and share:
                    warn(f"data workers cannot share memory ({packed.trouble}): {_COPIED}")
                    share = False
                done += 1
                yield packed.take()  # not kept here while the next one is waited for
    if done < len(keys):
        yield from _loader(dataset, keys[done:], 0)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _loader(dataset: Any, keys: Sequence[int], num_workers: int, prefetch: int | None = None) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        worker_init_fn=_begin,
        pin_memory=torch.cuda.is_available(),
    )


def _as_it_is(item: T) -> T:
    return item


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# ---------------------------------------------------------------- in the main process


class _Workers(Generic[T]):
    """The processes of one DataLoader, and what they send."""

    def __init__(self, dataset: _Packing[T], keys: Sequence[int], num_workers: int, prefetch: int) -> None:
        self._count, self._waiting = len(keys), False
        others = multiprocessing.active_children()
        self._items: Iterator[_Packed[T]] | None = None
        with _child_signal(None):
            try:
                self._items = iter(_loader(dataset, keys, num_workers, prefetch))
            finally:
                self._processes = [child for child in multiprocessing.active_children() if child not in others]
                if self._items is None:  # only some could be started
                    self._terminate()

    def __iter__(self) -> Iterator[_Packed[T]]:
        for _ in range(self._count):
            try:
                packed = self._next()
            except Exception:
                self.check(_DYING)
                raise
            yield packed

    def _next(self) -> _Packed[T]:
        """The next item. A death ends the waiting: its message may have come in part, and the rest never comes."""
        assert self._items is not None
        with _child_signal(self._on_child):
            try:
                self._waiting = True
                self.check()
                return next(self._items)
            finally:
                self._waiting = False

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        if self._waiting and any(process.exitcode for process in self._processes):
            self._waiting = False
            raise ChildProcessError

    def check(self, seconds: float = 0.0) -> None:
        """Raises: `WorkerDied` if one did, or does within so many seconds."""
        until = time.monotonic() + seconds
        while (dead := self._dead()) is None and time.monotonic() < until:
            time.sleep(0.02)
        if dead is not None:
            time.sleep(0.2)  # a signal to the whole group reaches this process too, and then tells more
            raise WorkerDied(_obituary(dead)) from None

    def _dead(self) -> BaseProcess | None:
        return next((process for process in self._processes if process.exitcode), None)

    def _terminate(self) -> None:
        for process in self._processes:
            process.terminate()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and kind is not GeneratorExit:
            # torch would wait some seconds for every worker that is at work, and for ever for its thread that pins,
            # should that wait for the rest of a dead worker's message. Something is to be saved before it is too late.
            self._terminate()
            _abandoned.append(self._items)
        self._items = None  # torch ends the processes with it


_abandoned: list[Any] = []


@contextlib.contextmanager
def _child_signal(handler: Callable[[int, FrameType | None], None] | None) -> Iterator[None]:
    """The handler of SIGCHLD (None: the one that is set) for this block, and afterwards the one of before.

    torch sets one for good, which answers a worker's death by raising wherever the main process is, in the middle of an
    optimiser's step too.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        signal.signal(signal.SIGCHLD, before if handler is None else handler)
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _obituary(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code > 0:
        return f"a data worker (process {process.pid}) ended with exit code {code}; what it said is above"
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return (
            f"a data worker (process {process.pid}) was killed (SIGKILL), most likely because memory ran out: take "
            "fewer data workers or smaller batches, or give the machine, container or batch job more memory"
        )
    if name == "SIGBUS":
        return f"a data worker (process {process.pid}) died of SIGBUS: shared memory is full; {_NEEDS}"
    return f"a data worker (process {process.pid}) died of {name}"


# ---------------------------------------------------------------- in a worker


class _Packed(Generic[T]):
    """An item on its way. ``trouble``: why its memory is not shared. ``error``: what there is in place of an item, and
    where it was raised."""

    def __init__(self, content: bytes, trouble: str | None, error: tuple[bytes, str] | None = None) -> None:
        self._content, self.trouble, self.error = content, trouble, error
        self._item: T | None = None

    def check(self) -> None:
        """Raises: what the data set raised."""
        if self.error is not None:
            raise _loads(self.error[0]) from _InWorkerError(self.error[1])

    def open(self) -> None:
        if self._item is None and self.error is None:
            self._item = _loads(self._content)

    def take(self) -> T:
        item, self._item = self._item, None
        return cast(T, item)

    def pin_memory(self) -> _Packed[T]:
        """The DataLoader calls it, in a thread of the main process."""
        with contextlib.suppress(Exception):  # `open` will say it where somebody listens
            self.open()
            item: Any = self._item
            if hasattr(item, "pin_memory"):
                self._item = item.pin_memory()
        return self


class _Packing(Generic[T]):
    """A data set of packed items."""

    def __init__(self, dataset: Items[T], *, share: bool) -> None:
        self._dataset, self._share, self._trouble = dataset, share, None if share else "an earlier item could not be"

    def __getitem__(self, key: int) -> _Packed[T]:
        try:
            item = self._dataset[key]
        except Exception as error:
            # torch would put the worker's traceback into the words.
            with contextlib.suppress(Exception):  # one that cannot travel
                content = bytes(ForkingPickler.dumps(error))
                if str(_loads(content)) == str(error):
                    return _Packed(b"", None, (content, traceback.format_exc()))
            raise
        if self._trouble is None:
            try:
                _need_descriptors()
                return _Packed(bytes(ForkingPickler.dumps(item)), None)
            except Exception as error:  # the item is there, and goes another way, as will all later ones
                self._trouble = _text(error)
        return _Packed(_plain(item), self._trouble)


class _InWorkerError(Exception):
    """Where an error was raised, for `cat-audio --debug`."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _need_descriptors(count: int = 32) -> None:
    """OSError when fewer are left: two a tensor, and one for the thread that hands them over, which else would never
    answer."""
    opened = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)


class _PlainPickler(pickle.Pickler):
    """Tensors as arrays: with their content, and without torch's own reductions, which take files and sockets."""

    def reducer_override(self, obj: Any) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if type(obj) is Tensor else NotImplemented


def _plain(item: Any) -> bytes:
    content = io.BytesIO()
    _PlainPickler(content, pickle.HIGHEST_PROTOCOL).dump(item)
    return content.getvalue()


def _begin(worker: int) -> None:
    """A worker's first act."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):  # sent to the whole group; the main process decides what they mean
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Should an item be lost in the sending thread after all, the worker's death is noticed, its silence is not.
    queues.Queue._on_queue_feeder_error = staticmethod(_lost)  # type: ignore[attr-defined]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _lost(error: BaseException, item: object) -> None:
    print(f"a data worker could not send an item: {_text(error)}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_with_parent() -> None:
    """A worker whose pipe is full waits for its reader, and at its end for the sending thread: for ever, if the main
    process was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
