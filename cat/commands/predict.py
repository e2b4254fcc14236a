"""``cat-audio predict``: what a fine-tuned model hears in audio files, or in a stream."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cat.commands._parser import finite
from cat.data.audio import read_windows
from cat.data.listing import listed_files
from cat.data.shards.members import Member
from cat.device import pick_device
from cat.encoders.waveforms import as_chunks
from cat.figures import is_figure, write_prediction
from cat.outputs import Output, claim
from cat.prediction import CATClassifier, Event, EventSettings
from cat.prediction.events import settings_of
from cat.prediction.files import event_row, require_frames
from cat.prediction.outputs import Row, write_predictions, writer
from cat.prediction.stream import PCM, EventStream, Samples, arriving
from cat.progress import say
from cat.signals import StopSignals

EPILOG = """\
A clip that is longer than those of the training is heard in windows over all of it; its score of a class is the mean of
the windows' where classes exclude each other, else the highest.

--json and --csv write rows as they come, into FILE.part; FILE appears when all is done. A command that was stopped goes
on where it was when it is given again. FILE is only replaced with --overwrite. A file that cannot be read is reported,
and the others are done.

Exit code 0 when all files are done, 1 when some could not be read.
"""

_SETTINGS = ("threshold", "low", "median", "gap", "shortest")
# options -> those that need one of them
_OF = {("events", "stream"): _SETTINGS, ("stream",): ("sample_rate", "pcm", "channels")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.description = "The classes, or the sound events, that a fine-tuned model hears in audio."
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="fine-tuning run, checkpoint, .safetensors, hub folder or name"
    )
    parser.add_argument("files", metavar="FILES", nargs="+", help="audio files, folders of them, shards, manifests")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to tell (default 5; 0: all)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON Lines, a file a line; without FILE to stdout"
    )
    parser.add_argument("--csv", metavar="FILE", help="a line a class, or an event; - for stdout")
    parser.add_argument("--windows", action="store_true", help="in --json also the classes of each window")
    parser.add_argument("--aggregate", choices=("auto", "mean", "max"), default="auto", help="of windows' scores")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="of one file: what is heard over time")
    _add_windows(parser)
    _add_events(parser)
    _add_stream(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="windows at once (default 16)")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace files; begin afresh what was stopped")
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def _add_windows(parser: argparse.ArgumentParser) -> None:
    windows = parser.add_argument_group("windows over long audio, in seconds")
    windows.add_argument("--window", type=finite, metavar="S", help="default: as long as the clips of the training")
    windows.add_argument("--hop", type=finite, metavar="S", help="from window to window (default: half a window)")
    windows.add_argument(
        "--lookahead", type=finite, metavar="S", help="of events: heard behind a place at least (default: as before it)"
    )
    windows.add_argument("--step", type=finite, metavar="S", help="of events: their grid (default: a row of patches)")


def _add_stream(parser: argparse.ArgumentParser) -> None:
    stream = parser.add_argument_group(
        "stream",
        "Tells an event when its onset is certain, and once more when it has ended. The windows' hop and lookahead are "
        "an eighth of a window by default: an onset is told after the lookahead, and the hop at most.",
    )
    stream.add_argument("--stream", action="store_true", help="FILES is one of any length, or - for stdin (WAV, raw)")
    stream.add_argument("--sample-rate", type=int, metavar="HZ", help="of raw samples on stdin")
    stream.add_argument("--pcm", choices=list(PCM), help="of raw samples, little-endian (default s16)")
    stream.add_argument("--channels", type=int, metavar="N", help="of raw samples, interleaved (default 1)")


def _add_events(parser: argparse.ArgumentParser) -> None:
    events = parser.add_argument_group(
        "events", "Settings are those of events.json in the run, chosen on its validation split, else 0.5 without more."
    )
    events.add_argument("--events", action="store_true", help="onset and offset of sounds; needs a frame head")
    events.add_argument("--threshold", type=finite, metavar="P", help="for all classes")
    events.add_argument("--low", type=finite, metavar="P", help="where an event that reached the threshold ends")
    events.add_argument("--median", type=int, metavar="ROWS", help="of patches in the filter (160 ms); 1 is none")
    events.add_argument("--gap", type=finite, metavar="S", help="join events that are no further apart")
    events.add_argument("--shortest", type=finite, metavar="S", help="drop shorter events")


def run(args: argparse.Namespace) -> int:
    if args.top < 0:
        raise ValueError(f"--top is {args.top}; expected a number of classes, 0 for all")
    if args.json is not None and args.json == args.csv:
        raise ValueError(f"--json and --csv would both write to {args.json}; give each another name")
    _check_owners(args)
    if args.stream:
        return _follow(args)
    if "-" in args.files:
        raise ValueError("- is stdin, which is read with --stream; name files")
    files = listed_files(args.files)
    classifier = CATClassifier.from_pretrained(args.checkpoint, device=pick_device(args.device, "--device"))
    plan = classifier.plan(window=args.window, hop=args.hop, lookahead=args.lookahead, step=args.step)
    if args.events:
        require_frames(classifier)
    if args.picture is not None:
        _check_picture(args.picture, files, args.overwrite)
    settings = _settings(classifier, args) if args.events else None
    written = {Path(out): form for form, out in (("json", args.json), ("csv", args.csv)) if out not in (None, "-")}
    failed = write_predictions(
        classifier,
        files,
        written,
        plan=plan,
        events=settings,
        aggregate=args.aggregate,
        top=args.top or len(classifier.classes),
        windows=args.windows,
        batch_size=args.batch_size,
        show=_shown(args, "scores" if settings is None else "events", files, bool(written)),
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    on_stdout = "-" in (args.json, args.csv)  # where there is nothing else then
    for out in written:
        say(f"written: {out}") if on_stdout else print(f"written: {out}")
    if args.picture is not None and not failed:
        shown = plan if classifier.has_frames or args.window or args.hop else None
        write_prediction(args.picture, classifier, files[0], plan=shown, events=settings, top=args.top or 20)
        say(f"written: {args.picture}") if on_stdout else print(f"written: {args.picture}")
    if failed:
        say(f"{len(failed)} of {len(files)} files failed. The first: {failed[0].path}: {failed[0].error}")
    return 1 if failed else 0


def _check_owners(args: argparse.Namespace) -> None:
    """Raises ValueError for options that would change nothing."""
    for owners, options in _OF.items():
        for option in options:
            if getattr(args, option) is not None and not any(getattr(args, owner) for owner in owners):
                said = " or ".join(f"--{owner}" for owner in owners)
                name = f"--{option.replace('_', '-')}"
                raise ValueError(f"{name} changes nothing without {said}; add it, or leave {name} out")


def _check_picture(picture: Path, files: list[Path | Member], overwrite: bool) -> None:
    if len(files) != 1:
        raise ValueError(f"--picture shows one file, and {len(files)} were named; name the one that it is to show")
    if picture.suffix.lower() != ".png":
        raise ValueError(f"--picture is {picture}; expected a name that ends in .png")
    claim(
        [Output(picture, is_figure, "another --picture")],
        inputs=[file for file in files if isinstance(file, Path)],
        overwrite=overwrite,
    )


def _follow(args: argparse.Namespace) -> int:
    """Tells the events of a stream on stdout, as they come."""
    if len(args.files) != 1 or args.csv or args.picture or args.json not in (None, "-"):
        raise ValueError(
            "--stream reads one file, or - for stdin, and writes to stdout, as text or --json -; leave out the rest"
        )
    classifier = CATClassifier.from_pretrained(args.checkpoint, device=pick_device(args.device, "--device"))
    plan = classifier.plan(window=args.window, hop=args.hop, lookahead=args.lookahead, step=args.step, live=True)
    stream = EventStream(classifier, _settings(classifier, args), plan)
    names = dict(zip(classifier.classes, classifier.names, strict=True))
    with StopSignals() as stop:
        for wave in _heard(args, plan.rate, stop):
            _tell(stream.feed(wave), names, args.json)
            if stop.received or getattr(sys.stdout, "error", None):
                break
        _tell(stream.finish(), names, args.json)
    say(stream.heard.summary())
    return 128 + stop.received if stop.received else 0


def _heard(args: argparse.Namespace, rate: int, stop: StopSignals) -> Iterator[np.ndarray]:
    """The sound in pieces (n,) at the model's rate."""
    if args.files[0] != "-":
        yield from read_windows(args.files[0], rate, rate)
        return
    if os.isatty(0):
        raise ValueError("stdin is a terminal; send sound into it: arecord -f S16_LE -r 16000 | cat-audio predict ...")
    channels = 1 if args.channels is None else args.channels
    samples = Samples(arriving(0, stop), args.sample_rate, pcm=args.pcm or "s16", channels=channels)
    for wave in as_chunks(samples, samples.sample_rate, rate):
        yield wave.numpy()
    if samples.bad:
        say(f"{samples.bad} samples of the stream were NaN or infinite, and taken for silence")


