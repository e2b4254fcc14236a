"""``cat-audio shards``: write a data set as tar shards, index those that others wrote, check them."""

from __future__ import annotations

import argparse
from typing import Any

from cat.commands._json import add_json, left_out, tell
from cat.data.manifest import load_manifest
from cat.data.shards.checking import check_shards
from cat.data.shards.tars import index_shards
from cat.data.shards.writing import write_shards
from cat.files import parse_bytes
from cat.progress import say

EPILOG = """\
write   DATA (folder, manifest) into -o FOLDER: shards of the WebDataset format and their index. Audio is copied as it
        is, so that training gives the same numbers. Stopped, the same command goes on; nothing is written over.
index   DATA (a folder of tar files, or its URL): writes the index that others' shards lack, into the folder, or -o.
check   DATA (a folder or URL with an index): reads every clip's bytes and compares their checksum.

examples:
  cat-audio shards write my/audio -o my/shards
  cat-audio pretrain recipes/tiny.yaml data.train=my/shards
  cat-audio shards index my/tars --labels tags
  cat-audio shards check my/shards

Exit code 0 when all is well, 1 when clips were left out or are damaged.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.description = "Data sets in tar shards: a few large files in place of many small ones."
    parser.add_argument("action", choices=("write", "index", "check"), metavar="write|index|check")
    parser.add_argument("data", metavar="DATA", help="what is written, indexed or checked")
    parser.add_argument("-o", "--out", metavar="FOLDER", help="of the shards; `index` default: beside the tar files")
    parser.add_argument("--size", default="256MB", metavar="SIZE", help="of a shard, more or less (default 256MB)")
    parser.add_argument(
        "--labels", default="labels", metavar="FIELD", help="of each sample's JSON that has its labels (default labels)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--overwrite", action="store_true", help="let `index` replace an index")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; expected at least 1")
    return {"write": _write, "index": _index, "check": _check}[args.action](args)


def _write(args: argparse.Namespace) -> int:
    if args.out is None:
        raise ValueError("shards write needs -o FOLDER, where the shards are to be")
    manifest = load_manifest(args.data)
    for note in manifest.notes:
        say(note)
    written = write_shards(
        manifest, args.out, shard_bytes=parse_bytes(args.size, "--size"), jobs=args.jobs, progress=not args.quiet
    )
    value = {"folder": args.out, "clips": len(written.manifest), "shards": written.shards}
    text = f"{args.out}: {len(written.manifest)} clips, shards: {written.shards}"
    return _tell(args, value, text, written.failures, "could not be read and were left out")


def _index(args: argparse.Namespace) -> int:
    count, failures, notes = index_shards(
        args.data, args.out, labels=args.labels, jobs=args.jobs, overwrite=args.overwrite, progress=not args.quiet
    )
    for note in notes:
        say(note)
    text = f"{args.out or args.data}: {count} clips indexed"
    value = {"index": args.out or args.data, "clips": count}
    return _tell(args, value, text, failures, "could not be read and were left out")


def _check(args: argparse.Namespace) -> int:
    manifest = load_manifest(args.data)
    failures = [*check_shards(manifest, jobs=args.jobs, progress=not args.quiet)]
    whole = len(manifest) - len(failures)
    text = f"{args.data}: {whole} of {len(manifest)} clips are as they were indexed"
    return _tell(args, {"data": args.data, "clips": len(manifest), "whole": whole}, text, failures, "are damaged")


def _tell(
    args: argparse.Namespace, value: dict[str, Any], text: str, failures: list[tuple[str, str]], what: str
) -> int:
    tell(args, {**value, "failures": left_out(failures)}, text)
    for path, reason in failures[:20]:
        say(f"{path}: {reason}")
    if failures:
        say(f"{len(failures)} clips {what}")
    return 1 if failures else 0
