"""Data workers that cannot send what they made, or die: nothing is lost, nothing hangs, and people are told."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch

from cat.data import workers
from cat.data.workers import WorkerDied, prefetched

SIZE = 1 << 16  # more than a pipe holds


class Squares:
    """Item i is (i * i, a tensor of it); ``at``: a key and what happens there."""

    def __init__(self, at=None):
        self.at = at

    def __getitem__(self, key):
        if self.at is not None and key == self.at[0]:
            self.at[1]()
        return key * key, torch.full((SIZE,), key * key)


class Wide(Squares):
    """Items of eight tensors: each takes a file descriptor while it is shared."""

    def __getitem__(self, key):
        return key * key, *(torch.full((SIZE,), key * key) for _ in range(8))


class Unsendable:
    def __reduce__(self):
        raise OSError("no way")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise KeyError("a surprise")


@pytest.fixture
def in_time():
    """What hangs fails."""

    def late(number, frame):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(40)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


pytestmark = pytest.mark.usefixtures("in_time")


def made(dataset=None, keys=range(7), num_workers=2, **options):
    """The items, checked, and what was said."""
    said = []
    items = list(prefetched(dataset or Squares(), keys, num_workers=num_workers, warn=said.append, **options))
    assert [number for number, *_ in items] == [key * key for key in keys]
    assert all(tensor.eq(number).all() for number, *tensors in items for tensor in tensors)
    return said


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_items_come_in_order(num_workers):
    assert made(num_workers=num_workers, keys=range(3, 12)) == []


@pytest.mark.slow  # they import torch
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked(monkeypatch, method):
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)
    assert made(keys=range(3), num_workers=1) == []


# ---------------------------------------------------------------- what cannot be shared


def test_a_temporary_folder_whose_path_is_too_long_for_a_socket(tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)  # of other tests
    (said,) = made()
    assert "cannot share memory (OSError: AF_UNIX path too long)" in said
    for remedy in ("--shm-size=8g", "TMPDIR=/tmp", "ulimit -n"):
        assert remedy in said


FEW_DESCRIPTORS = """
import resource
filled = [os.open(os.devnull, os.O_RDONLY)]
while max(map(int, os.listdir("/proc/self/fd"))) > filled[-1] + 1:  # + 1: of the listing itself
    filled.append(os.dup(filled[0]))
for count in (200, *range(60, 0, -5)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (filled[-1] + 1 + count, count + 1000))
    print(*t.made(t.Wide()))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_hardly_any_file_descriptor_left():
    said = in_another_process(FEW_DESCRIPTORS).stdout
    assert said.startswith("\n")  # with enough of them, nothing
    assert "workers cannot be started (OSError: [Errno 24]" in said
    assert "cannot share memory (OSError: [Errno 24]" in said


def in_another_process(code):
    code = f"import os, sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_workers as t\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=False)


def test_memory_that_cannot_be_shared(monkeypatch):
    def full(*args):
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    (said,) = made()
    assert "No space left on device" in said


def test_what_is_shared_cannot_be_opened(monkeypatch):
    monkeypatch.setattr(workers, "_loads", loads := Once(workers._loads))
    (said,) = made()
    assert loads.failed
    assert "cannot be opened (EOFError)" in said


class Once:
    """A function whose third call fails."""

    def __init__(self, function):
        self.function, self.calls, self.failed = function, 0, False

    def __call__(self, *args):
        self.calls += 1
        if self.calls == 3:
            self.failed = True
            raise EOFError
        return self.function(*args)


# ---------------------------------------------------------------- workers that die


@pytest.fixture
def soon(monkeypatch):
    """torch asks more often than every five seconds whether its workers live."""
    get = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(get, "__defaults__", (0.2,))


def test_a_killed_worker_is_noticed_and_memory_is_named(soon):
    found = []
    with pytest.raises(WorkerDied, match=r"was killed \(SIGKILL\), most likely because memory ran out: take"):
        found.extend(prefetched(Squares(at=(3, kill)), range(9), num_workers=2))
    assert len(found) <= 3  # what a dead worker had shared is gone


def test_a_dying_worker_is_not_taken_for_one_that_cannot_share(monkeypatch):
    """What it shares is gone a moment before its end can be seen."""

    def loads(content):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        raise ConnectionRefusedError

    monkeypatch.setattr(workers, "_loads", loads)
    said = []
    with pytest.raises(WorkerDied, match=r"was killed \(SIGKILL\)"):
        list(prefetched(Squares(), range(9), num_workers=2, warn=said.append))
    assert not said


def test_a_worker_killed_in_the_middle_of_a_message(monkeypatch):
    monkeypatch.setattr(workers, "ForkingPickler", None)
    monkeypatch.setattr(workers, "_plain", lambda item: Stopping())  # pickled by the thread that sends
    with pytest.raises(WorkerDied):
        list(prefetched(Squares(), range(9), num_workers=2))


class Stopping:
    """Of its message the worker sends a half before it is killed."""

    def __reduce__(self):
        multiprocessing.connection.Connection._send = half
        return bytes, (b"x" * 1_000_000,)


def half(self, content, write=os.write):
    threading.Timer(0.3, kill).start()
    write(self._handle, content[: len(content) // 2])
    time.sleep(60)


def test_a_death_does_not_interrupt_other_work():
    """torch would raise wherever the main process is, in the middle of an optimiser's step too."""
    items = prefetched(Squares(), range(99), num_workers=1, prefetch=1)
    next(items)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    for _ in range(1000):
        pass
    with pytest.raises(WorkerDied):
        list(items)


def test_an_item_that_is_lost_in_the_sending_thread_ends_the_worker(monkeypatch, capfd, soon):
    monkeypatch.setattr(workers._Packing, "__getitem__", lambda self, key: Unsendable())
    with pytest.raises(WorkerDied, match="ended with exit code 1; what it said is above"):
        list(prefetched(Squares(), range(3), num_workers=1))
    assert "could not send an item: OSError: no way" in capfd.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_the_data_set_raises_is_raised(num_workers):
    with pytest.raises(KeyError, match="a surprise"):
        list(prefetched(Squares(at=(1, fail)), range(3), num_workers=num_workers))


class TwoArguments(ValueError):
    """Takes more than its text, as many do, and so does not come back from a pipe."""

    def __init__(self, text: str, more: int) -> None:
        super().__init__(text)


@pytest.mark.parametrize(("error", "cause"), [(ValueError("no: 7; expected 8"), "line"), (TwoArguments("7", 8), None)])
def test_an_error_of_a_worker_has_its_own_words(error, cause):
    """And no traceback among them, which is told with that of the main process; unless it cannot travel."""

    def fail():
        raise error

    with pytest.raises((ValueError, RuntimeError)) as raised:
        list(prefetched(Squares(at=(1, fail)), range(3), num_workers=1))
    if cause is None:
        assert "Caught TwoArguments in DataLoader worker process 0" in str(raised.value)
    else:
        assert str(raised.value) == str(error)
        assert "test_workers.py" in str(raised.value.__cause__)


KILLED = """
t.workers.ForkingPickler = None  # nothing can be shared
items = t.prefetched(t.Squares(), range(99), num_workers=2, prefetch=4, warn=lambda text: None)
next(items)
print(*[child.pid for child in t.multiprocessing.active_children()], flush=True)
t.time.sleep(0.5)
t.kill()
"""


def test_workers_end_with_a_process_that_is_killed_even_when_their_pipe_is_full():
    pids = list(map(int, in_another_process(KILLED).stdout.split()))
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def alive(pid):
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    return False
