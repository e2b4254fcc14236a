"""``cat-audio similar``: find the sounds in a folder that are most like one."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

from cat.commands._json import as_json
from cat.commands._parser import finite, natural
from cat.data.listing import listed
from cat.device import pick_device
from cat.encoders import CATEncoder
from cat.encoders.similar import Found, find_similar
from cat.progress import say

EPILOG = """\
Long files are looked at in pieces, and the table says where in a file one is. QUERY itself is left out where it is in
FOLDER. With --index FILE embeddings are read from what `cat-audio encode --frames` has written, or written there for
the next time; without, they are made afresh.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.description = "The sounds in a folder that are most like one, by the cosine of embeddings."
    parser.add_argument("folder", metavar="FOLDER", help="folder of audio, shards, .jsonl, .tsv or .json list")
    parser.add_argument("query", type=Path, metavar="QUERY", help="an audio file")
    parser.add_argument(
        "--encoder", required=True, metavar="CHECKPOINT", help="a run, a checkpoint, a .safetensors, or a hub name"
    )
    parser.add_argument("-k", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--piece", type=finite, default=10.0, metavar="S", help="seconds of a piece (default 10)")
    parser.add_argument("--index", type=Path, default=None, metavar="FILE", help="embeddings: .npz, .parquet or .h5")
    parser.add_argument(
        "--whiten", action="store_true", help="of some hundreds of sounds: tell apart those that all look alike"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    form.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument("--num-workers", type=natural, default=0)
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device, "--device")
    encoder = CATEncoder.from_pretrained(args.encoder, pooling="mean", device=device)
    found = find_similar(
        encoder,
        listed([args.folder]),
        args.query,
        k=args.k,
        seconds=args.piece,
        index=args.index,
        whiten=args.whiten,
        num_workers=args.num_workers,
        progress=not args.quiet,
    )
    print(as_json(found.hits) if args.json else _csv(found) if args.csv else _table(found))
    for one in found.skipped[:5]:
        say(f"left out: {one.path}: {one.reason}")
    if len(found.skipped) > 5:
        say(f"left out: {len(found.skipped) - 5} more")
    if found.missing:
        say(f"{len(found.missing)} files are not in {args.index}, the first: {found.missing[0]}; encode them again")
    return 0


def _csv(found: Found) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["similarity", "begin", "end", "path"])
    writer.writerows([f"{hit.similarity:.6f}", f"{hit.begin:.3f}", f"{hit.end:.3f}", hit.path] for hit in found.hits)
    return text.getvalue().rstrip("\n")


def _table(found: Found) -> str:
    rows = [f"{hit.similarity:10.4f}  {_clock(hit.begin):>9} - {_clock(hit.end):<9}  {hit.path}" for hit in found.hits]
    return "\n".join([f"{'similarity':>10}  {'where':^21}  file", *rows])


def _clock(seconds: float) -> str:
    """1:02:03.4"""
    minutes, rest = divmod(round(10 * seconds), 600)
    hours, minutes = divmod(minutes, 60)
    start = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{start}:{rest / 10:04.1f}"
