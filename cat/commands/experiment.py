"""``cat-audio experiment``: experiments with a verdict and an exit code.

Everything goes to OUT: what an experiment found to OUT/NAME, with its figures; the runs of studies, which they share,
to OUT/studies.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from cat.commands._json import add_json, as_json
from cat.config import to_mapping
from cat.data.synth import SynthConfig, synthesise
from cat.encoders import USAGE, build_encoder
from cat.experiments.claims import CLAIMS
from cat.experiments.failures import failures
from cat.experiments.kernels import kernels
from cat.experiments.overfit import overfit
from cat.experiments.overhead import overhead
from cat.experiments.paper import Options, examine
from cat.experiments.recipes import experiment_config
from cat.experiments.records import claim_record, compare, read_record
from cat.experiments.trial import Task
from cat.experiments.verdict import Verdict
from cat.experiments.visible import visible
from cat.figures import is_figure, write_loss_curves
from cat.files import write_json
from cat.outputs import Output, claim, json_of
from cat.progress import say
from cat.training.recipe import PretrainConfig, pick_device

EPILOG = """\
overfit       one batch, fixed masks, fixed targets: the regression loss must fall by 90 %
kernels       the same run with the operators' kernels and with the dense formula: losses must agree
visible       the stem over all positions and over visible patches alone must agree; draws why
overhead      memory and time of a guide: without, cached, live; losses of live and cached must agree
failures      what goes wrong with a guide, and collapse: each provoked, and the trainer's warning must name it

Studies, of several runs from each of several seeds, probed as they go:

convergence   does a guide save steps, and must it know the domain? {none, each --guide}
distillation  does the student beat its guide? Does it need it to the end (the first --guide)?
resolutions   {4} to {4,8,16,32} at equal steps, equal time, equal parameters
layer         the block whose CLS token is regularised
cost          how much the regularisation weighs; its losses as sums
distance      l2, l1, cosine, kl
masks         masks a clip, and how much they hide
length        what a quarter and a half of the updates are worth

