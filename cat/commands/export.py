"""``cat-audio export``: a model as ONNX, as a PyTorch program, or as a page for a browser."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from cat.commands._json import add_json, tell
from cat.export import (
    CHECK_ROWS,
    QUICK_ROWS,
    Difference,
    Exportable,
    check_folder,
    check_suffix,
    export,
    find_runtime,
    load_exportable,
    metadata_of,
    write_site,
)
from cat.files import format_bytes
from cat.outputs import Output, claim

EPILOG = """\
In goes a normalised log-mel spectrogram (batch, 1, frames, mel bins), frames being a multiple of the patch size; with
--waveform audio (batch, samples) in [-1, 1] at the model's sample rate, 25 ms or more. Out come, of an encoder, clip,
cls, frames and patches; of a classifier scores, and with a frame head frame_scores. All clips of a batch are of one
length, which may be any, up to two minutes. The file's metadata tell classes, sample rate, features, patch size and
version.

With --web DIR a classifier becomes a folder to open in a browser, as a file or from any static server. The page hears a
file or the microphone, and shows spectrogram, classes over time and events. Nothing leaves it.

Before OUT appears it is run and compared with the model: .onnx in onnxruntime (pip install 'cat-kernels[export]'), .pt2
in PyTorch. Where they differ by more than a thousandth, nothing is written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, a checkpoint or a .safetensors")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="the file to write: .onnx or .pt2")
    parser.add_argument("--web", type=Path, metavar="DIR", help="in place of OUT: a page that runs in a browser")
    parser.add_argument(
        "--runtime",
        type=Path,
        metavar="PATH",
        help="of --web: npm's onnxruntime-web, .tgz or folder (default: npm brings it)",
    )
    parser.add_argument("--waveform", action="store_true", help="take audio: the log-mel features are in the file")
    parser.add_argument(
        "--quantise",
        action="store_true",
        help="weights of the matrix products in int8: a third to two thirds of the size (.onnx)",
    )
    parser.add_argument("--check", action="store_true", help="compare at ten lengths, to two minutes, and not at three")
    parser.add_argument("--encoder", action="store_true", help="of a fine-tuned checkpoint the encoder alone")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="of a pre-trained one")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that export did not write")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if (args.out is None) == (args.web is None):
        raise ValueError("expected one of OUT, a file that ends in .onnx or .pt2, and --web DIR, a folder for a page")
    return _write_page(args) if args.out is None else _write_file(args)


def _write_file(args: argparse.Namespace) -> int:
    if args.runtime is not None:
        raise ValueError(f"--runtime {args.runtime} is what runs a page, and {args.out} is a file; leave it out")
    check_suffix(args.out, quantise=args.quantise)
    own = Output(args.out, _is_exported, "another name")
    claim([own], inputs=[args.checkpoint if args.checkpoint.is_file() else None], overwrite=args.overwrite)
    exportable = load_exportable(args.checkpoint, encoder=args.encoder, weights=args.weights)
    began = time.monotonic()
    found = export(exportable, args.out, waveform=args.waveform, quantise=args.quantise, rows=_rows(args))
    about = metadata_of(args.out)
    size = args.out.stat().st_size
    compared, words = _compared(exportable, found)
    tell(
        args,
        {"written": args.out, "bytes": size, "metadata": about, "difference": compared},
        f"{args.out}: {about['kind']}, {about['input']} in, {', '.join(about['outputs'])} out, "
        f"{format_bytes(size)}, made in {time.monotonic() - began:.0f} s\n{words}",
    )
    return 0


def _write_page(args: argparse.Namespace) -> int:
    check_suffix(Path("model.onnx"))
    check_folder(args.web)
    exportable = load_exportable(args.checkpoint, encoder=args.encoder)
    runtime = find_runtime(args.runtime)
    began = time.monotonic()
    site = write_site(exportable, args.web, runtime, quantise=args.quantise, rows=_rows(args))
    page = args.web / "index.html"
    compared, words = _compared(exportable, site.difference)
    tell(
        args,
        {"written": page, "bytes": site.size, "onnxruntime_web": runtime.version, "difference": compared,
         "events": site.events},
        f"{page}: open it in a browser, or put the folder on any static server; {format_bytes(site.size)}, "
        f"onnxruntime-web {runtime.version}, made in {time.monotonic() - began:.0f} s\n{words}\n"
        f"event settings: {site.events or 'threshold 0.5 for every class, as the run has no events.json'}",
    )  # fmt: skip
    return 0


def _rows(args: argparse.Namespace) -> tuple[int, ...]:
    return CHECK_ROWS if args.check else QUICK_ROWS


def _compared(exportable: Exportable, found: Difference) -> tuple[dict[str, Any], str]:
    """For programs, and in words."""
    seconds = [_seconds(exportable, rows) for rows in found.rows]
    words = (
        f"compared with the model on noise of {', '.join(f'{one:.3g}' for one in seconds)} s: largest difference "
        f"{found.largest:.2e}, mean {found.mean:.2e}, of outputs up to {found.scale:.3g}"
    )
    return {"seconds": seconds, "largest": found.largest, "mean": found.mean, "scale": found.scale}, words


def _is_exported(path: Path) -> bool:
    return bool(metadata_of(path))


def _seconds(exportable: Exportable, rows: int) -> float:
    return rows * exportable.about["patch_size"] * exportable.features.frame_shift_ms / 1000
