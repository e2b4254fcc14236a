"""A fine-tuned checkpoint as a function: waveforms in, scores of its classes out.

Shapes: B clips, n samples, T frames, H rows of patches, C classes, W windows, S shifts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cat.checkpoints import ClassifierInfo, hub, load_classifier
from cat.checkpoints.hub import ClassifierConfig
from cat.data.features import log_mel
from cat.encoders.waveforms import Waveform, as_clips
from cat.prediction.windows import Plan, Window, Windower

T = TypeVar("T")
Aggregate = Literal["auto", "mean", "max"]
Heard = tuple[tuple[float, float], np.ndarray]  # when a window begins and ends, and its scores (C,)


@dataclass(frozen=True)
class ClipScores:
    """Of one clip. ``times`` (W, 2): seconds at which the windows begin and end; ``windows`` (W, C): their scores."""

    clip: np.ndarray
    times: np.ndarray
    windows: np.ndarray


@dataclass(frozen=True)
class Prediction:
    """``scores`` (B, C) float32 in 0..1, of the labels ``classes``, for people ``names``; ``clips`` has each clip's
    windows."""

    scores: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...]
    clips: list[ClipScores]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Of each clip the ``k`` best (label, score), the best first."""
        return [best(row, self.classes, k) for row in self.scores.numpy()]


