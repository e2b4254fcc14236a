"""The command ``cat-audio``: a list of sub-commands, a module each; the work is in the rooms below.

A command's module has ``add_arguments(parser)`` and ``run(args) -> int``. Only the module of the command that was asked
for is imported, so that `doctor` works where something else does not, and the overview takes no second: here nothing
imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence

from cat.commands._completion import Completion
from cat.commands._parser import Parser, Version
from cat.commands._stdout import results
from cat.ending import Ended, Unsaid, ending_on_signals
from cat.progress import say

COMMANDS = {
    "pretrain": ("cat.commands.pretrain", "pre-train a model by a recipe, or go on with a run"),
    "finetune": ("cat.commands.finetune", "train a classifier on a pre-trained encoder by a recipe"),
    "evaluate": ("cat.commands.evaluate", "score a fine-tuned checkpoint on labelled audio"),
    "probe": ("cat.commands.probe", "probes of an encoder on labelled audio: kNN, linear, layers"),
    "experiment": ("cat.commands.experiment", "experiments with a verdict; the paper's claims"),
    "report": ("cat.commands.report", "runs side by side on one HTML page: curves, settings, clips"),
    "predict": ("cat.commands.predict", "classes or events of audio files, or of a stream"),
    "encode": ("cat.commands.encode", "embeddings of audio files, and of their frames, in one table"),
    "similar": ("cat.commands.similar", "find the sounds in a folder that are most like one"),
    "export": ("cat.commands.export", "write a model as ONNX, or for torch.export"),
    "checkpoints": ("cat.commands.checkpoints", "look at, check, average and publish checkpoints"),
    "embed": ("cat.commands.embed", "write embeddings of a data set, to pre-train with"),
    "prepare": ("cat.commands.prepare", "check, measure and convert audio, and list what can be used"),
    "dataset": ("cat.commands.dataset", "turn a public data set into manifests, official splits"),
    "shards": ("cat.commands.shards", "a data set as a few tar files, local or behind a URL"),
    "synth": ("cat.commands.synth", "make a labelled data set of synthetic sound events"),
    "convert": ("cat.commands.convert", "turn a released checkpoint into one of ours"),
    "doctor": ("cat.commands.doctor", "say what this machine has and what can run on it"),
}

# How `cat-audio --help` lists them.
GROUPS = {
    "train": ("pretrain", "finetune", "experiment"),
    "evaluate": ("evaluate", "probe", "report"),
    "use": ("predict", "encode", "similar", "export", "checkpoints", "convert"),
    "data": ("prepare", "dataset", "shards", "synth", "embed"),
    "check": ("doctor",),
}

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def build_parser(*commands: str) -> argparse.ArgumentParser:
    """The parser, with the arguments of these commands only."""
    parser = Parser(
        prog="cat-audio",
        usage="cat-audio [--debug] COMMAND ...",
        description="Convolutional Audio Transformer: train it, evaluate it, use it.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--completion", action=Completion, parser=lambda: build_parser(*COMMANDS), help="print what completes commands"
    )
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog="cat-audio", help=argparse.SUPPRESS
    )
    for name, (module_name, text) in COMMANDS.items():
        formatter = argparse.RawDescriptionHelpFormatter
        sub = subparsers.add_parser(name, help=text, description=text, formatter_class=formatter)
        if name in commands:
            module = importlib.import_module(module_name)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run, parser=sub)
    return parser


def _overview() -> str:
    """argparse lists sub-commands in one column; here they stand in groups."""
    width = max(map(len, COMMANDS))
    groups = (
        "\n".join([f"{title}:", *(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names)])
        for title, names in GROUPS.items()
    )
    return "\n\n".join([*groups, "cat-audio COMMAND --help says what a command takes."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code:

    ====  ============================================================================
    0     done
    1     failed, or could not write its results to stdout; a sentence on stderr says why
    2     wrong usage
    129   stopped by SIGHUP, 130 by Ctrl-C, 143 by SIGTERM
    141   done, but the reader of stdout had gone (``cat-audio ... | head -1``)
    ====  ============================================================================
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with results() as stdout:
        code = _run(argv)
    if stdout is None or stdout.error is None or code != 0:
        return code
    if isinstance(stdout.error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    say(f"cat-audio: error: the results could not be written to stdout: {stdout.error.strerror}")
    return 1


def _run(argv: list[str]) -> int:
    command = next((word for word in argv if not word.startswith("-")), "")
    try:
        parser = build_parser(command)
        first = next((word for word in argv if word != "--debug"), None)
        if first is None:
            parser.print_help(sys.stderr)
            return 2
        if first == command and command not in COMMANDS:
            parser.error(f"there is no command {command!r}{_nearest(command, COMMANDS)}")
        args, rest = parser.parse_known_args(argv)
        # argparse takes positional arguments that may be missing only in one place; `pretrain a.yaml --resume
        # optim.lr=1e-3` and `dataset esc50 -o DIR ARCHIVE` have them in two. It can, but not below sub-commands.
        own = vars(args).pop("parser")
        if rest:
            words = argv[argv.index(command) + 1 :]
            args, rest = own.parse_known_intermixed_args(words, argparse.Namespace(command=command, debug=args.debug))
            vars(args).pop("parser")
        strange = rest or [word for word in getattr(args, "overrides", ()) if not OVERRIDE.match(word)]
        if strange:
            own.error(f"unknown arguments: {' '.join(strange)}{_nearest(strange[0], own._option_string_actions)}")
        with ending_on_signals():
            return int(args.run(args))
    except Ended as ended:
        say(f"cat-audio: stopped by {signal.Signals(ended.number).name}")
        return ended.exit_code
    except KeyboardInterrupt:
        say("cat-audio: interrupted")
        return 130
    except Unsaid as error:  # another process says why
        for note in getattr(error, "__notes__", []):
            say(note)
        return 1
    except Exception as error:
        if "--debug" in argv:
            raise
        name = f"cat-audio {command}" if command in COMMANDS else "cat-audio"
        sentence = " ".join(_sentence(error).splitlines())  # a file's name may have a line break
        say("\n".join([f"{name}: error: {sentence}", *getattr(error, "__notes__", [])]))
        return 1


def _nearest(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def _sentence(error: Exception) -> str:
    """What went wrong, for people, and what to do about it."""
    text = str(error)
    where = "(cat-audio --debug ... shows where)"
    # torch.OutOfMemoryError by its name: what fails before torch is imported need not wait for it.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"out of memory{f' ({text})' if text else ''}; try smaller batches (data.batch_size, --batch-size) or "
            f"fewer data workers {where}"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        named = " and ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{named}: {error.strerror}"
    if isinstance(error, ValueError | OSError | ImportError) and text:
        return text
    if isinstance(error, RuntimeError) and text and type(error).__module__.partition(".")[0] in ("cat", "cat_kernels"):
        return text
    if isinstance(error, RuntimeError) and text:
        return f"{text} {where}"
    return (
        f"unexpected {type(error).__name__}: {text}. This is a fault of cat-audio. Please report it, with what "
        "cat-audio --debug ... and cat-audio doctor --report print"
    )
