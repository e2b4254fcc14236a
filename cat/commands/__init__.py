"""The command ``cat-audio``: a list of sub-commands, a module each; the work is in the rooms below.

A command's module has ``add_arguments(parser)`` and ``run(args) -> int``. Only the module of the command that was asked
for is imported, so that `doctor` works where something else does not.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence

from cat_kernels import __version__

COMMANDS = {
    "pretrain": ("cat.commands.pretrain", "pre-train a model by a recipe, or go on with a run"),
    "probe": ("cat.commands.probe", "kNN and linear probes of an encoder on labelled audio"),
    "experiment": ("cat.commands.experiment", "the first experiments to run, each with a verdict"),
    "embed": ("cat.commands.embed", "write an encoder's embeddings of a data set's clips"),
    "convert": ("cat.commands.convert", "turn a released checkpoint into one of ours"),
    "synth": ("cat.commands.synth", "make a labelled data set of synthetic sound events"),
    "doctor": ("cat.commands.doctor", "say what this machine has and what can run on it"),
}

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of ``command`` only."""
    parser = argparse.ArgumentParser(
        prog="cat-audio", description="Convolutional Audio Transformer: pre-train, embed and probe."
    )
    parser.add_argument("--version", action="version", version=f"cat-audio {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_text) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=help_text, description=help_text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == command:
            module = importlib.import_module(module_name)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by Ctrl-C or SIGTERM."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(command)
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments of a list only in one place; `pretrain a.yaml --resume optim.lr=1e-3` has them
    # in two.
    if rest and not (hasattr(args, "overrides") and all(OVERRIDE.match(word) for word in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}; see cat-audio {command} --help")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("cat-audio: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"cat-audio {command}: error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(note, file=sys.stderr)
        if not isinstance(error, ValueError | OSError | ImportError):
            print("(cat-audio --debug ... shows where)", file=sys.stderr)
        return 1
