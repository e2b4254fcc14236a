"""Files appear whole or not at all, whoever dies on the way, and nothing is left of those who did."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cat import files
from cat.files import cache_folder, check_writable, new_folder, replacing, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def process(work) -> Iterator[int]:
    """A forked process that says when it has come to `yield` in the generator `work`, and then waits to be killed."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        for _ in work():
            os.write(tell, b"x")
            time.sleep(600)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
        with new_folder(tmp_path / "folder") as folder, replacing(folder / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    for path, mode in (("a.json", 0o666), ("folder/a.safetensors", 0o666), ("folder", 0o777)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode & ~umask, path


def test_an_exception_leaves_what_was_there(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(TypeError), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("new, half") + "no number"
    with pytest.raises(TypeError), new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("half") + "no number"
    assert (names(tmp_path), (tmp_path / "a.json").read_text()) == (["a.json"], "old")


def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device \(.*are free there\); make room.*a\.json"),
        replacing(tmp_path / "a.json"),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    assert names(tmp_path) == []


def test_a_write_that_makes_no_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.json"), replacing(tmp_path / "a.json"):
        pass
    assert names(tmp_path) == []


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link.json").symlink_to("far/real.json")
    for value in (1, 2):  # the first time it dangles
        write_json(tmp_path / "link.json", value)
        assert (tmp_path / "far" / "real.json").read_text() == f"{value}\n"
    assert (names(tmp_path), names(tmp_path / "far")) == (["far", "link.json"], ["real.json"])
    assert (tmp_path / "link.json").is_symlink()


def test_what_is_no_file_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; expected the name of a file"):
        write_json(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a device or a pipe"):
        write_json(tmp_path / "pipe", 1)
    with pytest.raises(OSError, match="is a device or a pipe"):
        write_json("/dev/null", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "full"):
        pass
    assert names(tmp_path / "full") == ["x"]


def test_names_as_long_as_they_may_be(tmp_path):
    name = "ä" * 125 + ".json"
    write_json(tmp_path / name, 1)
    assert names(tmp_path) == [name]


def test_a_folder_that_must_not_be_written_to_is_named():
    with tempfile.TemporaryDirectory() as root:
        locked = Path(root, "locked")
        locked.mkdir(mode=0o555)
        os.chmod(root, 0o755)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=rf"may be written to: {locked}.*{locked}/a\.json"):
                write_json(locked / "a.json", 1)
            with pytest.raises(PermissionError, match=str(locked)):
                check_writable(locked)
        finally:
            os.seteuid(before)


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new")
    assert names(tmp_path / "new") == []


def test_what_a_killed_writer_left_goes_at_the_next_write(tmp_path):
    def write():
        with replacing(tmp_path / "big.npy") as temporary:
            temporary.write_text("half")
            yield

    (tmp_path / ".big.npy.mine4you.tmp").mkdir()  # of somebody else: it has no lock
    with process(write):
        assert len(names(tmp_path)) == 2
        write_json(tmp_path / "a.json", 1)
        assert len(names(tmp_path)) == 3, "the living writer's stays"
    assert len(names(tmp_path)) == 3
    write_json(tmp_path / "b.json", 1)
    assert names(tmp_path) == [".big.npy.mine4you.tmp", "a.json", "b.json"]


def test_another_machines_leftovers_go_when_they_have_been_silent_for_a_day(tmp_path, monkeypatch):
    def write():
        with new_folder(tmp_path / "big") as folder:
            (folder / "half").write_text("half")
            yield

    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with process(write):
        pass
    monkeypatch.undo()
    now = time.time()
    with monkeypatch.context() as patch:  # this machine's clock is wrong; the files' times are the server's
        patch.setattr(time, "time", lambda: now + 25 * 3600)
        write_json(tmp_path / "a.json", 1)
    (left,) = set(names(tmp_path)) - {"a.json"}
    for path in (*(tmp_path / left).rglob("*"), tmp_path / left):
        os.utime(path, (now - 25 * 3600,) * 2)
    write_json(tmp_path / "a.json", 1)
    assert names(tmp_path) == ["a.json"]


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), real_replace(a, b)))
    write_json(tmp_path / "a.json", 1)
    assert [Path(entry).name for entry in done] == ["a.json", "replace", tmp_path.name]


def test_an_error_about_something_else_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as error, replacing(tmp_path / "a.json"):
        Path("/nowhere/input").read_text()
    assert (error.value.filename, error.value.errno) == ("/nowhere/input", errno.ENOENT)
    with pytest.raises(BrokenPipeError) as error, replacing(tmp_path / "a.json"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # of a data worker, say
    assert error.value.filename is None


def test_a_folder_of_many_files(tmp_path, monkeypatch):
    def make(name):
        with new_folder(tmp_path / name) as folder:
            for i in range(200):
                (folder / f"{i}").touch()

    flushed = []
    flush = files.flush_to_disk
    monkeypatch.setattr(files, "flush_to_disk", lambda path: flushed.append(path.name) or flush(path))
    make("many")
    assert sorted(flushed) == sorted([*(str(i) for i in range(200)), "many", tmp_path.name])
    monkeypatch.setattr(files, "flush_to_disk", lambda path: os.close(-1) if path.name == "7" else None)
    with pytest.raises(OSError, match="Bad file"):
        make("again")
    assert names(tmp_path) == ["many"]


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder("probe") == Path("/somewhere/cat-audio/probe")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the specification
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder("probe") == Path("/home/me/.cache/cat-audio/probe")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert cache_folder("probe") is None
