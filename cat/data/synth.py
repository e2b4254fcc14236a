"""A labelled data set of synthetic sound events on disk, to try everything on without a download (`cat-audio synth`).

    OUT/{train,valid,test}.jsonl        manifests with path, samples, sample rate and label
    OUT/{train,valid,test}/CLASS/*      WAV, FLAC and OGG, 8 to 48 kHz, mono and stereo, of several sample formats
    OUT/synth.json                      the settings that it was made with, and what it made

Each clip is a function of (seed, split, class, number) and the settings alone: a larger data set of the same seed holds
the smaller one, and the samples are the same on every run. (WAV and FLAC files are then the same to the last bit; an
OGG file has a random serial number in it that libsndfile gives no say over.)
"""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cat.data.manifest import Clip, Manifest, write_manifest
from cat.data.synth_folder import SPLITS, check_same, fill, read_folder
from cat.progress import track
from cat.sounds import CLASSES, make_clip

VERSION = 1  # raise it when the same settings no longer give the same sounds

# (suffix, libsndfile subtype, share of the clips). Not FLOAT: libsndfile writes the time of day into such a WAV.
FORMATS = (
    (".wav", "PCM_16", 0.45),
    (".wav", "PCM_24", 0.1),
    (".wav", "PCM_32", 0.1),
    (".flac", "PCM_16", 0.15),
    (".flac", "PCM_24", 0.05),
    (".ogg", "VORBIS", 0.15),
)


@dataclass(frozen=True)
class SynthConfig:
    """What is made. ``seconds`` and ``snr_db`` are the ranges that a clip's length and noise level are drawn from."""

    clips_per_class: int = 48  # in train
    eval_clips_per_class: int = 16  # in valid, and again in test
    seed: int = 0
    seconds: tuple[float, float] = (1.0, 2.0)
    snr_db: tuple[float, float] = (10.0, 35.0)
    classes: tuple[str, ...] = field(default_factory=lambda: tuple(CLASSES))

    def __post_init__(self) -> None:
        for name in ("clips_per_class", "eval_clips_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")
        if not (0.1 <= self.seconds[0] <= self.seconds[1] < math.inf):
            raise ValueError(
                f"seconds is {self.seconds}; expected a range (shortest, longest) with 0.1 <= shortest <= longest"
            )
        if not (-math.inf < self.snr_db[0] <= self.snr_db[1] < math.inf):
            raise ValueError(f"snr_db is {self.snr_db}; expected a range (noisiest, cleanest) in dB")
        unknown = sorted(set(self.classes) - set(CLASSES))
        if unknown or len(set(self.classes)) < len(self.classes) or len(self.classes) < 2:
            raise ValueError(
                f"classes are {self.classes}; expected two or more different ones of {', '.join(CLASSES)}"
                + (f" ({', '.join(unknown)} unknown)" if unknown else "")
            )

    def clips_of(self, split: str) -> int:
        """Clips of each class in `split`."""
        return self.clips_per_class if split == "train" else self.eval_clips_per_class


def clip_rng(seed: int, split: str, label: str, number: int) -> np.random.Generator:
    """The random numbers of one clip. The class enters by its name, so that a selection of classes changes no clip."""
    return np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(label.encode()), number])


def synthesise(
    config: SynthConfig, out: str | os.PathLike[str], *, force: bool = False, progress: bool = False
) -> bool:
    """Make the data set in the folder `out`, which appears whole or not at all.

    Returns False, and does nothing, when `out` already holds a data set of the same settings. Anything else in `out`
    raises FileExistsError, unless `force` allows an older data set of this command to be replaced: its own files are,
    and nothing else in `out` is touched (`cat.data.synth_folder`).
    """
    _soundfile()
    out = Path(out)
    made = read_folder(out)
    if made is not None and not force:
        check_same(out, made, _settings(config))
        return False
    names = [_name(*clip, _draw_format(clip_rng(config.seed, *clip))[0]) for clip in _plan(config)]
    names += [f"{split}.jsonl" for split in SPLITS]
    fill(out, made, _settings(config), names, lambda folder: _write(config, folder, progress))
    return True


def _settings(config: SynthConfig) -> dict[str, Any]:
    return {"version": VERSION, **json.loads(json.dumps(asdict(config)))}


def _plan(config: SynthConfig) -> list[tuple[str, str, int]]:
    """(split, class, number) of every clip."""
    return [(s, label, k) for s in SPLITS for k in range(config.clips_of(s)) for label in config.classes]


def _write(config: SynthConfig, folder: Path, progress: bool) -> None:
    plan = _plan(config)
    clips: dict[str, list[Clip]] = {split: [] for split in SPLITS}
    for split, label, number in track(plan, len(plan), label="synth", unit="clips", enabled=progress):
        clips[split].append(_write_clip(config, folder, split, label, number))
    for split in SPLITS:
        manifest = Manifest(
            tuple(clips[split]), folder, label_names={label: label.replace("_", " ") for label in config.classes}
        )
        write_manifest(manifest, folder / f"{split}.jsonl")


def _write_clip(config: SynthConfig, folder: Path, split: str, label: str, number: int) -> Clip:
    rng = clip_rng(config.seed, split, label, number)
    suffix, subtype = _draw_format(rng)
    samples, rate = make_clip(rng, label, config.seconds, config.snr_db)
    path = _name(split, label, number, suffix)
    data = samples.T.astype(np.float32)
    content = io.BytesIO()  # not the file itself: libsndfile has no words for a full disk
    with _soundfile().SoundFile(content, "w", rate, data.shape[1], subtype, format=suffix[1:].upper()) as file:
        for block in np.array_split(
            data, len(data) // 65536 + 1
        ):  # libsndfile's Vorbis encoder overflows on long blocks
            file.write(block)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content.getbuffer())
    return Clip(path, len(data), rate, (label,))


def _draw_format(rng: np.random.Generator) -> tuple[str, str]:
    """Suffix and subtype, the first thing that is drawn for a clip."""
    suffix, subtype, _ = FORMATS[rng.choice(len(FORMATS), p=[share for *_, share in FORMATS])]
    return suffix, subtype


def _name(split: str, label: str, number: int, suffix: str) -> str:
    return f"{split}/{label}/{label}-{number:05d}{suffix}"


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without its libsndfile
        raise ImportError(f"soundfile is needed to write audio ({error}): pip install 'cat-kernels[train]'") from error
    return soundfile
