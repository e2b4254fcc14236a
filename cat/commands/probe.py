"""``cat-audio probe``: kNN and linear probes of an encoder on labelled audio."""

from __future__ import annotations

import argparse
from pathlib import Path

from cat.data.manifest import load_manifest
from cat.device import pick_device
from cat.encoders import POOLINGS, CatEncoder, FrozenEncoder, LogMelStatistics, build_encoder
from cat.evaluation.classifiers import PROBES
from cat.evaluation.probe import SPLITS, Report, format_report, is_report, report_json, run_probe
from cat.figures import is_figure, write_projection
from cat.files import write_json
from cat.outputs import Output, claim

CONTROL = "log-mel mean + std"  # the row without any learning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "kNN and linear probes of frozen features on labelled manifests."
    parser.add_argument(
        "encoder", metavar="CHECKPOINT", help="run directory, checkpoint directory, .safetensors, clap[:PATH] or random"
    )
    for split in SPLITS:
        parser.add_argument(f"--{split}", required=True, metavar="MANIFEST", help=f"labelled {split} split")
    parser.add_argument("--untrained-twin", action="store_true", help="probe the same architecture with fresh weights")
    parser.add_argument("--seed", type=int, default=0, help="initialisation of the untrained twin (default 0)")
    parser.add_argument("--knn", action="store_true", help="only the kNN probe (default: both probes)")
    parser.add_argument("--linear", action="store_true", help="only the linear probe (default: both probes)")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="of a checkpoint's tokens (default mean)")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="of a checkpoint")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: probe.json in the run directory")
    parser.add_argument("--figures", action="store_true", help="draw the test embeddings beside the JSON, in figures/")
    parser.add_argument("--overwrite", action="store_true", help="replace files that probe did not write")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.add_argument(
        "--require-better",
        action="store_true",
        help="fail unless the encoder beats its untrained twin on every probe that ran",
    )


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device, "--device")
    manifests = {split: load_manifest(getattr(args, split)) for split in SPLITS}
    out = args.out or _default_out(args.encoder)
    picture = out.parent / "figures" / "embeddings.png"
    claim(
        [
            Output(out, is_report, "another --out"),
            *([Output(picture, is_figure, "an --out in another folder")] if args.figures else []),
        ],
        inputs=[Path(args.encoder), *(manifest.source for manifest in manifests.values())],
        overwrite=args.overwrite,
    )
    encoder = build_encoder(args.encoder, pooling=args.pooling, weights=args.weights, device=device)
    encoders: dict[str, FrozenEncoder] = {"trained": encoder}
    if args.untrained_twin or args.require_better:
        if not isinstance(encoder, CatEncoder):
            raise ValueError(f"--untrained-twin and --require-better need a CAT checkpoint, got {args.encoder!r}.")
        encoders["untrained twin"] = encoder.untrained_twin(args.seed)
    features = encoder.features if isinstance(encoder, CatEncoder) else None
    encoders[CONTROL] = LogMelStatistics(features, device=device)

    probes = [p for p in PROBES if getattr(args, p)] or list(PROBES)
    report = run_probe(
        encoders,
        manifests,
        probes=probes,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=not args.quiet,
    )
    print(format_report(report))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)}
    write_json(out, {"arguments": settings, **report_json(report)})
    print(f"written: {out}")
    if args.figures:
        drawn = {
            row.name: (row.test.rows, row.test_labels)
            for row in report.rows
            if row.test is not None and row.name != CONTROL
        }
        print(f"written: {write_projection(picture, drawn)}")
    return _verdict(report) if args.require_better else 0


def _default_out(spec: str) -> Path:
    """probe.json in the run directory of a checkpoint, beside a .safetensors file, or here."""
    path = Path(spec)
    if not path.exists():
        return Path("probe.json")
    directory = path if path.is_dir() else path.parent
    in_run = [d for d in (directory, *directory.absolute().parents[:2]) if (d / "config.yaml").is_file()]
    return (in_run[0] if in_run else directory) / "probe.json"


def _verdict(report: Report) -> int:
    trained, twin = report.row("trained").scores, report.row("untrained twin").scores
    lost = [f"{p}: {100 * trained[p]:.1f} % against {100 * twin[p]:.1f} %" for p in trained if trained[p] <= twin[p]]
    if lost:
        print(f"FAIL: the trained encoder does not beat its untrained twin ({'; '.join(lost)})")
        return 1
    print("PASS: the trained encoder beats its untrained twin on every probe")
    return 0
