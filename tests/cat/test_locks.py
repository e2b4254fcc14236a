"""One process at a time in a folder, and none that is dead."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cat.locks import InUseError, sole_user


@contextmanager
def owner(folder: Path, *, with_worker: bool = False) -> Iterator[int]:
    """A process that holds the folder until it is killed, and perhaps a worker forked from it that lives on."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with sole_user(folder, remedy="wait"):
            worker = os.fork() if with_worker else 0
            if not with_worker or worker:
                os.write(tell, worker.to_bytes(4, "little"))
            time.sleep(600)
        os._exit(0)
    worker = int.from_bytes(os.read(ready, 4), "little")
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if worker:
            try:
                with sole_user(folder, remedy="wait"):  # while the worker lives
                    pass
            finally:
                os.kill(worker, signal.SIGKILL)


def test_a_second_process_is_refused_and_told_whom_to_look_for(tmp_path):
    with owner(tmp_path) as pid:
        begun = time.monotonic()
        message = rf"is in use by process {pid} on .* since \d{{4}}-.* \(.*\); wait for it"
        with pytest.raises(InUseError, match=message), sole_user(tmp_path, remedy="wait for it"):
            pass
        assert time.monotonic() - begun < 1
        assert (tmp_path / ".lock").exists()


def test_a_killed_process_keeps_nothing(tmp_path, capsys):
    with owner(tmp_path) as pid:
        pass
    with sole_user(tmp_path, remedy="wait"):
        assert f"was in use by process {pid}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_outlives_its_parent_keeps_nothing(tmp_path):
    with owner(tmp_path, with_worker=True):
        pass


def test_in_one_process(tmp_path):
    refused = []

    def other() -> None:
        try:
            with sole_user(tmp_path / "a", remedy="wait"):
                pass
        except InUseError as error:
            refused.append(str(error))

    with sole_user(tmp_path / "a", remedy="wait"), sole_user(tmp_path / "b", remedy="wait"):
        with sole_user(tmp_path / "a" / ".." / "a", remedy="wait"):  # again, inside
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with owner_is_refused(tmp_path / "a"):
            pass
    assert "by another thread of this process; wait" in refused[0]
    assert list(tmp_path.iterdir()) == []  # made for the lock, and empty
    other()
    assert len(refused) == 1


@contextmanager
def owner_is_refused(folder: Path) -> Iterator[None]:
    """In another process."""
    pid = os.fork()
    if pid == 0:
        try:
            with sole_user(folder, remedy="wait"):
                os._exit(0)
        except InUseError:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    yield


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match=r"is not a folder: .*file'"), sole_user(path, remedy="wait"):
            pass


def test_content_is_kept(tmp_path):
    with sole_user(tmp_path / "run", remedy="wait"):
        (tmp_path / "run" / "x").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["x"]
