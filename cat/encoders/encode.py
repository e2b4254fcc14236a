"""Embeddings of audio files in one table (`cat-audio encode`): of files, and of their frames.

It goes on after a file that cannot be read, and where it was after it was stopped: see `cat.encoders.parts`.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cat.data.audio import AudioError
from cat.data.manifest import Manifest
from cat.encoders.audio import CATEncoder, EncoderOutput, Layer, frame_times, mean_of
from cat.encoders.outputs import is_record, record_failures
from cat.encoders.parts import Part, Parts
from cat.encoders.reading import Batch, Skipped, batches, read_long
from cat.encoders.tables import check_suffix, is_table, write_table
from cat.files import replacing
from cat.locks import sole_user
from cat.outputs import Output, claim
from cat.progress import say


@dataclass(frozen=True)
class Settings:
    """What of a file is kept. ``layer``: None is the last; ``window`` and ``overlap`` are those of `CATEncoder`."""

    frames: bool = False
    layer: int | None = None
    window: float | None = None
    overlap: float | None = None

    @property
    def of_call(self) -> dict[str, Any]:
        layers = [] if self.layer is None else [self.layer]
        return {"layers": layers, "patches": False, "window": self.window, "overlap": self.overlap}

    def layer_of(self, output: EncoderOutput) -> Layer:
        return next(iter(output.layers.values())) if output.layers else output


@dataclass(frozen=True)
class Encoded:
    """How many files are in the table, and those that are not."""

    files: int
    skipped: list[Skipped]


def encode_files(
    encoder: CATEncoder,
    manifest: Manifest,
    out: Path,
    settings: Settings | None = None,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> Encoded:
    """Writes ``out`` (.npz, .parquet or .h5), with a row a file in order, and OUT.failures.jsonl, if there are any.

    Stopped or killed, it leaves what it has done in ``OUT.parts``; the same call goes on from there. A file of the
    user's is replaced with ``overwrite`` only.

    Raises: `OutputError`, `TableError`, ImportError where a format's package is missing.
    """
    settings = settings or Settings()
    check_suffix(out)
    encoder.windows(settings.window, settings.overlap)
    claim_tables(out, manifest, overwrite=overwrite)
    made_by = about(encoder, settings)
    job = {"encoder": made_by, "files": manifest.fingerprint}
    folder = out.with_name(out.name + ".parts")
    with sole_user(folder, remedy="another encode writes the same file: wait for it, or give another -o"):
        parts = Parts(folder, job, manifest, overwrite=overwrite)
        if parts.note:
            say(parts.note)
        begin = parts.done
        if 0 < begin < len(manifest) and progress:
            say(f"{begin} of {len(manifest)} files are done already, in {folder}; going on")
        try:
            _encode(encoder, manifest, settings, parts, begin, batch_size, num_workers, progress)
        except BaseException:
            if not parts.done:
                parts.remove()
            else:
                say(f"{parts.done} of {len(manifest)} files are done, in {folder}; the same command goes on with them")
            raise
        result = _assemble(encoder, manifest, settings, parts, out, made_by)
        parts.remove()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return result


def about(encoder: CATEncoder, settings: Settings) -> dict[str, Any]:
    """What embeddings depend on: the same for the same weights, wherever they lie."""
    return {
        "weights": weights_digest(encoder),
        "pooling": encoder.config.pooling,
        "layer": encoder.layer_numbers([] if settings.layer is None else [settings.layer])[0],
        "frames": settings.frames,
        "window": settings.window,
        "overlap": settings.overlap,
        "sample_rate": encoder.sample_rate,
        "frame_seconds": encoder.seconds_per_frame,
    }


def weights_digest(encoder: CATEncoder) -> str:
    """SHA-256 of the configuration and the weights."""
    digest = hashlib.sha256(repr((encoder.config.features, encoder.config.model.num_heads)).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def claim_tables(out: Path, manifest: Manifest, *, overwrite: bool) -> None:
    """Checks that the table and its record of failures may be written. Raises: `OutputError`."""
    failures = failures_path(out)
    names = {out.name.casefold(), failures.name.casefold()}
    paths = (manifest.path(index) for index in range(len(manifest)))
    claim(
        [Output(out, is_table, "another -o"), Output(failures, is_record, "another -o")],
        inputs=[path for path in paths if path.name.casefold() in names],
        overwrite=overwrite,
    )


def failures_path(out: Path) -> Path:
    return out.with_suffix(".failures.jsonl")


def _encode(
    encoder: CATEncoder,
    manifest: Manifest,
    settings: Settings,
    parts: Parts,
    begin: int,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> None:
    loaded = batches(
        manifest,
        range(begin, len(manifest)),
        label="encode",
        sample_rate=encoder.sample_rate,
        min_samples=encoder.min_samples,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    for first in loaded:
        with Part(parts, parts.done) as part:
            batch: Batch | None = first
            while batch is not None:
                part.stamps(batch.stamps)
                if batch.indices and not batch.waves:
                    _long(encoder, manifest, settings, part, batch, batch_size)
                else:
                    _short(encoder, manifest, settings, part, batch)
                batch = None if part.old else next(loaded, None)


def _short(encoder: CATEncoder, manifest: Manifest, settings: Settings, part: Part, batch: Batch) -> None:
    found: dict[int, Skipped | int] = {skipped.index: skipped for skipped in batch.skipped}
    found |= {index: place for place, index in enumerate(batch.indices)}
    if batch.waves:
        size = max(16, len(batch.waves))
        output = encoder(batch.waves, encoder.sample_rate, batch_size=size, **settings.of_call)
        layer = settings.layer_of(output)
        clip_BE, frames_BHD = layer.clip.float().cpu().numpy(), layer.frames.float().cpu().numpy()
    for index in sorted(found):  # a part that is ended between them has them all up to a place
        place = found[index]
        if isinstance(place, Skipped):
            part.skip(place)
        elif not np.isfinite(clip_BE[place]).all():
            part.skip(_not_finite(manifest, index))
        else:
            if settings.frames:
                part.frames(frames_BHD[place, : output.rows[place]])
            part.clip(index, len(batch.waves[place]) / encoder.sample_rate, clip_BE[place])


def _long(
    encoder: CATEncoder, manifest: Manifest, settings: Settings, part: Part, batch: Batch, batch_size: int
) -> None:
    (index,), samples = batch.indices, 0
    for skipped in batch.skipped:
        part.skip(skipped)

    def counted() -> Any:
        nonlocal samples
        for chunk in read_long(manifest, index, encoder.sample_rate):
            samples += len(chunk)
            yield chunk

    def told() -> Any:
        for output in encoder.stream(counted(), encoder.sample_rate, batch_size=batch_size, **settings.of_call):
            layer = settings.layer_of(output)
            if settings.frames:
                part.frames(layer.frames[0].float().cpu().numpy())
            yield layer.clip[0], output.rows[0]

    try:
        clip_E: Tensor = mean_of(told())
    except AudioError as error:  # beyond the first window
        part.skip(Skipped(index, error.path, error.reason))
        return
    if not clip_E.isfinite().all():
        part.skip(_not_finite(manifest, index))
        return
    part.clip(index, samples / encoder.sample_rate, clip_E.float().cpu().numpy())


def _not_finite(manifest: Manifest, index: int) -> Skipped:
    return Skipped(index, str(manifest.path(index)), "its embedding is not finite")


def _assemble(
    encoder: CATEncoder, manifest: Manifest, settings: Settings, parts: Parts, out: Path, made_by: dict[str, Any]
) -> Encoded:
    """The one file, out of the parts."""

    def blocks() -> Any:
        return parts.blocks(
            lambda index: str(manifest.path(index)),
            lambda rows: frame_times(encoder.features, encoder.patch_size, rows).numpy(),
            encoder.config.model.embed_dim,
        )

    skipped = parts.skipped
    record_failures(failures_path(out), [(one.path, one.reason) for one in skipped])
    if len(skipped) < len(manifest):
        with replacing(out) as temporary:
            write_table(temporary, out.suffix, made_by, blocks)
    return Encoded(len(manifest) - len(skipped), skipped)