def best(scores_C: np.ndarray, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
    """The ``k`` best (label, score), the best first; of equal ones the first in the classes' order."""
    order = np.argsort(-scores_C, kind="stable")[:k]
    return [(classes[c], float(scores_C[c])) for c in order]


class CATClassifier(nn.Module, hub.HubModel):
    """A classifier that takes waveforms of any length::

        classifier = CATClassifier.from_pretrained("runs/esc50")  # a run, a checkpoint, a .safetensors, a hub folder
        prediction = classifier(waveforms, sample_rate=44100)  # a waveform, or a list of different lengths
        prediction.top(3)

    Behind a clip's end it does as the checkpoint was trained ("fill" or "mask"); either way a clip's scores depend on
    the clip alone, up to rounding.
    """

    def __init__(self, model: nn.Module, info: ClassifierInfo, *, card: str | None = None) -> None:
        super().__init__()
        self.model, self.info, self._card = model, info, card
        self.classes, self.names, self.features = info.classes, info.class_names, info.features
        self.patch_size = info.model.patch_size
        self.eval()

    @classmethod
    def from_folder(  # type: ignore[override]
        cls, path: Path, *, device: torch.device | str = "cpu"
    ) -> CATClassifier:
        """The classifier of a fine-tuning run (newest checkpoint), a checkpoint directory, a .safetensors file or a
        folder of `save_pretrained`; what `from_pretrained` does with what exists.

        Raises: `CheckpointError`, also for a pre-trained checkpoint, which has no classes; `ConfigError`.
        """
        if not hub.is_folder(path):
            return cls(*load_classifier(path, device))
        model, info, card = hub.read_classifier(path, device)
        return cls(model, info, card=card)

    def hub_parts(self) -> tuple[ClassifierConfig, dict[str, Tensor], hub.Origin | str | None]:
        info = self.info
        config = ClassifierConfig(
            info.model, info.features, info.head, info.task, info.classes, info.class_names, info.padding
        )
        origin = self._card or hub.Origin(info.config, info.step, info.path)
        return config, self.model.state_dict(), origin

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def has_frames(self) -> bool:
        """Whether it tells where in a clip a class is (a frame head)."""
        return self.info.head.kind == "frames"

    def plan(
        self,
        *,
        window: float | None = None,
        hop: float | None = None,
        lookahead: float | None = None,
        step: float | None = None,
        live: bool = False,
    ) -> Plan:
        """Windows of ``window`` seconds (default: as long as in training) every ``hop`` seconds (half a window), to the
        nearest row of patches. For rows of a frame head: ``lookahead`` seconds that a row's window has heard behind it
        at least (default: as much as before it), and ``step`` seconds from row to row (a row of patches). ``live``: for
        a stream, hop and lookahead are an eighth of the window by default, which tells sooner and computes more."""
        row = self.patch_size * self.features.frame_shift / self.features.sample_rate
        most = -(-self.features.frames // self.patch_size)
        rows = most if window is None else self._rows("window", window, row)
        if rows > most:
            raise ValueError(
                f"window is {window:g} s; expected at most {most * row:g} s, as long as the clips that the model was "
                "trained on"
            )
        eighth = max(1, rows // 8)
        hop_rows = (eighth if live else max(1, rows // 2)) if hop is None else self._rows("hop", hop, row)
        ahead = min(eighth, rows - hop_rows) if live else (rows - hop_rows) // 2
        ahead = ahead if lookahead is None else self._rows("lookahead", lookahead, row, least=0)
        if step is not None and not 0 < step <= row:
            raise ValueError(f"step is {step} s; expected a row of patches, {row:g} s, or a whole part of it")
        shifts = 1 if step is None else round(row / step)
        return Plan(self.features, self.patch_size, rows, hop_rows, ahead if self.has_frames else 0, shifts)

    @staticmethod
    def _rows(name: str, seconds: float, row: float, least: int = 1) -> int:
        if not (seconds > 0 or seconds == least == 0) or seconds == float("inf"):
            raise ValueError(f"{name} is {seconds} s; expected {'more than 0 s' if least else '0 s or more'}")
        return max(least, round(seconds / row))

    def forward(
        self,
        waveforms: Waveform | Sequence[Waveform],
        sample_rate: int,
        *,
        plan: Plan | None = None,
        aggregate: Aggregate = "auto",
        batch_size: int = 16,
    ) -> Prediction:
        """Scores of waveforms in [-1, 1] or int16: one (n,), a batch (B, n), or a list of different lengths.

        A clip longer than a window is heard in windows (`plan`) that cover all of it; its score of a class is their
        "mean" or "max" ("auto": the mean where classes exclude each other, else the maximum).
        """
        plan, least = plan or self.plan(), self.features.frame_length
        waves = as_clips(waveforms, sample_rate, plan.rate, min_samples=least)
        pieces = ((clip, window) for clip, wave in enumerate(waves) for window in as_windows([as_float(wave)], plan))
        found: list[list[Heard]] = [[] for _ in waves]
        for (clip, window), (clip_C, _) in self.hear(pieces, batch_size):
            found[clip].append((window.span(plan), clip_C))
        clips = [self.gather(heard, aggregate) for heard in found]
        scores = np.stack([clip.clip for clip in clips]) if clips else np.zeros((0, len(self.classes)), np.float32)
        return Prediction(torch.from_numpy(scores), self.classes, self.names, clips)

    def gather(self, heard: Sequence[Heard], aggregate: Aggregate = "auto") -> ClipScores:
        """A clip's scores from those of its windows."""
        times_W2 = np.array([span for span, _ in heard])
        scores_WC = np.stack([clip_C for _, clip_C in heard])
        if aggregate == "auto":
            aggregate = "mean" if self.info.task == "single-label" else "max"
        return ClipScores(scores_WC.mean(0) if aggregate == "mean" else scores_WC.max(0), times_W2, scores_WC)

    def hear(
        self, windows: Iterable[tuple[T, Window]], batch_size: int = 16
    ) -> Iterator[tuple[tuple[T, Window], tuple[np.ndarray, np.ndarray | None]]]:
        """Each window, in order, with what the model says: scores (C,), and of a frame head those of the rows that are
        taken from it (end - begin, C). ``batch_size`` windows, or the next one alone, go through the model at once."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        windows = iter(windows)
        while batch := list(itertools.islice(windows, batch_size)):
            clip_BC, frames_BHC = self._scores([wave for _, window in batch for wave in window.waves])
            place = 0
            for item in batch:
                window, mine = item[1], slice(place, place + len(item[1].waves))
                rows_RC = None if frames_BHC is None else window.taken(frames_BHC[mine])
                yield item, (clip_BC[place], rows_RC)
                place = mine.stop

    @torch.no_grad()
    def _scores(self, waves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, C), and (B, H, C) of a frame head, of waveforms no longer than a window."""
        P = self.patch_size
        lengths_B = torch.tensor([len(wave) for wave in waves])
        wave_Bn = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
        frames = [1 + (len(wave) - self.features.frame_length) // self.features.frame_shift for wave in waves]
        rows = [max(1, -(-count // P)) for count in frames] if self.info.padding == "mask" else None
        features = dataclasses.replace(self.features, frames=max(rows) * P) if rows else self.features
        spec_B1TF = log_mel(wave_Bn.to(self.device), features, lengths=lengths_B.to(self.device))
        output = self.model(spec_B1TF, rows=rows)
        probabilities: Any = self.model.probabilities
        frames_BHC = None if output.frames is None else probabilities(output.frames).float().cpu().numpy()
        return probabilities(output.clip).float().cpu().numpy(), frames_BHC


def as_float(wave: Tensor) -> np.ndarray:
    return wave.cpu().numpy().astype(np.float32) / (32768 if wave.dtype == torch.int16 else 1)


def as_windows(blocks: Iterable[np.ndarray], plan: Plan) -> Iterator[Window]:
    """The windows of a clip that comes in pieces (n,)."""
    windower = Windower(plan)
    for block in blocks:
        yield from windower.feed(block)
    yield from windower.finish()
