"""Progress with and without a terminal, and with nobody who listens."""

from __future__ import annotations

import io
import os
import sys

import pytest

from cat.progress import Progress, say, track


def test_progress_without_a_terminal_prints_lines_now_and_then(capsys):
    progress = Progress(100, 0, label="run", seconds_between_lines=1000)
    progress.advance(10, "loss 1.5000, 20.0 clips/s")
    progress.advance(20, "loss 1.4000, 20.0 clips/s")
    progress.say("hello")
    progress.advance(100, "loss 1.0000, 20.0 clips/s")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["run: 10/100 steps", "hello", "run: 100/100 steps"]
    for part in ("loss 1.5000", "20.0 clips/s", "left"):
        assert part in lines[0]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(100, 40, label="run")
    progress.advance(50, "loss 1.5000, 20.0 clips/s")
    progress.say("hello")
    progress.close()
    shown = terminal.getvalue()
    for part in ("run", "50%", "50/100 steps", "loss 1.5000", "20.0 clips/s", "hello\n", "<"):
        assert part in shown


def test_progress_can_be_silent(capsys):
    progress = Progress(10, 0, label="run", enabled=False)
    progress.advance(10, "loss 1.0000, 1.0 clips/s")
    progress.say("hello")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_items_are_counted(capsys):
    assert list(track("abc", 3, label="letters", unit="of them")) == ["a", "b", "c"]
    assert "letters: 3/3 of them" in capsys.readouterr().err.splitlines()[-1]


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def without_a_reader():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1, closefd=True)


def on_a_full_disk():
    return open("/dev/full", "w", buffering=1)


@pytest.mark.parametrize("stderr", [lambda: None, closed, without_a_reader, on_a_full_disk])
def test_nobody_listens_and_the_work_goes_on(monkeypatch, stderr):
    stream = stderr()
    monkeypatch.setattr(sys, "stderr", stream)
    say("hello")
    assert list(track("abc", 3, label="letters", unit="letters")) == ["a", "b", "c"]
    progress = Progress(3, label="run", seconds_between_lines=0)
    progress.advance(1)
    progress.say("hello")
    progress.close()
    if stream is not None and not stream.closed:
        with pytest.raises(OSError, match=r"Broken pipe|No space left"):
            stream.write("this stream does fail\n")
