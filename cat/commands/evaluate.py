"""``cat-audio evaluate``: how well a fine-tuned checkpoint names the labels of clips."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import cast

import numpy as np

from cat.checkpoints import ClassifierInfo
from cat.checkpoints.store import step_name
from cat.commands._json import add_json, as_json
from cat.commands._parser import finite, natural
from cat.data.manifest import Manifest, load_manifest
from cat.device import pick_device
from cat.evaluation.evaluate import Evaluation, evaluate, spectrograms
from cat.evaluation.events import write_chosen
from cat.evaluation.intervals import RESAMPLES
from cat.evaluation.report import format_report, outputs, write_report
from cat.figures import is_figure
from cat.figures.scores import Panel, write_class_scores, write_confusion, write_curves, write_mistakes
from cat.model import Classifier
from cat.outputs import Output, claim
from cat.prediction import CATClassifier
from cat.prediction.events import home_of_settings, is_settings, run_of

PICTURES = ("classes", "confusion", "curves", "mistakes")  # confusion: with one label a clip only

EPILOG = """\
OUT/evaluation.json holds everything but the clips' scores, OUT/classes.csv a row a class, OUT/clips.csv a row a clip,
and with --figures OUT/figures/ has pictures: classes.png, curves.png (precision against recall), mistakes.png and, with
one label a clip, confusion.png. Files there are replaced when an earlier evaluate wrote them and nobody changed them
since; others with --overwrite only.

Clips are heard as in the validation of fine-tuning: of one that is longer than the checkpoint was trained on, the part
that data.crop says (the centre for "random"). Intervals come from drawing the clips with replacement; they do not tell
how much another training would differ. Classes without a clip, and clips without a label, are left out and named.

A checkpoint that finds events is also judged by these, where DATA says when they are (the field "events"): they are
found by the settings in events.json beside the checkpoint or in its run, else by the default ones. With --choose-events
DATA, a validation split, chooses the settings, and events.json is written for the next evaluate and for predict.

Exit code 0 when scores were written, also when clips could not be read; 1 when nothing was written, as when more than
--max-failed-share of the clips could not be read.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.description = "Score a fine-tuned checkpoint on labelled clips: mAP, accuracy and others, with intervals."
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="fine-tuning run, checkpoint, .safetensors, or a published model's folder",
    )
    parser.add_argument("data", metavar="DATA", help="labelled clips: folder of folders, shards, .jsonl, .tsv or .json")
    parser.add_argument(
        "-o", "--out", type=Path, default=None, help="default: evaluation/DATA-STEP in the run directory"
    )
    parser.add_argument("--figures", action="store_true", help="draw pictures into OUT/figures/")
    parser.add_argument(
        "--choose-events", action="store_true", help="choose the settings of events on DATA: events.json"
    )
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-workers", type=natural, default=0)
    parser.add_argument(
        "--resamples",
        type=int,
        default=RESAMPLES,
        help=f"draws for the intervals (default {RESAMPLES}); 0: no intervals",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--max-failed-share",
        type=finite,
        default=0.5,
        help="write nothing and fail when more of the clips cannot be read (default 0.5)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that evaluate did not write, or no longer"
    )
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device, "--device")
    manifest = load_manifest(args.data)
    classifier = CATClassifier.from_folder(Path(args.checkpoint), device=device)
    info = classifier.info
    out = args.out or _default_out(info, manifest)
    drawn = [name for name in PICTURES if name != "confusion" or info.task == "single-label"] if args.figures else []
    pictures = {name: out / "figures" / f"{name}.png" for name in drawn}
    settings = home_of_settings(info.path)
    chosen = [Output(settings, is_settings, "a copy of the checkpoint")] if args.choose_events else []
    claim(
        [*outputs(out), *chosen, *(Output(path, is_figure, "another --out") for path in pictures.values())],
        inputs=[info.path, manifest.source],
        overwrite=args.overwrite,
    )
    evaluation = evaluate(
        cast(Classifier, classifier.model),
        info,
        manifest,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        resamples=args.resamples,
        seed=args.seed,
        max_failed_share=args.max_failed_share,
        choose_events=args.choose_events,
        progress=not args.quiet,
    )
    arguments = {name: value for name, value in vars(args).items() if not callable(value)}
    written = write_report(out, evaluation, info, arguments)
    if args.choose_events and evaluation.events is not None:
        events = evaluation.events
        written.append(write_chosen(info.path, events.settings, manifest.source, events.scores))
    if not args.json:  # before the pictures, which take longer
        print(f"{format_report(evaluation, info)}\nwritten: {', '.join(map(str, written))}", flush=True)
    if pictures:
        _draw(pictures, evaluation, info)
    if args.json:
        report = json.loads(written[0].read_text(encoding="utf-8"))
        print(as_json({**report, "written": written, "drawn": list(pictures.values())}))
    elif pictures:
        print(f"drawn: {', '.join(map(str, pictures.values()))}")
    return 0


def _default_out(info: ClassifierInfo, manifest: Manifest) -> Path:
    """evaluation/DATA-STEP in the run directory of a checkpoint, or beside a .safetensors file."""
    data = (manifest.source or manifest.root).absolute()
    name = data.name if data.is_dir() else data.stem
    return run_of(info.path) / "evaluation" / (name if info.step is None else f"{name}-{step_name(info.step)}")


def _draw(pictures: dict[str, Path], evaluation: Evaluation, info: ClassifierInfo) -> None:
    scored, scores, intervals = evaluation.scored, evaluation.scores, evaluation.intervals
    names = info.class_names
    file = info.path.absolute()
    step = "" if info.step is None else f", step {info.step}"
    title = f"{file.name if run_of(file) == file.parent else run_of(file).name}{step}, {scores.clips} clips"
    values = np.array([np.nan if one.ap is None else one.ap for one in scores.classes])
    counts = [one.clips for one in scores.classes]
    write_class_scores(
        pictures["classes"],
        names,
        values,
        counts,
        intervals=None if intervals is None else intervals.classes,
        title=f"{title}: mAP {100 * np.nanmean(values):.1f} %",
    )
    if scores.confusion is not None:
        accuracy = f"accuracy {100 * scores.metrics['accuracy']:.1f} %"
        write_confusion(pictures["confusion"], scores.confusion, names, title=f"{title}: {accuracy}")
    write_curves(pictures["curves"], scored.scores, scored.targets, names, title=title)
    heard = spectrograms(scored.manifest, info, (mistake.clip for mistake in evaluation.mistakes))
    name = dict(zip(info.classes, names, strict=True))
    panels = [
        Panel(
            heard[mistake.clip],
            (
                Path(mistake.path).name,
                f"true: {', '.join(name[label] for label in mistake.labels)}",
                f"{name[mistake.predicted]} {mistake.score:.2f}, {name[mistake.missed]} {mistake.missed_score:.2f}",
            ),
        )
        for mistake in evaluation.mistakes
        if mistake.clip in heard
    ]
    shift = info.features.frame_shift_ms
    write_mistakes(pictures["mistakes"], panels, frame_shift_ms=shift, title=f"{title}: the worst mistakes")
