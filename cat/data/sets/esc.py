"""ESC-50 and ESC-10 (Piczak, "ESC: Dataset for environmental sound classification", 2015): five folds in one manifest.

``meta/esc50.csv`` names clip, fold, class and source recording, and which clips are ESC-10's. ESC-10 was also published
alone, a folder a class ("001 - Dog bark") with the fold as the first letter of a clip's name.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from cat.data.clips import Clip
from cat.data.sets.prepare import DataSet, Listing
from cat.data.text import ManifestError, read_text

_FIELDS = ("filename", "fold", "target", "category", "esc10", "src_file")
_FOLDER = re.compile(r"\d{3} - (.+)")


def _read_esc50(folder: Path, marker: Path) -> Listing:
    return _read_table(marker, "esc50", only_esc10=False)


def _read_esc10(folder: Path, marker: Path) -> Listing:
    return _read_table(marker, "esc10", only_esc10=True) if marker.suffix == ".csv" else _read_folders(marker.parent)


def _read_table(table: Path, name: str, *, only_esc10: bool) -> Listing:
    root = table.parents[1]
    rows = csv.DictReader(read_text(table).splitlines())
    if not set(_FIELDS).issubset(rows.fieldnames or ()):
        raise ManifestError(f"{table}: its columns are {rows.fieldnames}; expected {', '.join(_FIELDS)}")
    clips, missing, classes = [], [], {}
    for row in rows:
        if only_esc10 and row["esc10"] != "True":
            continue
        path = f"audio/{row['filename']}"
        if not (row["fold"] or "").isdigit() or not (row["target"] or "").isdigit():
            raise ManifestError(f"{table}:{rows.line_num}: fold {row['fold']!r}, target {row['target']!r}: no numbers")
        classes[int(row["target"])] = row["category"]
        if (root / path).is_file():
            extra = {"fold": int(row["fold"]), "source": row["src_file"]}
            clips.append(Clip(path, labels=(row["category"],), extra=extra))
        else:
            missing.append(path)
    names = {classes[target]: classes[target].replace("_", " ") for target in sorted(classes)}
    return Listing(root, {name: clips}, names, {name: missing})


def _read_folders(root: Path) -> Listing:
    clips, names = [], {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        match = _FOLDER.fullmatch(folder.name)
        if match is None:
            continue
        label = match[1].strip().lower().replace(" ", "_")
        names[label] = match[1].strip().lower()
        for path in sorted(folder.glob("[1-5]-*.*")):
            extra = {"fold": int(path.name[0]), "source": path.name.split("-")[1]}
            clips.append(Clip(f"{folder.name}/{path.name}", labels=(label,), extra=extra))
    return Listing(root, {"esc10": clips}, names)


ESC50 = DataSet(
    name="esc50",
    title="ESC-50",
    licence="CC BY-NC 3.0",
    markers=("meta/esc50.csv",),
    counts={"esc50": 2000},
    read=_read_esc50,
    home="https://github.com/karolpiczak/ESC-50",
    url="https://github.com/karolpiczak/ESC-50/archive/master.zip",
)
ESC10 = DataSet(
    name="esc10",
    title="ESC-10",
    licence="CC BY 3.0",
    markers=("meta/esc50.csv", "001 - Dog bark"),
    counts={"esc10": 400},
    read=_read_esc10,
    home=ESC50.home,
    url=ESC50.url,
)
