"""The command: every error a sentence, results on stdout or an exit code that says they are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cat.commands import COMMANDS, GROUPS, main

REPOSITORY = Path(__file__).parents[2]


def fails_with(monkeypatch, capsys, error: BaseException, *options: str) -> str:
    def failing() -> str:
        raise error

    monkeypatch.setattr("cat.commands.doctor.report", failing)
    assert main([*options, "doctor"]) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("x is 3; expected 4"), "cat-audio doctor: error: x is 3; expected 4\n"),
        (ValueError(), "unexpected ValueError: "),
        (FileNotFoundError(2, "No such file or directory", "a.npy"), "error: a.npy: No such file or directory\n"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "error: a and b: Invalid cross-device link\n"),
        (OSError("without a number"), "error: without a number\n"),
        (RuntimeError("broken"), "error: broken (cat-audio --debug ... shows where)\n"),
        (MemoryError(), "error: out of memory; try smaller batches (data.batch_size, --batch-size)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "error: out of memory (DefaultCPUAllocator"),
        (torch.OutOfMemoryError("CUDA out of memory."), "error: out of memory (CUDA out of memory.); try smaller"),
        (KeyError("clap"), "error: unexpected KeyError: 'clap'. This is a fault of cat-audio. Please report it"),
        (AssertionError(), "unexpected AssertionError"),
        (EOFError(), "unexpected EOFError"),
        (KeyboardInterrupt(), "cat-audio: interrupted"),
    ],
)
def test_every_error_is_a_sentence(monkeypatch, capsys, error, sentence):
    told = fails_with(monkeypatch, capsys, error)
    assert sentence in told
    assert "Traceback" not in told


def test_notes_of_an_error_are_told(monkeypatch, capsys):
    error = ValueError("x is 3")
    error.add_note("step 7 is saved")
    assert fails_with(monkeypatch, capsys, error).endswith("error: x is 3\nstep 7 is saved\n")


def test_debug_shows_where(monkeypatch, capsys):
    with pytest.raises(KeyError):
        fails_with(monkeypatch, capsys, KeyError("clap"), "--debug")


@pytest.mark.parametrize("command", ["embed", "probe"])
def test_a_device_that_is_not_here(command, capsys):
    arguments = {
        "embed": ["embed", "nowhere", "--encoder", "logmel", "-o", "x.npy"],
        "probe": ["probe", "random", "--train", "a", "--valid", "a", "--test", "a"],
    }[command]
    for device, message in (("cuda:99", "torch sees"), ("tpu", "expected auto, cpu, cuda or cuda:<index>")):
        assert main([*arguments, "--device", device]) == 1
        assert f"--device is '{device}'" in (told := capsys.readouterr().err)
        assert message in told


def test_the_overview_lists_every_command_once_in_a_group(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    listed = re.findall(r"^  (\w+)  +\w", told, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    for title, names in GROUPS.items():
        assert f"\n{title}:\n  {names[0]}" in told
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dataset", "esc50", "-o", "out", "archive.zip"], {"name": "esc50", "source": Path("archive.zip")}),
        (["dataset", "esc50", "archive.zip", "-o", "out"], {"name": "esc50", "source": Path("archive.zip")}),
        (["dataset", "-o", "out", "esc50", "--quiet", "archive.zip"], {"source": Path("archive.zip"), "quiet": True}),
        (["dataset", "esc50", "--download", "-o", "out"], {"source": None, "download": True}),
        (["pretrain", "a.yaml", "x.y=1", "--resume", "x.z=2"], {"recipe": "a.yaml", "overrides": ["x.y=1", "x.z=2"]}),
        (["--debug", "pretrain", "a.yaml", "--resume", "x.z=2"], {"overrides": ["x.z=2"], "debug": True}),
        (["predict", "run", "a.wav", "--top", "3", "b.wav"], {"checkpoint": "run", "files": ["a.wav", "b.wav"]}),
        (["predict", "run", "--top", "3", "a.wav"], {"checkpoint": "run", "files": ["a.wav"], "top": 3}),
    ],
)
def test_options_may_stand_anywhere(monkeypatch, words, expected):
    given = {}
    command = next(word for word in words if word in COMMANDS)
    monkeypatch.setattr(f"cat.commands.{command}.run", lambda args: given.update(vars(args)) or 0)
    assert main(words) == 0
    assert {name: given[name] for name in expected} == expected
    assert "parser" not in given


@pytest.mark.parametrize(
    ("words", "strange"),
    [
        (["dataset", "esc50", "-o", "out", "archive.zip", "more"], "more"),
        (["dataset", "esc50", "-o", "out", "--nosuch", "archive.zip"], "--nosuch"),
        (["pretrain", "a.yaml", "--resume", "nosuch"], "nosuch"),
        (["pretrain", "a.yaml", "--resume", "--nosuch"], "--nosuch"),
    ],
)
def test_arguments_that_nobody_takes(capsys, words, strange):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"unknown arguments: {strange}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["prerain"], "cat-audio: error: there is no command 'prerain' (did you mean pretrain?); see cat-audio --help"),
        (["--debug", "x"], "cat-audio: error: there is no command 'x'; see cat-audio --help"),
        (["--nosuch"], "cat-audio: error: the following arguments are required: COMMAND; see cat-audio --help"),
        (["synth", "x", "--sede", "3"], "arguments: --sede 3 (did you mean --seed?); see cat-audio synth --help"),
        (["synth", "x", "--seed", "y"], "--seed: invalid int value: 'y'; see cat-audio synth --help"),
        (["dataset", "esc51", "-o", "x"], "invalid choice: 'esc51' (choose from"),
    ],
)
def test_a_mistake_is_told_in_one_line(capsys, words, told):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_no_command_shows_which_there_are(capsys):
    assert main([]) == 2
    assert "\n  pretrain " in capsys.readouterr().err


def test_the_overview_waits_for_nothing_that_it_does_not_need():
    """PyTorch takes a second to import; errors are told without it too."""
    code = (
        "import sys; from cat.commands import main\n"
        "for words in (['--help'], ['prerain']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, capsys, tmp_path):
    """Of commands, options, choices and files; what bash makes of it is asked."""
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        main(["--completion", shell])
    script = tmp_path / f"completion.{shell}"
    script.write_text(capsys.readouterr().out)
    if shell != "bash":
        assert all(name in script.read_text() for name in (*COMMANDS, "speechcommands"))
        return
    (tmp_path / "recipe.yaml").touch()
    for words, expected in {
        "pre": {"pretrain", "predict", "prepare"},
        "evaluate --fig": {"--figures"},
        "dataset esc": {"esc50", "esc10"},
        "predict --aggregate m": {"mean", "max"},
        "pretrain rec": {"recipe.yaml"},
    }.items():
        ask = (
            f"source {script}; COMP_WORDS=(cat-audio {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
            '_shtab_cat_audio cat-audio "${COMP_WORDS[-1]}"; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == expected, words


def test_completion_without_its_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--completion", "bash"]) == 1
    assert capsys.readouterr().err == (
        "cat-audio: error: shell completion needs shtab: pip install 'cat-kernels[train]'\n"
    )


def written_to(monkeypatch, stream, text: str = "word\n") -> int:
    monkeypatch.setattr("cat.commands.doctor.report", lambda: text)
    monkeypatch.setattr(sys, "stdout", stream)
    return main(["doctor"])


def test_the_reader_of_stdout_has_gone(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        assert written_to(monkeypatch, stream) == 141
    assert capsys.readouterr().err == ""


def test_stdout_is_full(monkeypatch, capsys):
    with open("/dev/full", "w") as stream:
        assert written_to(monkeypatch, stream) == 1
    assert capsys.readouterr().err == (
        "cat-audio: error: the results could not be written to stdout: No space left on device\n"
    )


def test_work_goes_on_when_stdout_has_failed(monkeypatch):
    done = []

    def report() -> str:
        print("x" * 100_000)  # more than a buffer
        done.append(True)
        return ""

    monkeypatch.setattr("cat.commands.doctor.report", report)
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["doctor"]) == 1
    assert done == [True]


def test_no_stdout_at_all(monkeypatch):
    assert written_to(monkeypatch, None) == 0


def test_names_that_are_no_text(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        assert written_to(monkeypatch, stream, "caf\udce9 ä") == 0
    assert (tmp_path / "out").read_text() == "caf\\udce9 \\xe4\n"


def test_in_a_process_with_closed_descriptors(tmp_path):
    """A file that is opened later must not get the number of stdout or stderr, which C libraries print to."""
    code = (
        "import os; os.closerange(0, 3)\n"
        "from cat.commands._stdout import results\n"
        "with results():\n"
        f"    os._exit(os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode > 2