def _tell(events: list[Event], names: dict[str, str], form: str | None) -> None:
    for event in events:
        row = event_row(event, names)
        if form is not None:
            kind = "onset" if event.offset is None else "event"
            print(json.dumps({"type": kind, "number": event.number, **row}), flush=True)
        elif event.offset is None:
            print(f"{event.onset:10.2f} -              {event.score:.3f}  {row['name']} begins", flush=True)
        else:
            print(f"{event.onset:10.2f} - {event.offset:10.2f} s  {event.score:.3f}  {row['name']}", flush=True)


def _settings(classifier: CATClassifier, args: argparse.Namespace) -> dict[str, EventSettings]:
    """Those that belong to the checkpoint, with what was said on the command line."""
    found, _ = settings_of(classifier.info.path, classifier.classes)
    said = {name: getattr(args, name) for name in _SETTINGS}
    said = {name: value for name, value in said.items() if value is not None}
    if "threshold" in said and "low" not in said:
        said["low"] = None
    return {label: dataclasses.replace(one, **said) for label, one in found.items()}


def _shown(args: argparse.Namespace, kind: str, files: list[Path | Member], written: bool) -> Callable[[Row], None]:
    """What is printed of each file."""
    for form in ("json", "csv"):
        if getattr(args, form) == "-":
            return writer(sys.stdout, form, kind)
    if written:
        return lambda row: None
    width = min(60, max(len(str(file)) for file in files))
    return lambda row: print("\n".join(_table(row, width)), flush=True)


def _table(row: Row, width: int) -> list[str]:
    name = f"{row['path']:<{width}}"
    if "error" in row:
        return [f"{name}  failed: {row['error']}"]
    if "scores" in row:
        return [
            "  ".join([name, f"{row['seconds']:8.2f} s", *(f"{c['name']} {c['score']:.3f}" for c in row["scores"])])
        ]
    return [
        f"{name}  {one['onset']:9.2f} - {one['offset']:9.2f} s  {one['score']:.3f}  {one['name']}"
        for one in row["events"]
    ] or [f"{name}  no events in {row['seconds']:.2f} s"]
