"""The embeddings of a manifest's clips, from CLAP, a control or a CAT checkpoint (`cat-audio embed`).

Writes one memory-mapped ``.npy`` for the whole data set and a manifest whose clips name their row in it, ready for
pre-training with representation regularisation. A clip that cannot be read is recorded and left out of the written
manifest, so that clip and embedding never part. Stopped, it goes on where it was: see `cat.encoders.partial`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError
from cat.data.embeddings import EmbeddingWriter
from cat.data.manifest import Manifest, write_manifest
from cat.encoders.frozen import FrozenEncoder, weighted_mean
from cat.encoders.identity import device_of, identity_of
from cat.encoders.jobs import EncoderError, in_blocks, one_thread, pick_jobs
from cat.encoders.outputs import claim_outputs, partial_folder, record_failures, sign
from cat.encoders.partial import Block, Partial
from cat.encoders.reading import Skipped, at_once, batches, read_long
from cat.locks import sole_user
from cat.progress import Progress, say
from cat_kernels import __version__

SECONDS = 10.0  # that a block takes at the least; so much is lost with a process that is killed
_PACKAGES = ("torch", "numpy", "soundfile", "soxr", "transformers", "onnxruntime", "ai-edge-litert")


@dataclass
class Embeddings:
    """rows (K, dim) float32, row i belonging to clip ``indices[i]`` of the manifest; `skipped` are the others."""

    rows: np.ndarray
    indices: np.ndarray
    skipped: list[Skipped] = field(default_factory=list)


def embed_manifest(
    manifest: Manifest,
    encoder: FrozenEncoder,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    progress: bool = False,
) -> Iterator[tuple[np.ndarray, Tensor, list[Skipped]]]:
    """Embeds the clips in their order. Yields (indices (k,) int64, embeddings (k, dim) float32 on the CPU, skipped) a
    batch; k may be 0. A clip is skipped when it cannot be read or its embedding is not finite.

    Memory does not grow with the length of the clips: an encoder gets no more than ten minutes of audio at once,
    and a clip longer than `WINDOW_SECONDS` in windows (see `FrozenEncoder`). Raises EncoderError, with the clips'
    names.
    """
    parts = _embedded(
        manifest, encoder, range(len(manifest)), batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    for part in parts:
        yield part.indices, torch.from_numpy(part.rows), part.skipped


def _embedded(
    manifest: Manifest,
    encoder: FrozenEncoder,
    places: range,
    *,
    batch_size: int,
    num_workers: int = 0,
    progress: bool = False,
) -> Iterator[Block]:
    """`embed_manifest` of some places, each batch with the stamps of its files."""
    loaded = batches(
        manifest,
        places,
        label=encoder.name,
        sample_rate=encoder.sample_rate,
        min_samples=getattr(encoder, "min_samples", 1),
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    begin = places.start
    for batch in loaded:
        indices, waves, skipped = batch.indices, batch.waves, batch.skipped
        rows_BE = torch.empty(0, encoder.dim)
        try:
            if waves:
                rows_BE = encode_clips(encoder, manifest, indices, waves).cpu()
            elif indices:
                rows_BE = encode_long(encoder, manifest, indices[0])
        except AudioError as error:  # beyond the first window
            skipped, indices = [*skipped, Skipped(indices[0], error.path, error.reason)], []
        finite_B = rows_BE.isfinite().all(dim=1)
        skipped = skipped + [
            Skipped(index, str(manifest.path(index)), f"{encoder.name} gave an embedding that is not finite")
            for index, finite in zip(indices, finite_B.tolist(), strict=True)
            if not finite
        ]
        kept = np.asarray(indices, dtype=np.int64)[finite_B.numpy()]
        end = begin + len(batch.stamps)
        yield Block(begin, end, kept, rows_BE[finite_B].numpy(), skipped, batch.stamps)
        begin = end


def collect_embeddings(manifest: Manifest, encoder: FrozenEncoder, **options: object) -> Embeddings:
    """`embed_manifest` gathered in memory, for probes."""
    parts = list(embed_manifest(manifest, encoder, **options))  # type: ignore[arg-type]
    if not parts or not any(len(indices) for indices, _, _ in parts):
        reasons = "; ".join(f"{s.path}: {s.reason}" for _, _, skipped in parts for s in skipped[:1])
        raise ValueError(f"no clip of the manifest could be embedded ({len(manifest.clips)} clips). First: {reasons}")
    return Embeddings(
        rows=torch.cat([rows for _, rows, _ in parts]).numpy(),
        indices=np.concatenate([indices for indices, _, _ in parts]),
        skipped=[s for _, _, skipped in parts for s in skipped],
    )


def encode_clips(encoder: FrozenEncoder, manifest: Manifest, indices: list[int], waves: list[Tensor]) -> Tensor:
    """(B, dim) float32, on the device that it was computed on. Raises EncoderError, with the clips' names."""
    waveform_Bn = torch.zeros(len(waves), max(map(len, waves)))
    for row, wave in zip(waveform_Bn, waves, strict=True):
        row[: len(wave)] = wave
    lengths_B = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    try:
        return encoder(waveform_Bn, lengths_B).float()
    except Exception as error:
        names = ", ".join(str(manifest.path(index)) for index in indices)
        seconds = waveform_Bn.shape[1] / encoder.sample_rate
        if len(waves) == 1:
            raise EncoderError(f"{encoder.name} failed on {names} ({seconds:.1f} s): {error}") from error
        raise EncoderError(
            f"{encoder.name} failed on a batch of {len(waves)} clips of up to {seconds:.1f} s: {error} "
            f"(--batch-size 1 tells which one; fewer also need less memory.) The clips: {names}"
        ) from error


