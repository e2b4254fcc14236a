"""``cat-audio checkpoints``: what is in them, whether they are whole, averages of them, models to publish."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cat.checkpoints.average import AVERAGED, average
from cat.checkpoints.inspection import Contents, Row, TensorInfo, contents, listed, members, verify
from cat.commands._json import add_json, as_json, tell
from cat.commands._parser import finite
from cat.encoders import POOLINGS, CATEncoder
from cat.files import format_bytes
from cat.outputs import Output, claim
from cat.prediction import CATClassifier
from cat.progress import say

EPILOG = """\
PATH is a run, which stands for all its checkpoints, a checkpoint, or a .safetensors file.

  list      steps, scores (lower is better) and sizes, and which one is the newest, which the best
  inspect   what is in a checkpoint (of a run, in its newest): tensors, configuration, how it was made
  verify    read all of it: complete, the bytes that were written, all values finite, tensors that fit the model
  average   the average of several, a .safetensors file (-o); with --ema D a moving average over their steps
  export    a model as a folder for the Hugging Face hub (-o): what CATEncoder and CATClassifier publish

examples:
  cat-audio checkpoints list runs/tiny
  cat-audio checkpoints verify runs/tiny --json
  cat-audio checkpoints average runs/tiny --last 2 -o averaged.safetensors
  cat-audio checkpoints export runs/tiny -o published --weights teacher

