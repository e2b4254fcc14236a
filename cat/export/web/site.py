"""A folder that is opened in a browser: the model, what runs it, and a page that hears sound. No server, no network.

``index.html`` holds the page's own code and the settings of the model. What is large lies beside it in scripts of at
most a few megabytes, as base64 of gzip: a page that was opened as a file may load scripts, and nothing else.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from cat.export.check import QUICK_ROWS, Difference
from cat.export.model import Exportable
from cat.export.web.runtime import Runtime
from cat.export.write import export
from cat.files import clear_leftovers, new_folder, replacing
from cat.outputs import OutputError
from cat.prediction.classifier import CATClassifier
from cat.prediction.events import run_of, settings_of

HERE = Path(__file__).parent
GENERATOR = '<meta name="generator" content="cat-audio export">'  # in every page, to know it by
INDEX = "index.html"
SCRIPTS = ("resampler.js", "windows.js", "events.js", "worker.js", "tap.js", "sound.js", "picture.js", "page.js")
PART = 12 << 20  # bytes in one script, before it is packed: static hosts take files of some tens of megabytes
# Only what lies beside the page, and nothing from or to a network.
POLICY = (
    "default-src 'none'; script-src 'self' file: blob: data: 'unsafe-inline' 'wasm-unsafe-eval'; worker-src blob:; "
    "style-src 'unsafe-inline'; img-src data:; media-src blob:"
)
_OWN = re.compile(r"index\.html|(model|runtime)(/[\w.-]+\.js)?|runtime/(LICENSE|ThirdPartyNotices\.txt)")


@dataclass(frozen=True)
class Site:
    """What was written: ``size`` of all files, ``events`` the file that the event settings come from."""

    difference: Difference
    size: int
    events: Path | None


def check_folder(folder: Path) -> None:
    """Raises OutputError where `write_site` may not write: on anything but a new or empty folder, or its own page."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder; give --web the name of one that is new or empty")
    for place in (folder, folder / "model", folder / "runtime"):
        clear_leftovers(place)
    inside = _names_in(folder)
    strange = sorted(name for name in inside if not _OWN.fullmatch(name))
    if inside and (strange or not _is_site(folder)):
        named = f", {strange[0]} for one" if strange else ""
        raise OutputError(
            f"{folder} has something in it that this command did not write{named}; it is left alone. Give --web the "
            "name of a folder that is new or empty"
        )


def write_site(
    exportable: Exportable,
    folder: str | Path,
    runtime: Runtime,
    *,
    quantise: bool = False,
    rows: Sequence[int] = QUICK_ROWS,
) -> Site:
    """Write the page of a classifier into ``folder``, whole or not at all; an older page of this command is replaced.

    The model is compared with the checkpoint as `export` does it. Raises: ValueError for an encoder; OutputError.
    """
    folder = Path(folder)
    if exportable.about["kind"] != "classifier":
        raise ValueError(
            f"{exportable.path} is an encoder, and the page tells classes; expected a checkpoint that cat-audio "
            "finetune wrote, and no --encoder"
        )
    check_folder(folder)
    with tempfile.TemporaryDirectory(prefix="cat-audio-") as place:
        model = Path(place, "model.onnx")
        difference = export(exportable, model, waveform=True, spectrogram=True, quantise=quantise, rows=rows)
        parts = {**runtime.files, "model": model.read_bytes()}
    about, settings = _config(exportable)
    files: dict[str, bytes] = {f"runtime/{name}": text for name, text in runtime.licences.items()}
    about["parts"] = {}
    for name, content in parts.items():
        scripts = dict(_scripts(name, content))
        about["parts"][name] = list(scripts)
        files |= scripts
    files[INDEX] = _page(exportable, about, runtime).encode()
    _write(folder, files)
    return Site(difference, sum(map(len, files.values())), settings)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """The files, the page last. Scripts are named after their content, so that until then an older page has its own."""
    if not _names_in(folder):
        with new_folder(folder) as new:
            for name, content in files.items():
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_bytes(content)
        return
    for name, content in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    for name in _names_in(folder) - set(files):
        if name.endswith(".js"):
            (folder / name).unlink()


def _names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.is_dir() else set()


def _is_site(folder: Path) -> bool:
    with open(folder / INDEX, "rb") as file:
        return GENERATOR.encode() in file.read(1000)


def _scripts(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of the scripts that hold a part. Another content has another name, also in a browser's cache."""
    home = "model" if name == "model" else "runtime"
    mark = hashlib.sha256(content).hexdigest()[:12]
    for number, begin in enumerate(range(0, len(content), PART)):
        packed = gzip.compress(content[begin : begin + PART], compresslevel=9, mtime=0)
        yield f"{home}/{name}-{mark}-{number}.js", b'part("%s");\n' % base64.b64encode(packed)


def _config(exportable: Exportable) -> tuple[dict[str, Any], Path | None]:
    """What the page has to know of the model, and the file that the events' settings are of."""
    classifier = CATClassifier.from_pretrained(exportable.path)
    plan, features, labels = classifier.plan(), classifier.features, classifier.classes
    settings, source = settings_of(exportable.path, labels)
    about = {
        "classes": list(labels),
        "names": list(classifier.names),
        "rate": plan.rate,
        "hasFrames": classifier.has_frames,
        "aggregate": "mean" if classifier.info.task == "single-label" else "max",
        "settings": [dataclasses.asdict(settings[label]) for label in labels],
        "plan": {
            "rows": plan.rows,
            "hop": plan.hop,
            "lookahead": plan.lookahead,
            "row": plan.row,
            "samples": plan.samples,
            "frameLength": features.frame_length,
            "frameShift": features.frame_shift,
            "patch": plan.patch_size,
            "bins": features.mel_bins,
        },
    }
    return about, source


def _page(exportable: Exportable, about: dict[str, Any], runtime: Runtime) -> str:
    told = exportable.about
    kind = {"single-label": "one class a sound", "multi-label": "several classes a sound", "events": "sound events"}
    step = "" if told["step"] is None else f", step {told['step']}"
    filled = {
        "generator": GENERATOR,
        "policy": POLICY,
        "title": escape(run_of(exportable.path).resolve().name),
        "facts": f"A Convolutional Audio Transformer for {len(about['classes'])} classes, {kind[told['task']]}",
        "count": str(len(about["classes"])),
        "classes": escape(", ".join(about["names"])),
        "made": f"Made by cat-audio {escape(told['cat_version'])} of {escape(exportable.path.name)}{step}",
        "runtime_version": escape(runtime.version),
        # "<" in data would end a script.
        "config": json.dumps(about, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c"),
        **{name: (HERE / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "page.css")},
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: filled[match[1]], template)
