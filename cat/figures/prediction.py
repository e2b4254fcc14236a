"""What a classifier hears in a file, over time, under the file's spectrogram.

Shapes: n samples, T frames, F mel bins, C classes, K classes shown, N columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cat.data.audio import Source, read_audio
from cat.data.features import FeatureConfig, frames_in, log_mel
from cat.figures.canvas import figure, save, text_of
from cat.figures.spectrograms import paint
from cat.prediction import CATClassifier, Event, EventSettings, Plan, find_events
from cat.prediction.classifier import as_windows

LONGEST = 600  # seconds that are drawn
COLUMNS = 1500  # of the spectrogram: more than the picture has pixels
SHORTEST_WINDOW = 1.0  # seconds of a clip head: it takes less than it was trained on to tell when, and errs more


def write_prediction(
    path: Path,
    classifier: CATClassifier,
    file: Source,
    *,
    plan: Plan | None = None,
    events: Mapping[str, EventSettings] | None = None,
    top: int = 5,
) -> Path:
    """A file's spectrogram, and below it the scores of its ``top`` classes over time; of the first ten minutes.

    Of a frame head the rows' scores, with the ``events`` that these settings find; of a clip head those of windows,
    without ``plan`` of a sixth of the file, at least a second. Raises AudioError for a file that cannot be read.
    """
    features = classifier.features
    wave = read_audio(
        file, features.sample_rate, max_samples=LONGEST * features.sample_rate, min_samples=features.frame_length
    )
    seconds = len(wave) / features.sample_rate
    plan = plan or _plan(classifier, seconds)
    edges_N, scores_NC, found = _heard(classifier, wave, plan, events)
    shown = np.argsort(-scores_NC.max(axis=0), kind="stable")[: max(1, top)]

    drawing, axes = figure(
        9, 3.2 + 0.32 * len(shown), rows=2, sharex=True, height_ratios=(2.2, 0.6 + 0.32 * len(shown))
    )
    _spectrogram(axes[0], wave, features, seconds)
    axes[0].set_title(text_of(f"{Path(file).name}{_cut_off(seconds)}"), fontsize=10, loc="left")
    image = axes[1].pcolormesh(
        edges_N, np.arange(len(shown) + 1), scores_NC[:, shown].T, vmin=0, vmax=1, cmap="Blues", edgecolors="none"
    )
    for event in found:
        if (c := classifier.classes.index(event.label)) in shown:
            _mark(axes[1], event, list(shown).index(c))
    axes[1].set_yticks(np.arange(len(shown)) + 0.5, [text_of(classifier.names[c]) for c in shown])
    axes[1].invert_yaxis()
    axes[1].set_xlim(0, seconds)
    axes[1].set_xlabel("time (s)")
    axes[1].set_title(_how(classifier, plan, events), fontsize=9, loc="left", color="#444444")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    drawing.colorbar(image, ax=axes.tolist(), label="score", shrink=0.6, pad=0.01)
    return save(drawing, path)


def _plan(classifier: CATClassifier, seconds: float) -> Plan:
    if classifier.has_frames:
        return classifier.plan()
    row = classifier.patch_size * classifier.features.frame_shift / classifier.features.sample_rate
    most = classifier.features.frames // classifier.patch_size * row
    window = min(most, max(SHORTEST_WINDOW, seconds / 6))
    return classifier.plan(window=window, hop=window / 4)


def _heard(
    classifier: CATClassifier, wave: np.ndarray, plan: Plan, events: Mapping[str, EventSettings] | None
) -> tuple[np.ndarray, np.ndarray, list[Event]]:
    """Where the columns begin and end (N + 1,), their scores (N, C), and the events."""
    heard = list(classifier.hear((None, window) for window in as_windows([wave], plan)))  # of ten minutes at the most
    seconds = len(wave) / plan.rate
    if classifier.has_frames:
        scores_NC = np.concatenate([rows_RC for _, (_, rows_RC) in heard if rows_RC is not None])
        edges = [plan.time(row) for row in range(len(scores_NC))]
        found = [] if events is None else find_events(scores_NC, classifier.classes, events, plan, seconds)
        return np.array([*edges, seconds]), scores_NC, found
    times_N2 = np.array([window.span(plan) for (_, window), _ in heard])
    middles = times_N2.mean(axis=1)
    edges_N = np.concatenate([[0.0], (middles[1:] + middles[:-1]) / 2, [seconds]])
    return edges_N, np.stack([clip_C for _, (clip_C, _) in heard]), []


def _spectrogram(axis: Any, wave: np.ndarray, features: FeatureConfig, seconds: float) -> None:
    frames = int(frames_in(features, torch.tensor(len(wave))))
    spec_TF = log_mel(torch.from_numpy(wave), dataclasses.replace(features, frames=frames))[0, 0].numpy()
    every = math.ceil(frames / COLUMNS)
    columns_NF = np.stack([part.mean(axis=0) for part in np.array_split(spec_TF, math.ceil(frames / every))])
    low, high = np.percentile(columns_NF, [1, 99.8])
    paint(axis, columns_NF, (0, seconds, 0, features.mel_bins), low, max(high, low + 1e-3))
    lowest, highest = (
        features.low_freq,
        features.high_freq + (0 if features.high_freq > 0 else features.sample_rate / 2),
    )
    ticks = [hertz for hertz in (250, 500, 1000, 2000, 4000, 8000, 16000) if lowest < hertz <= highest]
    scale = features.mel_bins / (_mel(highest) - _mel(lowest))
    axis.set_yticks([(_mel(hertz) - _mel(lowest)) * scale for hertz in ticks], [f"{hertz / 1000:g}" for hertz in ticks])
    axis.set_ylabel("frequency (kHz)")


def _mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


def _mark(axis: Any, event: Event, row: int) -> None:
    from matplotlib.patches import Rectangle

    if event.offset is not None:
        box = Rectangle(
            (event.onset, row + 0.1), event.offset - event.onset, 0.8, fill=False, edgecolor="#D55E00", linewidth=1.4
        )
        axis.add_patch(box)


def _how(classifier: CATClassifier, plan: Plan, events: Mapping[str, EventSettings] | None) -> str:
    row = plan.row / plan.rate
    if classifier.has_frames:
        return f"scores every {plan.step:g} s" + ("" if events is None else ", events framed")
    return f"scores of windows of {plan.rows * row:g} s every {plan.hop * row:g} s"


def _cut_off(seconds: float) -> str:
    return f" (the first {LONGEST // 60} minutes)" if seconds >= LONGEST else ""
