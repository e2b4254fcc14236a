"""``cat-audio prepare``: from audio as it was found to a data set to train on."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.commands._json import add_json, as_json, left_out
from cat.commands._parser import finite
from cat.config import from_mapping, read_yaml
from cat.data.features import FEATURE_PRESETS, FeatureConfig
from cat.data.manifest import load_manifest
from cat.data.prepare import PrepareConfig, Prepared, prepare_clips, read_source
from cat.data.prepare.report import recipe_lines
from cat.data.shards.writing import Written, write_shards
from cat.data.workers import cores
from cat.files import parse_bytes
from cat.progress import say

EPILOG = """\
examples:
  cat-audio prepare my/audio -o prepared                            check, measure, list
  cat-audio prepare my/audio -o flac --convert flac                 and write every file as 16 kHz mono FLAC
  cat-audio prepare audioset/balanced_train_segments.csv -o as20k   AudioSet's list, and what there is of it

A file is rejected that is missing, unreadable, cut off, empty, silent, shorter than a frame or --min-seconds, or that
has NaN or infinite samples: each is decoded to its end. DIR gets manifest.jsonl (the clips that can be used),
rejected.jsonl (path and reason of the others), duplicates.jsonl (clips that are the same, sample by sample), and
report.md and report.json: how many, how long, mean and standard deviation of the log-mel spectrograms, classes and
their weights. With --convert it gets audio/ too, and the manifest names these files; with --shards also shards/, tar
files that data.train=DIR/shards reads in place of manifest.jsonl.

Stopped or killed, it goes on when it is called again. The same files come of any number of --jobs. DIR must be new or
empty; nothing in it is replaced, and nothing of the source is changed.

Exit code 0 when a manifest was written, also when files were rejected; 1 when more than --max-rejected-share were.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.description = "Check every file of a data set, measure it, convert it if asked, and write a manifest."
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a folder of audio, a manifest, shards (a folder or URL), or AudioSet's *_segments.csv",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder to fill; new or empty")
    parser.add_argument(
        "--audio", type=Path, metavar="FOLDER", help="where AudioSet's files are (default: beside the list)"
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="recipe whose features are measured (default: AudioSet's, 16 kHz)"
    )
    parser.add_argument(
        "--convert", choices=("wav", "flac"), help="write every file anew: mono, 16 bits, at the recipe's sample rate"
    )
    parser.add_argument(
        "--min-seconds", type=finite, default=0.0, metavar="S", help="reject shorter files (default: a frame)"
    )
    parser.add_argument(
        "--silence",
        type=float,
        default=-80.0,
        metavar="DB",
        help="reject files whose peak is below (-80 dB of full scale; --silence=-inf: none)",
    )
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="keep the first of clips that are the same, sample by sample"
    )
    parser.add_argument(
        "--max-rejected-share",
        type=finite,
        default=0.5,
        metavar="SHARE",
        help="fail, without a manifest, when more files are rejected (0.5)",
    )
    parser.add_argument(
        "--shards", metavar="SIZE", help="write the clips as tar files too, of about this size (256MB), in DIR/shards"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one a core)")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    config = PrepareConfig(
        features=_features(args.recipe),
        min_seconds=args.min_seconds,
        silence_db=args.silence,
        convert=args.convert,
        drop_duplicates=args.drop_duplicates,
    )
    shard_bytes = None if args.shards is None else parse_bytes(args.shards, "--shards")
    source = read_source(args.source, args.audio)
    for note in source.manifest.notes:
        say(note)
    prepared = prepare_clips(
        source,
        args.out,
        config,
        max_rejected_share=args.max_rejected_share,
        jobs=args.jobs,
        progress=not args.quiet,
    )
    if not args.json:
        _tell(prepared)
    written = None if shard_bytes is None else _write_shards(prepared, shard_bytes, args)
    if args.json:
        value = {"folder": prepared.folder, "manifest": prepared.manifest, "fresh": prepared.fresh, **prepared.report}
        if written is not None:
            value["shards"] = {"count": written.shards, "left_out": left_out(written.failures)}
        print(as_json(value))
    elif written is not None:
        print(f"{prepared.folder / 'shards'}: {len(written.manifest)} clips, shards: {written.shards}")
    return 1 if written is not None and written.failures else 0


def _write_shards(prepared: Prepared, shard_bytes: int, args: argparse.Namespace) -> Written:
    written = write_shards(
        load_manifest(prepared.manifest),
        prepared.folder / "shards",
        shard_bytes=shard_bytes,
        jobs=args.jobs or cores(),
        progress=not args.quiet,
    )
    for path, reason in written.failures[:20]:
        say(f"{path}: {reason}")
    return written


def _features(recipe: str | None) -> FeatureConfig:
    if recipe is None:
        return FeatureConfig()
    from cat.training.recipe import find_recipe

    path = find_recipe(recipe)
    section = read_yaml(path).get("features") or {}
    return from_mapping(FeatureConfig, section, source=str(path), presets={FeatureConfig: FEATURE_PRESETS})


def _tell(prepared: Prepared) -> None:
    report = prepared.report
    clips, hours = report["clips"], report["seconds"]["all"] / 3600
    there = "" if prepared.fresh else ", as it was before"
    print(f"{prepared.manifest}: {clips['usable']} of {clips['listed']} clips, {hours:.3g} hours{there}")
    if clips["rejected"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report["rejected"].items())
        print(f"{prepared.folder / 'rejected.jsonl'}: {clips['rejected']} rejected: {kinds}")
    if report["duplicates"]["clips"]:
        what = "left out" if clips["dropped"] else "kept (--drop-duplicates leaves them out)"
        print(f"{prepared.folder / 'duplicates.jsonl'}: {report['duplicates']['clips']} duplicates, {what}")
    print(f"{prepared.folder / 'report.md'}: all that was found out; for the recipe, or the command line:")
    for line in recipe_lines(report):
        print(f"  {line}")
