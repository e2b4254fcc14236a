"""Frozen encoders at work while a model trains: every clip is encoded when it is drawn.

What an encoder hears is what ``cat-audio embed`` gives it: the whole clip at the encoder's rate, a long one in windows.
A clip's embedding does not depend on the crop that the student sees, so live and cached ones are the same, to the
rounding that other clips in the batch make. It works in the data workers, a clip at a time (`LiveRows`), or in the
training process, a batch at a time (`Listener`): on a GPU on a stream of its own, a batch ahead of the update.

Shapes: B clips, n samples, D_e embedding width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError, read_audio
from cat.data.batch import Batch, one_thread
from cat.data.guides import Heard
from cat.data.manifest import Manifest
from cat.encoders.build import build_encoder
from cat.encoders.embed import encode_clips, encode_long
from cat.encoders.frozen import WINDOW_SECONDS, FrozenEncoder
from cat.encoders.jobs import EncoderError
from cat.encoders.reading import BATCH_SECONDS, Long, collected
from cat.parts import part

# Of a clip that travels from a data worker to the training process; longer ones are read there, so that a batch of
# them does not take gigabytes of shared memory.
MOST_SECONDS = 60


class InEachProcess:
    """An encoder that every process builds for itself when it first needs it: some, such as ONNX Runtime's, have
    threads of their own, which do not come along when a process forks."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._built: tuple[int, FrozenEncoder] | None = None

    def __call__(self) -> FrozenEncoder:
        if self._built is None or self._built[0] != os.getpid():
            self._built = os.getpid(), build_encoder(self.spec, device="cpu")
        return self._built[1]

    def __getstate__(self) -> dict[str, object]:
        return {"spec": self.spec, "_built": None}


class LiveRows:
    """A clip's row (D_e,), encoded on the CPU in whichever process asks for it, on one thread."""

    def __init__(self, encoder: InEachProcess, manifest: Manifest) -> None:
        self.encoder, self.manifest = encoder, manifest

    def __call__(self, index: int) -> np.ndarray:
        with one_thread():
            encoder = self.encoder()
            clip = _waveform(encoder, self.manifest, index, WINDOW_SECONDS)
            if isinstance(clip, Long):
                row = encode_long(encoder, self.manifest, index)
            else:
                row = encode_clips(encoder, self.manifest, [index], [clip])
        _check_finite(encoder, self.manifest, [index], row)
        return row[0].numpy()


class Waves:
    """A clip's waveform (n,), for the training process to encode; of more than a minute: none, it is read there."""

    def __init__(self, encoder: FrozenEncoder, manifest: Manifest) -> None:
        self.sample_rate, self.min_samples = encoder.sample_rate, getattr(encoder, "min_samples", 1)
        self.manifest = manifest

    def __call__(self, index: int) -> np.ndarray:
        clip = _waveform(self, self.manifest, index, MOST_SECONDS)
        return np.empty(0, dtype=np.float32) if isinstance(clip, Long) else clip.numpy()


class Listener:
    """Encodes what was heard in batches, on ``device``; on a GPU in ``dtype``, by autocast.

    Nothing waits for the GPU: what an encoder gives is not looked at there, and a row that is not finite makes the loss
    so. On the CPU it is an error that names the clip.
    """

    def __init__(self, encoders: Mapping[str, FrozenEncoder], device: torch.device, dtype: torch.dtype) -> None:
        self.encoders, self.device, self.dtype = encoders, device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and encoders else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which brings the weights

    def __call__(self, batches: Iterator[Batch], manifest: Manifest) -> Iterator[Batch]:
        """The batches, with the rows of `encoders` among their ``guides``."""
        if self._stream is None:
            for batch in batches:
                with part("guides"):
                    listened = self._listened(batch, manifest)
                yield listened
            return
        before: tuple[Batch, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(self._stream):
                following = self._listened(batch, manifest), self._stream.record_event()
            if before is not None:
                yield self._handed_over(*before)
            before = following
        if before is not None:
            yield self._handed_over(*before)

    def _handed_over(self, batch: Batch, done: torch.cuda.Event) -> Batch:
        """To the stream of the update, which waits for these rows and not for those of the next batch."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(done)
        for name in self.encoders:
            batch.guides[name].record_stream(stream)  # else the next rows could take their memory
        return batch

    def _listened(self, batch: Batch, manifest: Manifest) -> Batch:
        if len(batch.clips) == 0:
            return batch
        rows = {name: self._rows(name, batch.heard[name], batch.clips.tolist(), manifest) for name in self.encoders}
        return replace(batch, guides={**batch.guides, **rows}, heard={})

    @torch.no_grad()
    def _rows(self, name: str, heard: Heard, indices: list[int], manifest: Manifest) -> Tensor:
        """(B, D_e) float32."""
        encoder, rows = self.encoders[name], []
        try:
            clips = zip(indices, heard.clips(), strict=True)
            read = (
                (i, clip if len(clip) else _waveform(encoder, manifest, i, WINDOW_SECONDS), "") for i, clip in clips
            )
            for group in collected(read, len(indices), BATCH_SECONDS * encoder.sample_rate):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    if group.waves:
                        encoded = encode_clips(encoder, manifest, group.indices, group.waves)
                    else:
                        encoded = encode_long(encoder, manifest, group.indices[0])
                if self.device.type == "cpu":
                    _check_finite(encoder, manifest, group.indices, encoded)
                rows.append(encoded.to(self.device, non_blocking=True))
        except AudioError as error:  # of a clip that a data worker could read, in the beginning at least
            raise EncoderError(
                f"guides.{name}: {error}; leave the clip out, or have it left out by data workers: "
                f"guides.{name}.where=worker"
            ) from error
        except EncoderError as error:
            raise EncoderError(
                f"guides.{name}: {encoder.name} failed on a batch of {len(indices)} clips: {error.__cause__ or error} "
                f"(guides.{name}.where=worker encodes one at a time, in little memory, and tells which)"
            ) from error
        return torch.cat(rows)


def _waveform(encoder: FrozenEncoder | Waves, manifest: Manifest, index: int, seconds: int) -> Tensor | Long:
    """The whole clip (n,) at the encoder's rate; of one longer than so many seconds only that it is. Raises AudioError,
    also for one that is too short."""
    rate, most = encoder.sample_rate, seconds * encoder.sample_rate
    wave = read_audio(manifest.audio(index), rate, max_samples=most + 1, min_samples=getattr(encoder, "min_samples", 1))
    return Long() if len(wave) > most else torch.from_numpy(wave)


def _check_finite(encoder: FrozenEncoder, manifest: Manifest, indices: list[int], rows: Tensor) -> None:
    """Raises: AudioError naming the first clip whose row is not."""
    finite = rows.isfinite().all(dim=1).tolist()
    if not all(finite):
        raise AudioError(
            manifest.path(indices[finite.index(False)]), f"{encoder.name} gave an embedding that is not finite"
        )
