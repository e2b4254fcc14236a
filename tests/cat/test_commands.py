"""What all commands have in common."""

import io
import sys

from cat import commands
from cat.commands import doctor


def test_a_file_name_of_any_bytes_can_be_printed(monkeypatch):
    """A strict stdout raised UnicodeEncodeError after the work was done."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(doctor, "run", lambda args: print("caf\udce9.wav") or 0)
    assert commands.main(["doctor"]) == 0
    stdout.seek(0)
    assert stdout.buffer.getvalue() == b"caf\\udce9.wav\n"
