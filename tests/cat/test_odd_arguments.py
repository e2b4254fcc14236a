"""Whatever a command is given: it does its work, or says in one line what is wrong; a fault of ours it never is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cat.commands import COMMANDS, main
from tests.documented import parser_of
from tests.lookalikes import SMALL, classifier, esc50, event_finder, folder_of_folders

RECIPES = Path(__file__).parents[2] / "recipes"
for module in ("soundfile", "yaml", "sklearn"):
    pytest.importorskip(module)

TINY = SMALL["pretrain"][:7]
# Of every command a call with input that is there.
CALLS: dict[str, list[str]] = {
    "synth": ["out", "--classes", "bird", "rain", "--clips-per-class", "1", "--eval-clips-per-class", "1"],
    "dataset": ["esc50", "esc50.zip", "-o", "out", "--allow-missing", "100000"],
    "prepare": ["sounds", "-o", "out"],
    "shards": ["write", "sounds", "-o", "out"],
    "embed": ["sounds", "--encoder", "logmel", "-o", "out.npy", "--jobs", "1"],
    "pretrain": [str(RECIPES / "tiny.yaml"), *SMALL["pretrain"], "data.train=sounds"],
    "finetune": [str(RECIPES / "finetune.yaml"), *SMALL["finetune"], "data.train=sounds", "encoder=.encoder"],
    "probe": ["logmel", "--train", "sounds", "--valid", "sounds", "--test", "sounds", "--no-cache"],
    "evaluate": ["classifier", "sounds", "-o", "out"],
    "predict": ["events", "sounds/hum/0.wav", "--events"],
    "encode": ["sounds/hum/0.wav", "--encoder", ".encoder", "-o", "out.npz"],
    "similar": ["sounds", "sounds/hum/0.wav", "--encoder", ".encoder"],
    "checkpoints": ["average", ".encoder", "classifier", "-o", "out.safetensors"],
    "export": [".encoder", "out.onnx"],
    "report": [".encoder", "-o", "out.html"],
    "experiment": ["overfit", "--data", "sounds", "--out", "out", *TINY],
    "convert": [".encoder", "out.safetensors"],
    "doctor": ["--report", ".encoder"],
}
INPUTS = ("sounds", "sounds/hum/0.wav", "esc50.zip", ".encoder", "classifier", "events", "data.train=sounds")
ODD_INPUTS = ("", "./nosuch", "garbage.bin", "empty.bin", "line\nbreak", "\udce9", "empty")
ODD_NUMBERS = {int: ("-1", "x", ""), float: ("-1", "nan", "inf", "x")}


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What it says on stderr where it fails, "" where it does not; what it must not say fails the test."""
    try:
        code = main(words)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    err = capsys.readouterr().err
    assert "Traceback" not in err, words
    assert "unexpected" not in err, f"{words}: {err}"
    if code == 0:
        return ""
    errors = [line for line in err.splitlines() if f"cat-audio {words[0]}: error: " in line]
    assert len(errors) == 1, f"{words}: {err}"
    assert err.splitlines()[-1] == errors[0], f"{words}: {err}"
    assert len(errors[0].split("error: ")[1]) > 10, err
    return err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "garbage.bin").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "empty.bin").touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_input_that_is_none(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = CALLS[command]
    places = [number for number, word in enumerate(call) if word in INPUTS or word.startswith("encoder=")]
    assert places or command == "synth"
    for place in places:
        for odd in ODD_INPUTS:
            words = list(call)
            words[place] = f"{words[place].partition('=')[0]}={odd}" if "=" in words[place] else odd
            told([command, *words], capsys)


def number_options(command: str) -> Iterator[tuple[str, str]]:
    for action in parser_of(command)._actions:
        if action.option_strings and action.nargs is None and action.type is not None and action.type is not Path:
            kind = int if getattr(action.type, "__name__", "") in ("int", "natural") else float
            for odd in ODD_NUMBERS[kind]:
                yield action.option_strings[-1], odd


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("pretrain", "experiment", "export")])
def test_numbers_that_are_odd(
    command: str, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other: what the first accepted call writes is the command's own and may be written again."""
    monkeypatch.chdir(ready)
    for option, odd in number_options(command):
        words = [command, *CALLS[command], option, odd]
        err = told(words, capsys)
        assert odd not in ("x", "", "nan") or err, f"{words}: taken for a number"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("odd")
    folder_of_folders(made / "sounds")
    esc50(made / "esc50.zip")
    classifier(made / "classifier")
    event_finder(made / "events")
    return made


def test_every_command_is_here() -> None:
    assert set(CALLS) == set(COMMANDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["predict", "x", "a.wav", "--window", "inf"],
            "--window: 'inf' is no number; expected one such as 0.5",
        ),
        (["encode", "a.wav", "--num-workers", "-1"], "argument --num-workers: '-1' is no whole number from 0 on"),
        (
            ["predict", "x", "a.wav", "--pcm", "f32"],
            "--pcm changes nothing without --stream; add it, or",
        ),
        (["predict", "x", "a.wav", "--gap", "1"], "--gap changes nothing without --events or --stream; add it"),
        (["prepare", "line\nbreak", "-o", "out"], "line break"),
    ],
)
def test_what_is_said(words: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in told(words, capsys)
