"""What the documentation's commands ask for, made tiny under the names that the pages use."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cat.commands import main

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
_MODEL = "channels=[8,8] embed_dim=16 depth=2 num_heads=2 decoder_dim=16 decoder_layers=1 decoder_groups=2"
_DATA = ("features.frames=64", "data.batch_size=4", "data.num_workers=0")
_TWO_STEPS = ("optim.steps=2", "optim.warmup_steps=1", "run.checkpoint_every=2", "run.threads=1")

# command -> arguments in front of its own; the page's, which come later, win.
SMALL: dict[str, list[str]] = {
    "synth": ["--classes", "bird", "rain", "siren", "--clips-per-class", "2", "--eval-clips-per-class", "2"],
    "dataset": ["--allow-missing", "100000"],
    "pretrain": [
        *(f"model.{field}" for field in _MODEL.split()),
        *_DATA,
        *_TWO_STEPS,
        "masks.num_masks=2",
        "ema.steps=2",
    ],
    # --overwrite: the examples of one list are alternatives, and their runs have one name.
    "finetune": [*_DATA, *_TWO_STEPS, "data.epoch_clips=null", "--overwrite"],
}


def folder_of_folders(path: Path) -> None:
    """Two kinds of sound, four short clips each, in a subfolder a kind."""
    for label in ("hiss", "hum"):
        for number in range(4):
            clip(path / label / f"{number}.wav", label, number)


def clip(path: Path, label: str = "hiss", number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_sound(label, number, path.suffix[1:]))


def _sound(label: str, number: int, form: str) -> bytes:
    import soundfile

    noise = np.random.default_rng(number).normal(size=9000)
    wave = noise if label == "hiss" else np.sin(np.arange(9000) * (0.1 + 0.01 * number))
    file = io.BytesIO()
    soundfile.write(file, 0.1 * wave, 16000, format=form)
    return file.getvalue()


def manifest(path: Path, **fields: Callable[[int], Any]) -> None:
    """A labelled manifest and, beside it, the folder it lists. `fields`: more of a clip's, by its number."""
    from cat.data import load_manifest, write_manifest

    folder = path.with_suffix("")
    folder_of_folders(folder)
    found = load_manifest(folder)
    clips = [
        dataclasses.replace(clip, extra={name: value(number) for name, value in fields.items()})
        for number, clip in enumerate(found.clips)
    ]
    write_manifest(dataclasses.replace(found, clips=tuple(clips)), path)


def quickstart(path: Path) -> None:
    """The folder that `make quickstart` synthesises."""
    assert main(["synth", str(path), *SMALL["synth"], "--quiet"]) == 0


def embedded(path: Path) -> None:
    """With an embedding of every clip."""
    clips = path.with_name(f".{path.name}")
    manifest(clips)
    assert main(["embed", str(clips), "--encoder", "random", "-o", str(path.with_suffix(".npy"))]) == 0


def folds(path: Path) -> None:
    manifest(path, fold=lambda number: number % 2 + 1, source=lambda number: f"recording {number}")


