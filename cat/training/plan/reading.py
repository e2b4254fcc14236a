"""What reading a clip takes: a few of the recipe's own are read, here and now."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from cat.data import AudioError, FeatureConfig, Manifest, log_mel
from cat.data.batch import as_float
from cat.data.reading import training_cut
from cat.data.shards.members import Member

CLIPS, SECONDS = 33, 5.0  # that are read at most; the first warms up
# Ten seconds at 16 kHz as FLAC, on one core and on disk: `docs/scale.md`.
ASSUMED_SECONDS, ASSUMED_BYTES = 0.005, 200_000


@dataclass(frozen=True)
class Reading:
    seconds: float  # of one core, a clip
    bytes: float  # of its file
    told: str
    measured: bool = True
    failures: tuple[str, ...] = ()

    @staticmethod
    def assumed() -> Reading:
        return Reading(ASSUMED_SECONDS, ASSUMED_BYTES, "ten seconds at 16 kHz, FLAC", measured=False)


def read_some(manifest: Manifest, features: FeatureConfig, *, crop: str, on_gpu: bool) -> Reading:
    """Clips from all over the manifest that are on this machine, as a data worker reads them; ``on_gpu``: without
    features."""
    times, sizes, failures = [], [], []
    until = time.monotonic() + SECONDS
    for clip in np.linspace(0, len(manifest) - 1, min(len(manifest), CLIPS)).astype(int).tolist():
        audio = manifest.audio(clip)
        if isinstance(audio, Member) and not audio.here:
            continue  # a whole shard would have to come
        started = time.thread_time()
        try:
            cut = training_cut(
                manifest,
                clip,
                features,
                seed=0,
                epoch=0,
                crop=crop,
                roll=False,
                gain=False,
                min_samples=features.frame_length,
            )
        except AudioError as error:
            failures.append(f"{error.path}: {error.reason}")
            continue
        if not on_gpu:
            log_mel(torch.from_numpy(as_float(cut.wave))[None], features)
        times.append(time.thread_time() - started)
        sizes.append(audio.size if isinstance(audio, Member) else audio.stat().st_size)
        if time.monotonic() > until:
            break
    if not times:
        assumed = Reading.assumed()
        return Reading(assumed.seconds, assumed.bytes, assumed.told, measured=False, failures=tuple(failures))
    warm = times[1:] or times
    made = "read" if on_gpu else "read, and its log-mel made"
    told = f"{len(warm)} clips of data.train {made} on this machine"
    return Reading(sum(warm) / len(warm), sum(sizes) / len(sizes), told, failures=tuple(failures))
