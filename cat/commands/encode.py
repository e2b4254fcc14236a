"""``cat-audio encode``: embeddings of audio files, and of their frames, in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.commands._json import add_json, left_out, tell
from cat.commands._parser import finite, natural
from cat.data.listing import listed
from cat.device import pick_device
from cat.encoders import POOLINGS, CATEncoder
from cat.encoders.encode import Settings, encode_files, failures_path
from cat.progress import say

EPILOG = """\
OUT.npz (or .h5) holds paths (n,), seconds (n,) and clip (n, D); with --frames also frames (R, D), times (R,), their
centres in seconds, and offsets (n+1,): file i has the frames offsets[i] to offsets[i+1]. OUT.parquet has a row a file,
or with --frames a row a frame. Files are of any length and sample rate; long ones are heard in overlapping windows.

What is done is kept in OUT.parts: an encode that was stopped, or killed, goes on from there when it is called again.

Exit code 0 when all files are in OUT; 1 when some are not, with their reasons in OUT.failures.jsonl, or none is.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.description = "Embeddings of audio files by a CAT checkpoint, in one table."
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="audio files, folders, shards, .jsonl, .tsv, .json lists"
    )
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="CHECKPOINT",
        help="a run, a checkpoint, a .safetensors, or a hub name",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="OUT.npz, OUT.parquet or OUT.h5")
    parser.add_argument("--frames", action="store_true", help="also embeddings of the frames (160 ms) and their times")
    parser.add_argument("--layer", type=int, default=None, help="0 (what the first block sees), 1, ... (default: last)")
    parser.add_argument(
        "--window", type=finite, default=None, metavar="S", help="seconds heard at once (default: training's)"
    )
    parser.add_argument("--overlap", type=finite, default=None, metavar="S", help="of windows (default: a quarter)")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="of the tokens, to one embedding a file")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="of a pre-training")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=natural, default=0)
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace files not written by encode; begin afresh")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device, "--device")
    manifest = listed(args.files)
    for note in manifest.notes:
        say(note)
    encoder = CATEncoder.from_pretrained(args.encoder, pooling=args.pooling, weights=args.weights, device=device)
    done = encode_files(
        encoder,
        manifest,
        args.out,
        Settings(args.frames, args.layer, args.window, args.overlap),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    lines = [f"embeddings of width {encoder.dim} of {done.files} files: {args.out}"] if done.files else []
    if done.skipped:
        lines += [
            f"{len(done.skipped)} of {len(manifest)} files left out, reasons in {failures_path(args.out)}. The first:",
            *(f"  {skipped.path}: {skipped.reason}" for skipped in done.skipped[:5]),
        ]
    value = {
        **{"embeddings": args.out if done.files else None, "files": done.files, "width": encoder.dim},
        "left_out": left_out(done.skipped),
    }
    tell(args, value, "\n".join(lines))
    return 1 if done.skipped else 0
