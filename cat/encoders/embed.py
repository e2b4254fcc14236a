"""The embeddings of a manifest's clips, from CLAP, a control or a CAT checkpoint (`cat-audio embed`).

Writes one memory-mapped ``.npy`` for the whole data set and a manifest whose clips name their row in it, ready for
pre-training with representation regularisation. A clip that cannot be read is recorded and left out of the written
manifest, so that clip and embedding never part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError
from cat.data.embeddings import EmbeddingWriter
from cat.data.manifest import Manifest, write_manifest
from cat.encoders.frozen import FrozenEncoder, weighted_mean
from cat.encoders.outputs import claim_outputs, record_failures, sign
from cat.encoders.reading import Skipped, batches, read_long


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
    loaded = batches(
        manifest,
        range(len(manifest)),
        label=encoder.name,
        sample_rate=encoder.sample_rate,
        min_samples=getattr(encoder, "min_samples", 1),
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    for batch in loaded:
        indices, waves, skipped = batch.indices, batch.waves, batch.skipped
        if not indices:
            yield np.empty(0, dtype=np.int64), torch.empty(0, encoder.dim), skipped
            continue
        try:
            rows_BE = (
                encode_clips(encoder, manifest, indices, waves).cpu()
                if waves
                else encode_long(encoder, manifest, indices[0])
            )
        except AudioError as error:  # beyond the first window
            skipped = [*skipped, Skipped(indices[0], error.path, error.reason)]
            yield np.empty(0, dtype=np.int64), torch.empty(0, encoder.dim), skipped
            continue
        finite_B = rows_BE.isfinite().all(dim=1)
        skipped = skipped + [
            Skipped(index, str(manifest.path(index)), f"{encoder.name} gave an embedding that is not finite")
            for index, finite in zip(indices, finite_B.tolist(), strict=True)
            if not finite
        ]
        yield np.asarray(indices, dtype=np.int64)[finite_B.numpy()], rows_BE[finite_B], skipped


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


class EncoderError(RuntimeError):
    """The encoder failed on a batch of clips."""


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
    **options: object,
) -> tuple[Manifest, list[Skipped]]:
    """Embeds `manifest` into `out` (.npy) and writes the manifest of the embedded clips beside it (OUT.jsonl).

    Clips without an embedding go, with their reason, to OUT.failures.jsonl (removed when there are none). `options` are
    those of `embed_manifest`. Returns the written manifest and what was left out. Which files are written, and which
    are never replaced, or with `overwrite` only: `cat.encoders.outputs.claim_outputs`.

    Raises TooManySkipped, having written nothing but the failures, when more than `max_failed_share` of the clips fail.
    """
    if not 0 <= max_failed_share <= 1:
        raise ValueError(f"max_failed_share is {max_failed_share}; expected a share from 0 to 1")
    outputs = claim_outputs(manifest, out, manifest_out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    skipped: list[Skipped] = []
    with EmbeddingWriter(out, manifest, dim=encoder.dim, encoder=encoder.name) as writer:
        for indices, rows, failed in embed_manifest(manifest, encoder, **options):  # type: ignore[arg-type]
            skipped += failed
            if len(indices):
                writer.append(indices, rows.numpy())
        record_failures(outputs.failures, [(clip.path, clip.reason) for clip in skipped])
        if len(skipped) > max_failed_share * len(manifest):
            raise TooManySkipped(
                f"{len(skipped)} of {len(manifest)} clips got no embedding, more than the allowed share of "
                f"{max_failed_share:g}; nothing was written. Reasons: {outputs.failures}. The first: "
                f"{skipped[0].path}: {skipped[0].reason}"
            )
    write_manifest(writer.manifest, outputs.manifest)
    sign(outputs)
    return writer.manifest, skipped