Exit code 1 when `verify` finds a damaged one. `cat-audio export` writes ONNX, `cat-audio convert` reads released files.
"""
ACTIONS = ("list", "inspect", "verify", "average", "export")
# option -> the actions that have it
_OF = {
    "out": ("average", "export"),
    "last": ("average",),
    "ema": ("average",),
    "overwrite": ("average",),
    "weights": ("export",),
    "encoder": ("export",),
    "pooling": ("export",),
    "license": ("export",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=f"one of: {', '.join(ACTIONS)}")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="runs, checkpoints, .safetensors files")
    add_json(parser)
    parser.add_argument("-o", "--out", type=Path, metavar="OUT", help="average: a .safetensors file; export: a folder")
    parser.add_argument("--last", type=int, metavar="N", help="average: of each run the newest N")
    parser.add_argument("--ema", type=finite, metavar="D", help="average: a moving average of this decay, as 0.9")
    parser.add_argument("--overwrite", action="store_true", help="average: replace a file that it did not write")
    parser.add_argument("--weights", choices=("student", "teacher"), help="export: of a pre-trained one")
    parser.add_argument("--encoder", action="store_true", help="export: of a fine-tuned one the encoder alone")
    parser.add_argument("--pooling", choices=POOLINGS, help="export: of the encoder's tokens, to one embedding a clip")
    parser.add_argument("--license", help='export: of the weights, for the model card, as "cc-by-4.0"')


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    act = {"list": _list, "inspect": _inspect, "verify": _verify, "average": _average, "export": _export}
    return act[args.action](args)


def _check_options(args: argparse.Namespace) -> None:
    for option, actions in _OF.items():
        given = getattr(args, option)
        if given not in (None, False) and args.action not in actions:
            raise ValueError(f"--{option} belongs to {' and '.join(actions)}, not to {args.action}; leave it out")
    if args.action in _OF["out"] and args.out is None:
        what = "the .safetensors file" if args.action == "average" else "the folder"
        raise ValueError(f"-o is missing; expected {what} to write")


# ---------------------------------------------------------------- looking


def _list(args: argparse.Namespace) -> int:
    rows = [row for path in args.paths for row in listed(path)]
    if args.json:
        print(as_json(rows))
        return 0
    width = max((len(str(row.path)) for row in rows), default=0)
    print(f"{'checkpoint':<{width}} {'step':>9} {'score':>10} {'size':>9}")
    for row in rows:
        line = f"{row.path!s:<{width}} {_or_dash(row.step):>9} {_score(row.score):>10} {_size(row):>9}  {_marks(row)}"
        print(line.rstrip())
    return 0


def _marks(row: Row) -> str:
    marks = [name for name, holds in (("newest", row.newest), ("best", row.best)) if holds]
    return ", ".join([*marks, *([f"damaged: {row.damage}"] if row.damage else [])])


def _inspect(args: argparse.Namespace) -> int:
    found = [contents(members(path)[-1]) for path in args.paths]
    if args.json:
        print(as_json([_value(one) for one in found]))
    else:
        print("\n\n".join(_told(one) for one in found))
    return 0


def _value(found: Contents) -> dict[str, Any]:
    files = {
        file: {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in tensors.items()}
        for file, tensors in found.files.items()
    }
    state = {key: value for key, value in found.state.items() if key != "config"}
    about = {key: json.loads(value) if key == AVERAGED else value for key, value in found.about.items()}
    return {"path": str(found.path), **about, **state, "step": found.step, "config": found.config, "files": files}


def _told(found: Contents) -> str:
    state = found.state
    lines = [str(found.path), f"  step         {_or_dash(found.step)}"]
    if state:
        lines.append(f"  score        {_score(state.get('score'))} (lower is better)")
        lines.append(f"  checksums    {'in state.json' if 'sha256' in state else 'none: of an earlier version'}")
    lines += [f"  {name:<12} {_flat(value)}" for name, value in _sections(found)]
    for file, tensors in found.files.items():
        size = sum(tensor.bytes for tensor in tensors.values())
        lines.append(f"  {file}: {len(tensors)} tensors, {format_bytes(size)}")
        for group, (count, values, dtypes) in _groups(tensors).items():
            lines.append(f"    {group:<14} {count:>5} tensors {values:>13,} values  {', '.join(dtypes)}")
    return "\n".join(lines)


def _sections(found: Contents) -> Iterable[tuple[str, Any]]:
    """What the configuration and the state say of how it is built and was made."""
    for name in ("model", "features", "task", "classes", "head"):
        if name in found.config:
            yield name, found.config[name]
    for name in ("made_with", "data"):
        if found.state.get(name):
            yield name.replace("_", " "), found.state[name]
    yield from found.about.items()


def _flat(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(f"{key}={inner}" for key, inner in value.items() if inner is not None)


def _groups(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int, list[str]]]:
    """By the first part of their names."""
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, tensor in tensors.items():
        groups[name.partition(".")[0]].append(tensor)
    return {
        group: (len(own), sum(t.values for t in own), sorted({t.dtype for t in own})) for group, own in groups.items()
    }


def _verify(args: argparse.Namespace) -> int:
    found = {path: verify(path) for given in args.paths for path in members(given)}
    if args.json:
        print(as_json([{"path": path, "problems": problems} for path, problems in found.items()]))
    else:
        for path, problems in found.items():
            print(f"{path}: {'whole' if not problems else 'DAMAGED'}")
            for problem in problems:
                print(f"  {problem}")
    return 1 if any(found.values()) else 0


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(row: Row) -> str:
    return format_bytes(row.bytes) if row.bytes else "-"


# ---------------------------------------------------------------- making


def _average(args: argparse.Namespace) -> int:
    if args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out}: expected a name that ends in .safetensors")
    if args.last is not None and args.last < 1:
        raise ValueError(f"--last is {args.last}; expected at least 1")
    paths = [member for path in args.paths for member in members(path)[-(args.last or 0) :]]
    files = [path if path.is_file() else next(iter(path.glob("model.safetensors")), None) for path in paths]
    claim([Output(args.out, _is_average)], inputs=files, overwrite=args.overwrite)
    made = average(paths, ema=args.ema)
    made.save(args.out)
    of = [{"file": str(file), "share": share} for file, share in zip(made.of, made.shares, strict=True)]
    lines = [f"{args.out}: average of {len(of)}", *(f"  {one['share']:.4f}  {one['file']}" for one in of)]
    tell(args, {"path": args.out, AVERAGED: of}, "\n".join(lines))
    return 0


def _is_average(path: Path) -> bool:
    return AVERAGED in contents(path).about


def _export(args: argparse.Namespace) -> int:
    if len(args.paths) > 1:
        raise ValueError(f"{len(args.paths)} paths to export; expected one run, checkpoint or file")
    path = args.paths[0]
    classifier = "head" in contents(members(path)[-1]).config and not args.encoder
    if classifier and (args.weights or args.pooling):
        raise ValueError(
            f"{path} is a classifier; --weights and --pooling are of encoders: leave them out, or add --encoder"
        )
    model = (
        CATClassifier.from_folder(path)
        if classifier
        else CATEncoder.from_folder(path, pooling=args.pooling, weights=args.weights or "student")
    )
    model.save_pretrained(args.out, license=args.license)
    kind = "classifier" if classifier else f"encoder ({args.weights or 'student'})"
    tell(args, {"path": args.out, "kind": kind}, f"{args.out}: {kind}, for CATEncoder, CATClassifier and transformers")
    if not args.license:
        say("note: the model card names no licence; --license NAME puts one there")
    return 0
