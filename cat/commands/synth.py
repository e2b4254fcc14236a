"""``cat-audio synth``: make a labelled data set of synthetic sound events."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.commands._json import add_json, tell
from cat.commands._parser import finite
from cat.data.synth import SPLITS, SynthConfig, synthesise
from cat.sounds import CLASSES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = SynthConfig()
    parser.description = "Make a labelled data set of synthetic sound events, with train, valid and test manifests."
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to make; made before with the same settings, it is left alone"
    )
    parser.add_argument(
        "--clips-per-class", type=int, default=default.clips_per_class, metavar="N", help="in train (%(default)s)"
    )
    parser.add_argument(
        "--eval-clips-per-class",
        type=int,
        default=default.eval_clips_per_class,
        metavar="N",
        help="in valid and in test (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="another seed gives other sounds (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=finite,
        nargs=2,
        default=default.seconds,
        metavar=("MIN", "MAX"),
        help="length of the clips (1 2)",
    )
    parser.add_argument(
        "--snr-db",
        type=finite,
        nargs=2,
        default=default.snr_db,
        metavar=("MIN", "MAX"),
        help="sound over background noise (10 35)",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=default.classes,
        metavar="CLASS",
        help=f"some of: {', '.join(CLASSES)} (default: all)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a data set of other settings in OUT; files of your own there stay"
    )
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    config = SynthConfig(
        clips_per_class=args.clips_per_class,
        eval_clips_per_class=args.eval_clips_per_class,
        seed=args.seed,
        seconds=tuple(args.seconds),
        snr_db=tuple(args.snr_db),
        classes=tuple(args.classes),
    )
    made = synthesise(config, args.out, force=args.force, progress=not args.quiet)
    counts = {split: config.clips_of(split) * len(config.classes) for split in SPLITS}
    manifests = {split: args.out / f"{split}.jsonl" for split in SPLITS}
    clips = ", ".join(f"{count} {split}" for split, count in counts.items())
    tell(
        args,
        {"folder": args.out, "made": made, "classes": config.classes, "clips": counts, "manifests": manifests},
        f"{args.out}: {len(config.classes)} classes, clips: {clips} ({'made' if made else 'already there'})\n"
        f"manifests: {', '.join(map(str, manifests.values()))}",
    )
    return 0
