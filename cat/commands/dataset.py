"""``cat-audio dataset``: a public data set to manifests with its official splits."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.commands._json import add_json, tell
from cat.data.sets import SETS, prepare
from cat.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write manifests with the official splits or folds of a public data set. An archive is unpacked into DIR; of a "
        "folder nothing is copied."
    )
    parser.add_argument("name", choices=SETS, metavar="NAME", help=f"one of: {', '.join(SETS)}")
    parser.add_argument(
        "source", nargs="?", type=Path, metavar="ARCHIVE_OR_FOLDER", help="what was downloaded, packed or not"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the manifests")
    parser.add_argument("--download", action="store_true", help="download the archive into DIR first")
    parser.add_argument(
        "--allow-missing", type=int, default=0, metavar="N", help="do without up to N clips of each manifest (0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace manifests of other content in DIR")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    data_set = SETS[args.name]
    if (args.source is None) != args.download:
        raise ValueError(
            f"give either the archive or folder of {data_set.title}, or --download; it is at {data_set.home}"
        )
    prepared = prepare(
        data_set,
        args.source,
        args.out,
        allow_missing=args.allow_missing,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    for note in prepared.notes:
        say(note)
    counts = {path: (len(manifest), len(manifest.classes)) for path, manifest in prepared.manifests.items()}
    value = {
        **{"name": args.name, "title": data_set.title, "licence": data_set.licence, "home": data_set.home},
        "manifests": [{"path": path, "clips": clips, "classes": classes} for path, (clips, classes) in counts.items()],
        "notes": prepared.notes,
    }
    lines = [f"{data_set.title}; licence: {data_set.licence}; from {data_set.home}"]
    lines += [f"{path}: {clips} clips, {classes} classes" for path, (clips, classes) in counts.items()]
    tell(args, value, "\n".join(lines))
    return 0
