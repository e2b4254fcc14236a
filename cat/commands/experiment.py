"""``cat-audio experiment``: the first experiments to run, each with a verdict and an exit code.

Runs, embeddings, curves and ``result.json`` go to OUT/NAME.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cat.config import to_mapping
from cat.data.synth import SynthConfig, synthesise
from cat.encoders import USAGE, build_encoder
from cat.experiments.kernels import kernels
from cat.experiments.overfit import overfit
from cat.experiments.recipes import experiment_config
from cat.experiments.regularisation import regularisation
from cat.experiments.resolutions import resolutions
from cat.figures import is_figure, write_loss_curves
from cat.files import write_json
from cat.outputs import Output, claim, json_of
from cat.progress import say
from cat.training.recipe import pick_device

EPILOG = """\
overfit          one batch, fixed masks, fixed targets: the regression loss must fall by 90 %
regularisation   the same run with and without representation regularisation
resolutions      a stem with patches only, {16}, against the multi-resolution one, {4, 8, 16}
kernels          the same run with the operators' kernels and with the dense formula: losses must agree

Exit code 0 when the verdict is PASS. OUT/NAME gets result.json, figures and the runs. With the tiny model overfit
takes half a minute on two CPU cores, the others several; model.preset=small and the like ask for more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("name", choices=("overfit", "regularisation", "resolutions", "kernels"))
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="fields of the recipe to change")
    parser.add_argument(
        "--data", type=Path, default=None, help="folder with train, valid and test.jsonl (default: made)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--encoder", default="random", help=f"of regularisation: {USAGE}, or a checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files in OUT/NAME that experiment did not write"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    out = args.out / args.name
    _claim(args.name, out, overwrite=args.overwrite)
    data = args.data or _made_data(args.out / "data", progress=not args.quiet)
    config = experiment_config(args.name, data, args.overrides)
    started = time.perf_counter()
    if args.name == "overfit":
        verdict = overfit(config, say=(lambda text: None) if args.quiet else say)
        write_loss_curves(out / "figures" / "loss.png", {"overfit": verdict.values["curve"]})
    elif args.name == "regularisation":
        encoder = build_encoder(args.encoder, device=pick_device(config.run.device))
        verdict = regularisation(config, data, out, encoder=encoder, progress=not args.quiet)
    elif args.name == "resolutions":
        verdict = resolutions(config, data, out, progress=not args.quiet)
    else:
        verdict = kernels(config, out, progress=not args.quiet)
    print(verdict.format())
    result = {
        "experiment": args.name,
        "passed": verdict.passed,
        "verdict": verdict.text,
        "columns": list(verdict.columns),
        "rows": [list(row) for row in verdict.rows],
        "notes": verdict.notes,
        "values": verdict.values,
        "seconds": time.perf_counter() - started,
        "config": to_mapping(config),
    }
    write_json(out / "result.json", result)
    print(f"written: {out / 'result.json'}, figures in {out / 'figures'}")
    return 0 if verdict.passed else 1


def _claim(name: str, out: Path, *, overwrite: bool) -> None:
    figures = {"overfit": ("loss",), "kernels": ("loss", "agreement")}.get(name, ("loss", "embeddings"))
    result = Output(
        out / "result.json",
        lambda path: json_of(path, experiment=str, verdict=str)["experiment"] == name,
        "another --out",
    )
    pictures = [Output(out / "figures" / f"{figure}.png", is_figure, "another --out") for figure in figures]
    claim([result, *pictures], overwrite=overwrite)


def _made_data(folder: Path, *, progress: bool = False) -> Path:
    config = SynthConfig(clips_per_class=20, eval_clips_per_class=10)
    try:
        synthesise(config, folder, progress=progress)
    except FileExistsError:  # made by another version of synth; what synth did not make is left alone, and raises again
        synthesise(config, folder, force=True, progress=progress)
    return folder