def events(path: Path) -> None:
    """With strong labels: one sound a clip."""
    manifest(path, events=lambda number: [{"onset": 0.1, "offset": 0.4, "label": ("hiss", "hum")[number // 4]}])


def tars(path: Path) -> None:
    """A folder with a tar file as others write them: audio, and labels in a field of the JSON beside it."""
    path.mkdir(parents=True)
    with tarfile.open(path / "train-0000.tar", "w") as tar:
        for number, label in enumerate(("hiss", "hum")):
            for name, content in (
                (f"{number}.flac", _sound(label, number, "flac")),
                (f"{number}.json", json.dumps({"tags": [label]}).encode()),
            ):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))


def audioset(path: Path) -> None:
    """Google's lists and, in a folder beside them, half of the eight clips that each list names."""
    path.mkdir(parents=True)
    classes = 'index,mid,display_name\n0,/m/hiss,"Hiss"\n1,/m/hum,"Hum, mains"\n'
    (path / "class_labels_indices.csv").write_text(classes)
    for name in ("balanced_train", "unbalanced_train", "eval"):
        rows = [("# YTID", " start_seconds", " end_seconds", " positive_labels")]
        for number in range(16):
            label, video = ("hiss", "hum")[number % 2], f"{name:_<9.9}{number:02d}"
            rows.append((video, " 30.000", " 40.000", f' "/m/{label}"'))
            if number < 8:
                clip(path / "audio" / f"Y{video}.wav", label, number)
        (path / f"{name}_segments.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")


def esc50(path: Path) -> None:
    """The archive with all rows of its table, and twenty of its clips."""
    rows = [("filename", "fold", "target", "category", "esc10", "src_file", "take")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for target in range(50):
            for number in range(40):
                name = f"{1 + number % 5}-{target * 40 + number}-A-{target}.wav"
                rows.append((name, 1 + number % 5, target, f"sound_{target}", target % 5 == 0, 100 + number, "A"))
                if target < 2 and number < 10:
                    archive.writestr(f"ESC-50-master/audio/{name}", _sound(("hiss", "hum")[target], number, "wav"))
        table = io.StringIO()
        csv.writer(table).writerows(rows)
        archive.writestr("ESC-50-master/meta/esc50.csv", table.getvalue())


def run(path: Path, *changes: str) -> None:
    """A pre-training run of two steps."""
    audio = path.parent / ".audio"
    if not audio.exists():
        folder_of_folders(audio)
    own = [f"data.train={audio}", f"run.dir={path.parent}", f"run.name={path.name}", "run.figures=false", "--quiet"]
    assert main(["pretrain", str(RECIPES / "tiny.yaml"), *SMALL["pretrain"], *own, *changes]) == 0


def run_with_two_checkpoints(path: Path) -> None:
    run(path, "run.checkpoint_every=1")


def skipped_batch(path: Path) -> None:
    """That of a run which has a clip too loud for float32 in every batch."""
    import soundfile

    run_dir = path.parents[1]
    audio = run_dir.parent / ".loud"
    for number in range(3):
        clip(audio / f"{number}.wav", "hiss", number)
    soundfile.write(audio / "loud.wav", np.random.default_rng(0).normal(size=9000) * 1e30, 16000, subtype="FLOAT")
    own = [f"data.train={audio}", f"run.dir={run_dir.parent}", f"run.name={run_dir.name}", "run.figures=false"]
    assert main(["pretrain", str(RECIPES / "tiny.yaml"), *SMALL["pretrain"], *own, "--quiet"]) == 0
    min(path.parent.iterdir()).rename(path)


def classifier(path: Path) -> None:
    _finetuned(path, "finetune.yaml", manifest)


def event_finder(path: Path) -> None:
    _finetuned(path, "events.yaml", events)


def _finetuned(path: Path, recipe: str, data: Callable[[Path], None]) -> None:
    encoder, train = path.parent / ".encoder", path.parent / f".{path.name}.jsonl"
    if not encoder.exists():
        run(encoder)
    data(train)
    own = [f"data.train={train}", f"encoder={encoder}", f"run.dir={path.parent}", f"run.name={path.name}", "--quiet"]
    assert main(["finetune", str(RECIPES / recipe), *SMALL["finetune"], *own]) == 0


def eat_list(path: Path) -> None:
    """As EAT and fairseq have them: ``.tsv``, ``.lbl`` of the same name, ``label_descriptors.csv``."""
    folder_of_folders(path.parent / ".eat")
    names = [f"{label}/{number}" for label in ("hiss", "hum") for number in range(4)]
    path.write_text("\n".join([".eat", *(f"{name}.wav\t9000" for name in names)]) + "\n")
    labels = [f"{name.rpartition('/')[2]}\t/m/{name.partition('/')[0]}" for name in names]
    path.with_suffix(".lbl").write_text("\n".join(labels) + "\n")
    (path.parent / "label_descriptors.csv").write_text('0,/m/hiss,"Hiss"\n1,/m/hum,"Hum, mains"\n')


def ast_list(path: Path) -> None:
    """As AST's scripts have them: ``.json``, and ``class_labels_indices.csv``."""
    folder = path.parent / ".ast"
    folder_of_folders(folder)
    data = [
        {"wav": str(folder / label / f"{number}.wav"), "labels": f"/m/{label}"}
        for label in ("hiss", "hum")
        for number in range(4)
    ]
    path.write_text(json.dumps({"data": data}))
    table = 'index,mid,display_name\n0,/m/hiss,"Hiss"\n1,/m/hum,"Hum, mains"\n'
    (path.parent / "class_labels_indices.csv").write_text(table)


def metadata(path: Path) -> None:
    """As Hugging Face's audio folders have it."""
    folder_of_folders(path.parent)
    rows = [f"{label}/{number}.wav,{label}" for label in ("hiss", "hum") for number in range(4)]
    path.write_text("\n".join(["file_name,label", *rows]) + "\n")


def eat_checkpoint(path: Path) -> None:
    """A pre-training checkpoint of fairseq's, with EAT's plain patches."""
    import torch

    from cat.checkpoints.released import to_released
    from cat.model import CAT, ModelConfig

    small = {"embed_dim": 64, "depth": 2, "num_heads": 1, "decoder_dim": 32, "decoder_layers": 1, "decoder_groups": 2}
    student, teacher = to_released(CAT(ModelConfig(stem="patch", resolutions=(16,), channels=(), **small)))
    torch.save({"model": student | {"_ema": teacher}}, path)


def clap(path: Path) -> None:
    from tests.cat.encoders.test_clap import save_clap

    save_clap(path, mel_bins=16, truncation="rand_trunc")


def kernel_hub(path: Path, *options: str) -> None:
    command = [sys.executable, "-m", "release.kernel_hub", path, *options]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
