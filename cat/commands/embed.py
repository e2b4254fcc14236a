"""``cat-audio embed``: the embeddings of a data set's clips, and a manifest whose clips name their rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.data.manifest import load_manifest
from cat.device import pick_device
from cat.encoders import POOLINGS, build_encoder
from cat.encoders.embed import failures_path, write_embeddings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Embeddings of a manifest's clips: one .npy, and a manifest whose clips name their rows."
    parser.add_argument("manifest", metavar="MANIFEST", help="folder of audio, .jsonl, .tsv or .json")
    parser.add_argument(
        "--encoder",
        required=True,
        help="clap, clap:PATH_OR_HUB_NAME, random, random:SEED, logmel, or a CAT run, checkpoint or .safetensors",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.npy")
    parser.add_argument("--manifest-out", type=Path, default=None, help="default: OUT.jsonl")
    parser.add_argument(
        "--pooling", choices=POOLINGS, default="mean", help="of a CAT checkpoint's tokens (default mean)"
    )
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="of a CAT checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--max-failed-share",
        type=float,
        default=0.5,
        help="write nothing and fail when more of the clips get no embedding (default 0.5)",
    )


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device, "--device")
    manifest = load_manifest(args.manifest)
    encoder = build_encoder(args.encoder, pooling=args.pooling, weights=args.weights, device=device)
    written, skipped = write_embeddings(
        manifest,
        encoder,
        args.out,
        manifest_out=args.manifest_out,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        max_failed_share=args.max_failed_share,
        progress=True,
    )
    print(f"{len(written)} embeddings of width {encoder.dim} by {encoder.name}: {args.out}")
    print(f"manifest with their rows: {args.manifest_out or args.out.with_suffix('.jsonl')}")
    if skipped:
        print(f"{len(skipped)} of {len(manifest)} clips left out, reasons in {failures_path(args.out)}. The first:")
        print(f"  {skipped[0].path}: {skipped[0].reason}")
    return 0
