"""Waveforms in, embeddings out: of clips, of their frames, of any layer.

Shapes: B clips, n samples, T spectrogram frames, F mel bins, P patch, H = rows of patches (P frames: 160 ms), W = F/P
patches a row, D embedding width, S layers asked for, E = D, or 2 D for pooling "both".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cat.checkpoints import hub, load_encoder
from cat.checkpoints.hub import EncoderConfig
from cat.checkpoints.store import load_tensors
from cat.data.features import FeatureConfig, log_mel
from cat.encoders.waveforms import Waveform, as_chunks, as_clips, too_short
from cat.encoders.windows import Blend, Windows
from cat.model import Encoder, rows_of
from cat.model.encoder import MAX_ROWS


@dataclass(frozen=True)
class Layer:
    """What one layer says. Behind a clip's end `frames` and `patches` are 0."""

    clip: Tensor  # (B, E), pooled
    cls: Tensor  # (B, D)
    frames: Tensor  # (B, H, D): the mean over frequency
    patches: Tensor | None  # (B, H * W, D), patch h * W + w


@dataclass(frozen=True)
class EncoderOutput(Layer):
    """The last layer, and those that were asked for."""

    times: Tensor  # (H,) float64: centres of the frames in seconds
    rows: tuple[int, ...]  # frames that each clip has
    layers: dict[int, Layer] = field(default_factory=dict)  # 0: what the first block sees; depth: the last block's

    @property
    def mask(self) -> Tensor:
        """(B, H) bool: which frames are the clips' own."""
        rows_B1 = torch.tensor(self.rows, device=self.frames.device)[:, None]
        return torch.arange(self.frames.shape[1], device=self.frames.device) < rows_B1


