"""Speech Commands v2 (Warden, arXiv:1804.03209): 35 words, a folder each, with lists of the validation and test clips.

Also ``trainvalid``: the published results of self-supervised models are trained on training *and* validation clips.
"""

from __future__ import annotations

from pathlib import Path

from cat.data.clips import Clip
from cat.data.sets.prepare import DataSet, Listing
from cat.data.text import lines

_NOISE = "_background_noise_"


def _read(folder: Path, marker: Path) -> Listing:
    root = marker.parent
    listed = {
        name: {line.strip() for _, line in lines(root / f"{file}_list.txt")}
        for name, file in (("valid", "validation"), ("test", "testing"))
    }
    clips: dict[str, list[Clip]] = {"train": [], "valid": [], "test": [], "trainvalid": []}
    words = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != _NOISE)
    found = set()
    for word in words:
        for name in sorted(path.name for path in (root / word).glob("*.wav")):
            path = f"{word}/{name}"
            split = next((split for split, paths in listed.items() if path in paths), "train")
            found.add(path)
            clip = Clip(path, labels=(word,), extra={"speaker": name.partition("_nohash_")[0]})
            clips[split].append(clip)
            if split != "test":
                clips["trainvalid"].append(clip)
    missing = {split: sorted(paths - found) for split, paths in listed.items()}
    return Listing(root, clips, {word: word for word in words}, missing)


SPEECHCOMMANDS = DataSet(
    name="speechcommands",
    title="Speech Commands v2",
    licence="CC BY 4.0",
    markers=("validation_list.txt",),
    counts={"train": 84843, "valid": 9981, "test": 11005, "trainvalid": 94824},
    read=_read,
    home="https://arxiv.org/abs/1804.03209",
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    # as TensorFlow Datasets and torchaudio have it
    sha256="af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)