def encode_long(encoder: FrozenEncoder, manifest: Manifest, index: int) -> Tensor:
    """(1, dim) float32 on the CPU: a clip's windows, made one. Raises AudioError for one that cannot be read."""
    windows = read_long(manifest, index, encoder.sample_rate)
    if hasattr(encoder, "of_stream"):
        return encoder.of_stream(windows)[None].to("cpu", torch.float32)
    rows_WE, lengths = torch.empty(0, encoder.dim), []
    for wave in windows:
        row_1E = encode_clips(encoder, manifest, [index], [torch.from_numpy(wave)]).cpu()
        # Not a list of rows: small blocks between large ones that come and go made the heap grow by 10 MB a window.
        rows_WE = torch.cat([rows_WE, row_1E])
        lengths.append(len(wave))
    combine = getattr(encoder, "combine", weighted_mean)
    return combine(rows_WE, torch.tensor(lengths))[None]


class TooManySkipped(RuntimeError):
    """More clips got no embedding than allowed."""


def write_embeddings(
    manifest: Manifest,
    encoder: FrozenEncoder,
    out: Path,
    *,
    manifest_out: Path | None = None,
    max_failed_share: float = 1.0,
    overwrite: bool = False,
    batch_size: int = 16,
    jobs: int | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> tuple[Manifest, list[Skipped]]:
    """Embeds `manifest` into `out` (.npy) and writes the manifest of the embedded clips beside it (OUT.jsonl).

    Clips without an embedding go, with their reason, to OUT.failures.jsonl (removed when there are none). `jobs` is as
    in `pick_jobs`; of several each reads its own clips, for one that embeds alone `num_workers` read. Returns the
    written manifest and what was left out. Which files are written, and which are never replaced, or with `overwrite`
    only: `cat.encoders.outputs.claim_outputs`.

    Stopped or killed, it leaves what it has done in ``OUT.npy.partial``; the same call goes on from there, and writes
    what it would have written undisturbed, bit for bit.

    Raises: `TooManySkipped`, having written the failures alone, when more than `max_failed_share` of the clips fail;
    `InUseError` while another process writes the same file.
    """
    if not 0 <= max_failed_share <= 1:
        raise ValueError(f"max_failed_share is {max_failed_share}; expected a share from 0 to 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    jobs = pick_jobs(jobs, encoder)
    outputs = claim_outputs(manifest, out, manifest_out, overwrite=overwrite)
    made_with = _made_with(encoder, batch_size)
    about = {"encoder": encoder.name, "identity": identity_of(encoder)}
    clips = {"count": len(manifest), "fingerprint": manifest.fingerprint}
    folder = partial_folder(out)
    with sole_user(folder, remedy="another embed writes the same file: wait for it, or give another -o"):
        partial = Partial(
            folder, {**about, "clips": clips, **made_with}, manifest, dim=encoder.dim, overwrite=overwrite
        )
        for note in partial.notes:
            say(note)
        if partial.done and progress:
            say(f"{partial.done} of {len(manifest)} clips are done already, in {folder}; going on")
        try:
            _embed_rest(manifest, encoder, partial, batch_size, jobs, num_workers, progress)
            with EmbeddingWriter(out, manifest, dim=encoder.dim, **about, made_with=made_with) as writer:
                skipped = _assemble(partial, writer)
                record_failures(outputs.failures, [(clip.path, clip.reason) for clip in skipped])
                _check_share(manifest, skipped, max_failed_share, outputs.failures)
            write_manifest(writer.manifest, outputs.manifest)
            sign(outputs)
        except BaseException:
            if not partial.has_rows:
                partial.remove()
            else:
                done = f"{partial.done} of {len(manifest)} clips are done, in {folder}"
                say(f"{done}; the same command goes on with them")
            raise
        partial.remove()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return writer.manifest, skipped


def _embed_rest(
    manifest: Manifest,
    encoder: FrozenEncoder,
    partial: Partial,
    batch_size: int,
    jobs: int,
    num_workers: int,
    progress: bool,
) -> None:
    readers = num_workers if jobs == 1 else 0
    produce = functools.partial(_embedded, manifest, encoder, batch_size=batch_size, num_workers=readers)
    total, before = len(manifest), partial.done
    bar = Progress(total, before, label=encoder.name, unit="clips", enabled=progress)
    waiting: list[Block] = []

    def keep() -> None:
        if waiting:
            partial.add(Block.joined(waiting))
            waiting.clear()

    try:
        with one_thread(device_of(encoder)):
            begun = last = time.monotonic()
            done = before
            for block in in_blocks(produce, partial.todo(), batch_size=batch_size, end=total, jobs=jobs):
                if waiting and block.begin != waiting[-1].end:
                    keep()
                waiting.append(block)
                done += block.end - block.begin
                now = time.monotonic()
                bar.advance(done, f"{(done - before) / max(now - begun, 1e-9):.3g} clips/s")
                if now - last >= SECONDS:
                    keep()
                    last = now
    finally:
        bar.close()
        keep()


def _assemble(partial: Partial, writer: EmbeddingWriter) -> list[Skipped]:
    skipped: list[Skipped] = []
    for block in partial.blocks():
        skipped += block.skipped
        if len(block.indices):
            writer.append(block.indices, block.rows)
    return skipped


def _check_share(manifest: Manifest, skipped: list[Skipped], most: float, failures: Path) -> None:
    if len(skipped) > most * len(manifest):
        raise TooManySkipped(
            f"{len(skipped)} of {len(manifest)} clips got no embedding, more than the allowed share of {most:g} "
            f"(--max-failed-share); nothing was written. Reasons: {failures}. The first: {skipped[0].path}: "
            f"{skipped[0].reason}"
        )


def _made_with(encoder: FrozenEncoder, batch_size: int) -> dict[str, Any]:
    """What the last bits of rows depend on beside the encoder and the clips."""
    versions = {"cat-kernels": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "batch_size": batch_size,
        "device": device_of(encoder).type,
        "seconds_at_once": at_once(),
        "versions": versions,
    }
