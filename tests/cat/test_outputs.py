"""What a command may write: nothing of the user's is replaced, and no input ever."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cat.outputs import Output, OutputError, claim


def mine(path: Path) -> Output:
    return Output(path, lambda path: path.read_text().startswith("mine"), "another -o")


def test_new_files_and_own_ones_are_free(tmp_path):
    (tmp_path / "a").write_text("mine, from before")
    claim([mine(tmp_path / "a"), mine(tmp_path / "new" / "folders" / "b")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # nothing is made either


@pytest.mark.parametrize("content", [b"years of work", b"", b"\xff\xfe"])
def test_a_foreign_file_is_replaced_only_when_asked(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(OutputError, match=r"/a exists, .*left alone. Give another -o, or --overwrite to replace it\."):
        claim([mine(tmp_path / "a")])
    claim([mine(tmp_path / "a")], overwrite=True)


@pytest.mark.parametrize("name", ["in", "symbolic", "hard", "folder/../in", "dangling"])
def test_an_input_is_never_replaced(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "in").write_text("mine")
    (tmp_path / "symbolic").symlink_to("in")
    os.link(tmp_path / "in", tmp_path / "hard")
    (tmp_path / "dangling").symlink_to("nowhere")
    if name == "dangling":  # not an input, but somebody made it
        with pytest.raises(OutputError, match="dangling exists"):
            claim([mine(Path(name))], inputs=[tmp_path / "in"])
        return
    with pytest.raises(OutputError, match="which this command reads; that is never done"):
        claim([mine(Path(name))], inputs=[None, tmp_path / "in"], overwrite=True)


def test_two_outputs_are_two_files(tmp_path):
    with pytest.raises(OutputError, match="written twice"):
        claim([mine(tmp_path / "a"), mine(tmp_path / "x" / ".." / "A")])


def test_places_that_no_file_can_have(tmp_path):
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path, "is a folder; expected the name of a file"),
        (Path("/dev/null"), "a device or a pipe; expected the name of a file"),
        (tmp_path / "file" / "a", "is not a folder to write to"),
    ):
        with pytest.raises(OutputError, match=words):
            claim([mine(path)], overwrite=True)
