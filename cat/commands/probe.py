"""``cat-audio probe``: kNN, linear, attention and gated probes of an encoder on labelled audio."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from cat.commands._json import add_json, as_json
from cat.commands._parser import natural
from cat.data.manifest import load_manifest
from cat.device import pick_device
from cat.encoders import POOLINGS, USAGE, CatEncoder, FrozenEncoder, LogMelStatistics, build_encoder, twin_of
from cat.evaluation.cache import FeatureCache
from cat.evaluation.probe import SPLITS, TITLES, Report, format_report, is_report, report_json, run_probe
from cat.evaluation.trained import PROTOTYPES
from cat.figures import is_figure, write_layers, write_projection
from cat.files import cache_folder, write_json
from cat.outputs import Output, claim

CONTROL = "log-mel mean + std"  # the row without any learning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Probes of frozen features on labelled manifests. Settings are chosen on valid, test is scored once."
    )
    parser.add_argument(
        "encoder", metavar="ENCODER", help=f"run directory, checkpoint directory, .safetensors, or one of {USAGE}"
    )
    for split in SPLITS:
        parser.add_argument(f"--{split}", required=True, metavar="MANIFEST", help=f"labelled {split} split")
    parser.add_argument("--untrained-twin", action="store_true", help="probe the same architecture with fresh weights")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the untrained twin, and of probes that are trained (default 0)"
    )
    parser.add_argument(
        "--probe",
        default="",
        metavar="LIST",
        help=f"some of {', '.join(TITLES)}, with commas, or all (default knn,linear); attention, a learned query over "
        "a clip's tokens, and gated, a learned mixture of all layers, need a CAT checkpoint",
    )
    parser.add_argument("--knn", action="store_true", help="the same as --probe knn")
    parser.add_argument("--linear", action="store_true", help="the same as --probe linear")
    parser.add_argument(
        "--layers", metavar="LIST", help="also probe single layers of a CAT checkpoint: all, or numbers as in 0,4,8"
    )
    parser.add_argument(
        "--prototypes", type=int, default=PROTOTYPES, help=f"of the gated probe (default {PROTOTYPES}; paper: 10000)"
    )
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="of a checkpoint's tokens (default mean)")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="of a checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=natural, default=0)
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--cache",
        type=Path,
        default=None,
        metavar="DIR",
        help="keeps features for the next time (default ~/.cache/cat-audio/probe)",
    )
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    parser.add_argument("--out", type=Path, default=None, help="default: probe.json in the run directory")
    parser.add_argument(
        "--figures", action="store_true", help="draw test embeddings and layers beside the JSON, in figures/"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that probe did not write")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.add_argument(
        "--require-better",
        action="store_true",
        help="fail unless the encoder beats its untrained twin on every probe that ran",
    )


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device, "--device")
    probes, layers = _probes(args), _layers(args.layers)
    if args.no_cache and args.cache is not None:
        raise ValueError(f"--no-cache and --cache {args.cache} were both given; expected one of them.")
    manifests = {split: load_manifest(getattr(args, split)) for split in SPLITS}
    out = args.out or _default_out(args.encoder)
    pictures = {name: out.parent / "figures" / f"{name}.png" for name in ("embeddings", "layers")}
    if not args.figures or (layers is None and "gated" not in probes):
        del pictures["layers"]
    claim(
        [
            Output(out, is_report, "another --out"),
            *(Output(path, is_figure, "an --out in another folder") for path in pictures.values() if args.figures),
        ],
        inputs=[Path(args.encoder), *(manifest.source for manifest in manifests.values())],
        overwrite=args.overwrite,
    )
    cache = FeatureCache(None if args.no_cache else args.cache or cache_folder("probe"))
    report = run_probe(
        _encoders(args, device),
        manifests,
        probes=probes,
        layers=layers,
        prototypes=args.prototypes,
        seed=args.seed,
        cache=cache,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=not args.quiet,
    )
    if not args.json:
        print(format_report(report))
        if cache.folder is not None:
            print(cache.summary())
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)}
    value = {"arguments": settings, **report_json(report)}
    write_json(out, value)
    written = [out]
    if args.figures:
        drawn = {
            row.name: (row.test.rows, row.test_labels)
            for row in report.rows
            if row.test is not None and row.name != CONTROL
        }
        written.append(write_projection(pictures["embeddings"], drawn))
    if "layers" in pictures:
        written.append(_draw_layers(pictures["layers"], report))
    lost = _lost(report) if args.require_better else []
    if args.json:
        verdict = {"better": not lost} if args.require_better else {}
        print(as_json({**value, "written": written, **verdict}))
        return 1 if lost else 0
    print("\n".join(f"written: {path}" for path in written))
    if lost:
        print(f"FAIL: the trained encoder does not beat its untrained twin ({'; '.join(lost)})")
    elif args.require_better:
        print("PASS: the trained encoder beats its untrained twin on every probe")
    return 1 if lost else 0


def _encoders(args: argparse.Namespace, device: torch.device) -> dict[str, FrozenEncoder]:
    """The rows of the table but for chance."""
    encoder = build_encoder(args.encoder, pooling=args.pooling, weights=args.weights, device=device)
    encoders: dict[str, FrozenEncoder] = {"trained": encoder}
    if args.untrained_twin or args.require_better:
        encoders["untrained twin"] = twin_of(encoder, args.seed, "--untrained-twin and --require-better")
    features = encoder.features if isinstance(encoder, CatEncoder) else None
    encoders[CONTROL] = LogMelStatistics(features, device=device)
    return encoders


def _probes(args: argparse.Namespace) -> list[str]:
    """In the order of the table."""
    asked = {name.strip() for name in args.probe.split(",") if name.strip()}
    asked |= {name for name in ("knn", "linear") if getattr(args, name)}
    for name in sorted(asked - {*TITLES, "all"}):
        raise ValueError(f"--probe {args.probe}: {name!r} is no probe; expected some of {', '.join(TITLES)}, or all.")
    if "all" in asked:
        return list(TITLES)
    return [name for name in TITLES if name in asked] or ["knn", "linear"]


def _layers(text: str | None) -> Sequence[int] | None:
    """() for all of them."""
    if text is None or text.strip() == "all":
        return None if text is None else ()
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers {text}: expected all, or the numbers of layers as in 0,4,8.") from None


def _draw_layers(path: Path, report: Report) -> Path:
    scores: dict[str, dict[str, dict[int, float]]] = {}
    levels: dict[str, dict[str, float]] = {}
    for row in report.rows:
        for layer, results in row.layers.items():
            for probe, result in results.items():
                scores.setdefault(TITLES[probe], {}).setdefault(row.name, {})[layer] = result.score
    for row in report.rows:
        for probe, score in row.scores.items():
            if not row.layers and not row.gates and TITLES[probe] in scores:
                levels.setdefault(TITLES[probe], {})[row.name] = score
    gates = {row.name: row.gates for row in report.rows if row.gates}
    return write_layers(path, scores, gates, metric=report.task.metric, levels=levels)


def _default_out(spec: str) -> Path:
    """probe.json in the run directory of a checkpoint, beside a .safetensors file, or here."""
    path = Path(spec)
    if not path.exists():
        return Path("probe.json")
    directory = path if path.is_dir() else path.parent
    in_run = [d for d in (directory, *directory.absolute().parents[:2]) if (d / "config.yaml").is_file()]
    return (in_run[0] if in_run else directory) / "probe.json"


def _lost(report: Report) -> list[str]:
    """The probes on which the encoder does not beat its untrained twin."""
    trained, twin = report.row("trained").scores, report.row("untrained twin").scores
    return [f"{p}: {100 * trained[p]:.1f} % against {100 * twin[p]:.1f} %" for p in trained if trained[p] <= twin[p]]