class CATEncoder(nn.Module, hub.HubModel):
    """A CAT encoder that listens::

        encoder = CATEncoder.from_pretrained("runs/mine")       # a run, a checkpoint, a .safetensors, a hub folder
        out = encoder(waveforms, sample_rate)                   # out.clip, out.frames, out.times, ...

    A clip's result does not depend on the clips beside it, nor on padding: what lies behind its end is hidden from the
    stem's convolution, attention and pooling. Lengths count in rows of patches, P frames or 160 ms: the last one is
    filled up with zeros, as in training.

    A clip longer than a window is heard in overlapping ones; see `cat.encoders.windows` for what becomes of the frames
    that two of them share. Its clip embedding is the mean over its frames; a CLS token stands for each frame of its
    window. Every window loses its own mean (DC), as a clip does.

    Nothing here keeps gradients; to train, call ``encoder.encoder(spec, rows=...)``.

    Attributes: ``config``, all that rebuilds it; ``encoder``, the network; ``sample_rate``, Hz; ``dim``, E.
    """

    def __init__(
        self, config: EncoderConfig, *, encoder: Encoder | None = None, origin: hub.Origin | str | None = None
    ) -> None:
        super().__init__()
        self.config, self._origin = config, origin
        self.encoder = Encoder(config.model) if encoder is None else encoder
        self.eval()

    @classmethod
    def from_folder(  # type: ignore[override]
        cls,
        path: Path,
        *,
        pooling: str | None = None,
        weights: str = "student",
        device: torch.device | str = "cpu",
    ) -> CATEncoder:
        """The encoder of a run (its newest checkpoint), pre-trained or fine-tuned, a checkpoint, a .safetensors file or
        a folder of `save_pretrained`; what `from_pretrained` does with what exists.

        ``pooling``: "mean" of the patches (the default), "cls", or "both"; ``weights``: "student" or "teacher" of a
        pre-training.

        Raises: `CheckpointError`, `ConfigError`.
        """
        if not hub.is_folder(path):
            encoder, info = load_encoder(path, weights=weights, device=device)
            origin = hub.Origin(info.config, info.step, info.path)
            return cls(EncoderConfig(info.model, info.features, pooling or "mean"), encoder=encoder, origin=origin)
        found = hub.read_folder(path, device)
        if isinstance(found.config, EncoderConfig):
            model = cls(dataclasses.replace(found.config, pooling=pooling or found.config.pooling), origin=found.card)
        else:
            model = cls(EncoderConfig(found.config.model, found.config.features, pooling or "mean"))
        load_tensors(model.to(device), found.encoder_tensors, str(path))
        return model

    def hub_parts(self) -> tuple[EncoderConfig, dict[str, Tensor], hub.Origin | str | None]:
        return self.config, self.state_dict(), self._origin

    @property
    def features(self) -> FeatureConfig:
        return self.config.features

    @property
    def sample_rate(self) -> int:
        return self.features.sample_rate

    @property
    def dim(self) -> int:
        return self.config.model.embed_dim * (2 if self.config.pooling == "both" else 1)

    @property
    def patch_size(self) -> int:
        return self.config.model.patch_size

    @property
    def seconds_per_frame(self) -> float:
        """From one frame to the next: 0.16."""
        return self.patch_size * self.features.frame_shift / self.sample_rate

    @property
    def min_samples(self) -> int:
        """Of a clip, at `sample_rate`: one spectrogram frame."""
        return self.features.frame_length

    @property
    def device(self) -> torch.device:
        return self.encoder.cls.device

    @torch.no_grad()
    def forward(
        self,
        waveforms: Waveform | Sequence[Waveform],
        sample_rate: int,
        *,
        layers: Sequence[int] | Literal["all"] = (),
        patches: bool = True,
        window: float | None = None,
        overlap: float | None = None,
        batch_size: int = 16,
    ) -> EncoderOutput:
        """Embeddings of clips, on the encoder's device, float32 (float64 of an encoder in float64).

        Args:
            waveforms: one clip (n,), clips of one length (B, n), or a list of clips (n,) of any lengths; NumPy or
                PyTorch, floating point in [-1, 1] or int16.
            sample_rate: theirs, Hz; other rates than the encoder's are resampled.
            layers: whose embeddings to give as well, 0 (what the first block sees) to depth, or -1, -2, ...; "all".
            patches: False saves the memory of the patch tokens, W times that of the frames.
            window: seconds heard at once; None: as long as in training (``features.frames``).
            overlap: seconds that two windows share; None: a quarter of the window.
            batch_size: windows that go through the network at once.

        Raises: ValueError and TypeError that name the clip: empty, shorter than a spectrogram frame (25 ms), not
            finite, of another shape or type.
        """
        clips = as_clips(waveforms, sample_rate, self.sample_rate, min_samples=self.min_samples)
        windows, numbers = self.windows(window, overlap), self.layer_numbers(layers)
        rows = [self._rows(len(clip)) for clip in clips]
        jobs = [(b, start) for b, count in enumerate(rows) for start in windows.starts(count)]
        jobs.sort(key=lambda job: min(rows[job[0]], windows.rows))  # alike lengths go together; each clip's in order
        heard: dict[int, Tensor] = {}
        blends = {b: Blend(windows) for b, count in enumerate(rows) if count > windows.rows}
        taken: dict[int, list[Tensor]] = {b: [] for b in blends}
        for at in range(0, len(jobs), _positive(batch_size)):
            batch = jobs[at : at + batch_size]
            waves = [self._cut(clips[b], start, windows.rows) for b, start in batch]
            for (b, start), tokens in zip(batch, self._tokens(waves, numbers, patches), strict=True):
                if b in blends:
                    blends[b].add(start, tokens)
                    taken[b].append(blends[b].take(start + 1))
                else:
                    heard[b] = tokens
        for b, blend in blends.items():
            heard[b] = torch.cat([*taken.pop(b), blend.take()])
        return self._output([heard.pop(b) for b in range(len(clips))], numbers, patches)

    @torch.no_grad()
    def stream(
        self,
        chunks: Iterable[Waveform],
        sample_rate: int,
        *,
        layers: Sequence[int] | Literal["all"] = (),
        patches: bool = False,
        window: float | None = None,
        overlap: float | None = None,
        batch_size: int = 16,
    ) -> Iterator[EncoderOutput]:
        """One recording that comes in ``chunks`` (n,) of any lengths, in memory that does not grow with it.

        Yields, as they come to be known, outputs of one clip (B = 1) with the next frames and their times: together
        those that `forward` gives of the whole, to rounding. ``clip`` and ``cls`` of an output are those of its frames:
        the recording's are their mean, weighted by ``rows`` (`mean_of`). Arguments and errors as in `forward`.
        """
        windows, numbers = self.windows(window, overlap), self.layer_numbers(layers)
        blend, given = Blend(windows), 0  # rows given
        for batch in _batched(self._windows_of(chunks, sample_rate, windows), batch_size):
            tokens = self._tokens([wave for _, wave in batch], numbers, patches)
            for (start, _), rows in zip(batch, tokens, strict=True):
                blend.add(start, rows)
                ready = blend.take(start + 1)
                yield self._output([ready], numbers, patches, first=given)
                given += len(ready)
        rest = blend.take()
        if len(rest):
            yield self._output([rest], numbers, patches, first=given)

    def _windows_of(
        self, chunks: Iterable[Waveform], sample_rate: int, windows: Windows
    ) -> Iterator[tuple[int, Tensor] | None]:
        """(first row, samples) of each window of `Windows.starts`; None where a chunk has given no more."""
        step = self.patch_size * self.features.frame_shift
        first, parts, have = 0, [torch.empty(0)], 0  # `parts` are the samples from row `first` on
        # Enough for the window at `first` and the next one to be followed by more: neither is the last, which ends with
        # the recording, wherever that is.
        enough = (windows.rows + windows.hop) * step + self.features.frame_length
        for chunk in as_chunks(chunks, sample_rate, self.sample_rate):
            parts.append(chunk)
            have += len(chunk)
            if have >= enough:
                wave = torch.cat(parts)
                while len(wave) >= enough:
                    yield first, self._cut(wave, 0, windows.rows)
                    wave, first = wave[windows.hop * step :], first + windows.hop
                parts, have = [wave.clone()], len(wave)  # a copy: what has gone by is let go
                yield None
        wave = torch.cat(parts)
        if len(wave) < self.min_samples:
            raise too_short("the recording", len(wave), self.sample_rate, self.min_samples)
        for start in windows.starts(self._rows(len(wave))):
            yield first + start, self._cut(wave, start, windows.rows)

    # ------------------------------------------------------------------------------------------------ of windows

    def _rows(self, samples: int) -> int:
        return rows_of(1 + (samples - self.features.frame_length) // self.features.frame_shift, self.patch_size)

    def windows(self, window: float | None = None, overlap: float | None = None) -> Windows:
        """Of so many seconds; see `forward`. Raises: ValueError."""
        for name, value in (("window", window), ("overlap", overlap)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; expected seconds")
        seconds = self.seconds_per_frame
        rows = max(1, self.features.frames // self.patch_size) if window is None else round(window / seconds)
        shared = rows // 4 if overlap is None else round(overlap / seconds)
        if not 1 <= rows <= MAX_ROWS or not 0 <= shared < rows:
            raise ValueError(
                f"window={window}, overlap={overlap} seconds are {rows} and {shared} rows of patches of {seconds:g} s; "
                f"expected a window of 1 to {MAX_ROWS} rows, and an overlap that is shorter"
            )
        return Windows(rows, shared)

    def layer_numbers(self, layers: Sequence[int] | str) -> list[int]:
        """Those asked for, without doubles, and the last one behind them."""
        depth = self.config.model.depth
        wanted = range(depth + 1) if layers == "all" else layers
        if isinstance(wanted, str) or any(not -depth - 1 <= number <= depth for number in wanted):
            raise ValueError(f"layers is {layers!r}; expected 'all' or numbers from 0 to {depth} (or -1, -2, ...)")
        return [*dict.fromkeys(number % (depth + 1) for number in wanted), depth]

    def _cut(self, clip: Tensor, start: int, rows: int) -> Tensor:
        """The samples of so many rows from row ``start`` on."""
        shift, P = self.features.frame_shift, self.patch_size
        first = start * P * shift
        return clip[first : first + self.features.frame_length + (rows * P - 1) * shift]

    def _tokens(self, waves: list[Tensor], numbers: list[int], patches: bool) -> list[Tensor]:
        """Of each of several windows (h, S, 1 + W, D): its rows' patches behind the CLS token, in every layer of
        ``numbers``. Without ``patches`` (h, S, 2, D): their mean."""
        rows, P = [self._rows(len(wave)) for wave in waves], self.patch_size
        features = dataclasses.replace(self.features, frames=max(rows) * P)
        wave_Bn, lengths_B = _padded(waves, self.device)
        spec_B1TF = log_mel(wave_Bn, features, lengths=lengths_B).to(self.encoder.cls.dtype)
        if numbers[:-1]:
            outputs = self.encoder.layers(spec_B1TF, rows=rows)
            tokens = torch.stack([outputs[number] for number in numbers], dim=1)
        else:
            tokens = self.encoder(spec_B1TF, rows=rows)[:, None]
        tokens_BSLD = tokens if tokens.dtype == torch.float64 else tokens.float()
        patches_BHSWD = tokens_BSLD[:, :, 1:].unflatten(2, (max(rows), -1)).transpose(1, 2)
        if not patches:
            patches_BHSWD = patches_BHSWD.mean(3, keepdim=True)
        cls_BHSWD = tokens_BSLD[:, None, :, :1].expand(-1, max(rows), -1, -1, -1)
        heard_BHSWD = torch.cat([cls_BHSWD, patches_BHSWD], dim=3)
        return [heard[:count] for heard, count in zip(heard_BHSWD, rows, strict=True)]

    # ------------------------------------------------------------------------------------------------ to an output

    def _output(self, heard: list[Tensor], numbers: list[int], patches: bool, first: int = 0) -> EncoderOutput:
        """Of each clip's rows (h, S, 1 + W, D), as `_tokens` has them, the first one being row ``first``."""
        layers = [self._layer([rows[:, place] for rows in heard], patches) for place in range(len(numbers))]
        rows = tuple(map(len, heard))
        times = frame_times(self.features, self.patch_size, max(rows), first=first)
        asked = dict(zip(numbers[:-1], layers, strict=False))
        return EncoderOutput(**vars(layers[-1]), times=times, rows=rows, layers=asked)

    def _layer(self, heard: list[Tensor], patches: bool) -> Layer:
        cls_BD = torch.stack([_mean(rows[:, 0]) for rows in heard])
        frames = [rows[:, 1:].mean(1) for rows in heard]
        pooled = [cls_BD] if self.config.pooling != "mean" else []
        if self.config.pooling != "cls":
            pooled.append(torch.stack([_mean(rows) for rows in frames]))
        pad = nn.utils.rnn.pad_sequence
        patches_BLD = pad([rows[:, 1:].flatten(0, 1) for rows in heard], batch_first=True) if patches else None
        return Layer(torch.cat(pooled, dim=1), cls_BD, pad(frames, batch_first=True), patches_BLD)


def frame_times(features: FeatureConfig, patch_size: int, rows: int, *, first: int = 0) -> Tensor:
    """(rows,) float64: centres in seconds of rows of patches, from row ``first`` on: of the first sample of the first
    spectrogram frame of each and the last of its last. Made of whole samples, they do not drift."""
    shift, P = features.frame_shift, patch_size
    twice = 2 * P * shift * torch.arange(first, first + rows) + (P - 1) * shift + features.frame_length
    return twice.double() / (2 * features.sample_rate)


def mean_of(pieces: Iterable[tuple[Tensor, int]]) -> Tensor:
    """(E,): the mean of embeddings (E,), each with the weight of its frames. Of ``output.clip[0], output.rows[0]`` of
    all that `CATEncoder.stream` gives of a recording it is the recording's."""
    total, frames, dtype = None, 0, torch.float32
    for clip_E, rows in pieces:
        part = clip_E.double() * rows
        total, frames, dtype = part if total is None else total + part, frames + rows, clip_E.dtype
    if total is None:
        raise ValueError("there are no embeddings; expected those of a stream")
    return (total / frames).to(dtype)


def _mean(rows_HD: Tensor) -> Tensor:
    """In float64: of ten hours there are 225,000 rows."""
    return rows_HD.double().mean(0).to(rows_HD.dtype)


def _padded(waves: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, n) and the lengths (B,), on the device."""
    if any(wave.dtype != torch.int16 for wave in waves):
        waves = [wave.float() / 32768 if wave.dtype == torch.int16 else wave for wave in waves]
    wave_Bn = nn.utils.rnn.pad_sequence([wave.to(device, non_blocking=True) for wave in waves], batch_first=True)
    return wave_Bn, torch.tensor([len(wave) for wave in waves]).to(device, non_blocking=True)


def _batched(windows: Iterator[tuple[int, Tensor] | None], batch_size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """What is there goes on when no more is (None), or `batch_size` are there."""
    batch: list[tuple[int, Tensor]] = []
    for item in windows:
        if item is not None:
            batch.append(item)
        if batch and (item is None or len(batch) == _positive(batch_size)):
            yield batch
            batch = []
    if batch:
        yield batch


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    return batch_size
