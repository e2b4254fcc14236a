"""The Free Spoken Digit Dataset: ``recordings/{digit}_{speaker}_{index}.wav``, fifty of each digit by every speaker.

Recordings 0 to 4 are the official test split. Speakers are in all splits, so that there is ``speakers`` as well: every
recording, with the speaker's number as its fold.
"""

from __future__ import annotations

import re
from pathlib import Path

from cat.data.clips import Clip
from cat.data.sets.prepare import DataSet, Listing

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAME = re.compile(r"([0-9])_(.+)_(\d+)\.\w+")
_TAKES = 50


def _read(folder: Path, marker: Path) -> Listing:
    found = {}
    for file in sorted(marker.iterdir()):
        match = _NAME.fullmatch(file.name)
        if match is not None and int(match[3]) < _TAKES:
            found[match[2], int(match[1]), int(match[3])] = f"{marker.name}/{file.name}"
    speakers = sorted({speaker for speaker, _, _ in found})
    clips: dict[str, list[Clip]] = {"train": [], "test": [], "speakers": []}
    missing: dict[str, list[str]] = {"train": [], "test": [], "speakers": []}
    for number, speaker in enumerate(speakers, 1):
        for digit, word in enumerate(_WORDS):
            for take in range(_TAKES):
                path = found.get((speaker, digit, take))
                for split in ("test" if take < 5 else "train", "speakers"):
                    if path is None:
                        missing[split].append(f"{marker.name}/{digit}_{speaker}_{take}.wav")
                    else:
                        fold = {"fold": number} if split == "speakers" else {}
                        clips[split].append(Clip(path, labels=(word,), extra={"speaker": speaker, **fold}))
    return Listing(marker.parent, clips, {word: word for word in _WORDS}, missing)


FSDD = DataSet(
    name="fsdd",
    title="the Free Spoken Digit Dataset",
    licence="CC BY-SA 4.0",
    markers=("recordings",),
    counts={"train": 2700, "test": 300, "speakers": 3000},
    read=_read,
    home="https://github.com/Jakobovski/free-spoken-digit-dataset",
    url="https://github.com/Jakobovski/free-spoken-digit-dataset/archive/master.zip",
)