Exit code 0 when the verdict is PASS. OUT/NAME gets result.json and figures. With the tiny model visible takes
seconds, overfit half a minute on two CPU cores, kernels several, a study one to three hours, and goes on where it was
stopped; model.preset=small and the like ask for more, optim.steps=60 for less.
"""
GUIDED = ("overhead", "failures")  # besides studies: those that take the first --guide
OWN = {**dict.fromkeys(GUIDED, ("pool", "guide")), "visible": ("pool",)}  # options of studies that others have too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("name", choices=("overfit", "kernels", "visible", "overhead", "failures", *CLAIMS))
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="fields of the recipe to change")
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        help="folder with train, valid and test.jsonl, to train and to probe on (default: made by synth)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace files that experiment did not write")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    studies = parser.add_argument_group("of studies")
    studies.add_argument(
        "--pool",
        type=Path,
        default=None,
        help="clips to train on, in place of DATA's; not of studies alone",
    )
    studies.add_argument(
        "--task", action="append", default=[], metavar="NAME=FOLDER", help="what to probe on, in place of DATA; repeat"
    )
    studies.add_argument(
        "--guide",
        action="append",
        default=[],
        metavar="NAME=ENCODER",
        help=f"default random; repeat. overhead and failures take one. ENCODER: {USAGE}",
    )
    studies.add_argument("--seeds", default="0,1,2", help="default %(default)s")
    studies.add_argument("--probes", type=int, default=0, help="how often a run is probed (default: by study)")
    studies.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the threads")
    studies.add_argument("--record", type=Path, metavar="FOLDER", help="keep what was found there, to compare with")
    studies.add_argument("--compare", type=Path, metavar="RECORD", help="does it agree with what was found there?")


def run(args: argparse.Namespace) -> int:
    out = args.out / args.name
    _check(args)
    recorded = read_record(args.compare) if args.compare else None
    _claim(args.name, out, overwrite=args.overwrite)
    if args.record:
        claim_record(args.record, args.name, overwrite=args.overwrite)
    data = args.data
    if data is None and not (args.pool and (args.task or args.name in OWN)):
        data = _made_data(args.out / "data", progress=not args.quiet)
    pool = args.pool or data / "train.jsonl"
    config = experiment_config(args.name, pool, args.overrides)
    started = time.perf_counter()
    if args.name in CLAIMS:
        verdict, record = examine(args.name, config, _options(args, pool, data), args.out)
        if recorded is not None:
            print(f"{verdict.format()}\n", file=sys.stderr if args.json else None)
            verdict = compare(recorded, record)
    elif args.name == "overfit":
        verdict = overfit(config, say=(lambda text: None) if args.quiet else say)
        write_loss_curves(out / "figures" / "loss.png", {"overfit": verdict.values["curve"]})
    elif args.name == "visible":
        verdict = visible(config, out)
    elif args.name == "overhead":
        guide = next(iter(_guides(args).values()))
        verdict = overhead(config, out, encoder=guide, progress=not args.quiet)
    elif args.name == "failures":
        guide = next(iter(_guides(args).values()))
        encoder = build_encoder(guide, device=pick_device(config.run.device))
        verdict = failures(config, out, encoder=encoder, progress=not args.quiet)
    else:
        verdict = kernels(config, out, progress=not args.quiet)
    value = _result(args.name, verdict, config, time.perf_counter() - started)
    if not args.json:
        print(verdict.format(), flush=True)
    write_json(out / "result.json", value)
    pictures = f", figures in {out / 'figures'}" if (out / "figures").exists() else ""
    print(as_json(value) if args.json else f"written: {out / 'result.json'}{pictures}")
    return 0 if verdict.passed else 1


def _result(name: str, verdict: Verdict, config: PretrainConfig, seconds: float) -> dict[str, Any]:
    return {
        "experiment": name,
        "passed": verdict.passed,
        "verdict": verdict.text,
        "columns": list(verdict.columns),
        "rows": [list(row) for row in verdict.rows],
        "notes": verdict.notes,
        "values": verdict.values,
        "seconds": seconds,
        "config": to_mapping(config),
    }


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that the experiment does not have."""
    own = OWN.get(args.name, ())
    for option in ("pool", "task", "guide", "record", "compare"):
        if args.name not in CLAIMS and getattr(args, option) and option not in own:
            raise ValueError(f"--{option} belongs to studies ({', '.join(CLAIMS)}); {args.name} has none")


def _guides(args: argparse.Namespace) -> dict[str, str]:
    guides = {}
    for text in args.guide or ["random=random"]:
        name, _, spec = text.partition("=")
        if not name or not spec:
            raise ValueError(f"--guide {text!r}; expected NAME=ENCODER, such as clap=clap:PATH")
        guides[name] = spec
    return guides


def _options(args: argparse.Namespace, pool: Path, data: Path | None) -> Options:
    tasks = [Task.of(text) for text in args.task]
    if not tasks and data is not None:
        tasks = [Task.of(f"{data.resolve().name}={data}")]
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        raise ValueError(f"--seeds {args.seeds}; expected whole numbers with commas, such as 0,1,2")
    for name, least in (("probes", 0), ("jobs", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}; expected at least {least}")
    return Options(
        pool=pool.resolve(),
        tasks=tuple(tasks),
        guides=_guides(args),
        seeds=tuple(dict.fromkeys(int(seed) for seed in args.seeds.split(","))),
        probes=args.probes,
        jobs=args.jobs,
        record=args.record,
        progress=not args.quiet,
    )


def _claim(name: str, out: Path, *, overwrite: bool) -> None:
    known: dict[str, tuple[str, ...]] = {"overfit": ("loss",), "failures": ("loss",), "kernels": ("loss", "agreement")}
    figures = (known | {"visible": ("reach", "halo"), "overhead": ()}).get(name, ("scores",))
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
