"""``cat-audio embed``: the embeddings of a data set's clips, and a manifest whose clips name their rows."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cat.commands._json import add_json, left_out, tell
from cat.commands._parser import finite, natural
from cat.data.manifest import load_manifest
from cat.device import pick_device
from cat.encoders import POOLINGS, USAGE, build_encoder
from cat.encoders.embed import write_embeddings
from cat.encoders.jobs import one_thread, peak_memory, pick_jobs
from cat.encoders.outputs import claim_outputs
from cat.files import format_bytes
from cat.progress import say

EPILOG = """\
OUT.npy holds a row a clip, OUT.npy.json says whose they are, OUT.jsonl is the manifest whose clips name their rows
(OUT.embedded.jsonl where OUT.jsonl is MANIFEST itself), and OUT.failures.jsonl names the clips that got none, if any.
MANIFEST is never replaced, other files only when an earlier embed wrote them; --overwrite replaces these as well.

Stopped, by a full disk too, or killed, it goes on when it is called again, and writes the same files, bit for bit:
what is done lies in OUT.npy.partial. That is refused where it is another encoder's, of other clips, or made with other
settings or versions; --overwrite begins afresh. Blocks that are damaged, or whose audio has changed, are made again.

On the CPU --jobs processes read and embed, each with one thread; embeddings do not depend on how many. Each needs
memory for a batch of its own. On a GPU one process embeds, and --num-workers read for it.

Of a long clip all is heard: by a checkpoint in overlapping windows as long as it was trained on, by the others in
windows of five minutes at the most.

Exit code 0 when embeddings were written, also when clips were left out; 1 when nothing was written, as when more than
--max-failed-share of the clips got no embedding.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.description = "Embeddings of a manifest's clips: one .npy, and a manifest whose clips name their rows."
    parser.add_argument("manifest", metavar="MANIFEST", help="folder of audio or of shards, .jsonl, .tsv or .json")
    parser.add_argument(
        "--encoder",
        required=True,
        help=f"{USAGE}, or a CAT run, checkpoint or .safetensors",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.npy")
    parser.add_argument("--manifest-out", type=Path, default=None, metavar="FILE", help="default: OUT.jsonl")
    parser.add_argument(
        "--pooling", choices=POOLINGS, default="mean", help="of a CAT checkpoint's tokens (default mean)"
    )
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="of a CAT checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        metavar="N",
        help="processes that embed, on the CPU (default: one a core, 8 at the most; 1 for MODULE:FUNCTION)",
    )
    parser.add_argument(
        "--num-workers", type=natural, default=0, help="processes that read for one that embeds alone (default 0)"
    )
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--max-failed-share",
        type=finite,
        default=0.5,
        help="write nothing and fail when more of the clips get no embedding (default 0.5)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that embed did not write, or no longer")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device, "--device")
    manifest = load_manifest(args.manifest)
    for note in manifest.notes:
        say(note)
    outputs = claim_outputs(manifest, args.out, args.manifest_out, overwrite=args.overwrite)
    with one_thread(device):  # for networks too that have as many as torch when they are made
        encoder = build_encoder(args.encoder, pooling=args.pooling, weights=args.weights, device=device)
        jobs = pick_jobs(args.jobs, encoder)
        written, skipped = write_embeddings(
            manifest,
            encoder,
            args.out,
            manifest_out=args.manifest_out,
            batch_size=args.batch_size,
            jobs=jobs,
            num_workers=args.num_workers,
            max_failed_share=args.max_failed_share,
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    value = {
        **{"embeddings": outputs.rows, "manifest": outputs.manifest, "encoder": encoder.name, "width": encoder.dim},
        **{"clips": len(written), "left_out": left_out(skipped)},
    }
    lines = [
        f"{len(written)} embeddings of width {encoder.dim} by {encoder.name}: {outputs.rows}",
        f"manifest with their rows: {outputs.manifest}",
    ]
    if skipped:
        lines.append(f"{len(skipped)} of {len(manifest)} clips left out, reasons in {outputs.failures}. The first:")
        lines.append(f"  {skipped[0].path}: {skipped[0].reason}")
    own, below = (format_bytes(size) for size in peak_memory())
    processes = f"; of each of {jobs} jobs {below} at the most" if jobs > 1 else ""
    on_gpu = f"; {format_bytes(torch.cuda.max_memory_allocated(device))} of {device}" if device.type == "cuda" else ""
    tell(args, value, "\n".join([*lines, f"peak memory: {own}{processes}{on_gpu}"]))
    return 0
