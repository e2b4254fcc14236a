"""The embeddings of a manifest's clips, from CLAP, a control or a CAT checkpoint (`cat-audio embed`).

Writes one memory-mapped ``.npy`` for the whole data set and a manifest whose clips name their row in it, ready for
pre-training with representation regularisation. A clip that cannot be read is recorded and left out of the written
manifest, so that clip and embedding never part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cat.data.audio import AudioError, read_audio
from cat.data.embeddings import EmbeddingWriter
from cat.data.manifest import Manifest, write_manifest
from cat.encoders.frozen import FrozenEncoder
from cat.files import replacing
from cat.progress import track


@dataclass(frozen=True)
class Skipped:
    """A clip that got no embedding, and why."""

    index: int  # place in the manifest
    path: str
    reason: str


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
    batch; k may be 0. A clip is skipped when it cannot be read or its embedding is not finite."""
    batches = _waveforms(manifest, encoder, batch_size, num_workers)
    total = -(-len(manifest) // batch_size)
    batches = track(batches, total, label=encoder.name, unit="batches", enabled=progress)
    for indices, waveform_Bn, lengths_B, skipped in batches:
        if not indices:
            yield np.empty(0, dtype=np.int64), torch.empty(0, encoder.dim), skipped
            continue
        rows_BE = encoder(waveform_Bn, lengths_B).to("cpu", torch.float32)
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


class _Waveforms(Dataset[tuple[int, np.ndarray | Skipped]]):
    def __init__(self, manifest: Manifest, encoder: FrozenEncoder) -> None:
        self.manifest, self.sample_rate = manifest, encoder.sample_rate
        self.min_samples: int = getattr(encoder, "min_samples", 1)
        self.max_samples: int | None = getattr(encoder, "max_samples", None)

    def __len__(self) -> int:
        return len(self.manifest.clips)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | Skipped]:
        try:
            samples = read_audio(
                self.manifest.path(index),
                self.sample_rate,
                max_samples=self.max_samples,
                start=0.5,
                min_samples=self.min_samples,
            )
            return index, samples
        except AudioError as error:
            return index, Skipped(index, error.path, error.reason)


def _collate(
    items: list[tuple[int, np.ndarray | Skipped]],
) -> tuple[list[int], Tensor, Tensor, list[Skipped]]:
    read = [(index, samples) for index, samples in items if not isinstance(samples, Skipped)]
    skipped = [samples for _, samples in items if isinstance(samples, Skipped)]
    lengths = [len(samples) for _, samples in read]
    waveform_Bn = torch.zeros(len(read), max(lengths, default=0))
    for row, (_, samples) in zip(waveform_Bn, read, strict=True):
        row[: len(samples)] = torch.from_numpy(samples)
    return [index for index, _ in read], waveform_Bn, torch.tensor(lengths, dtype=torch.int64), skipped


def _waveforms(
    manifest: Manifest, encoder: FrozenEncoder, batch_size: int, num_workers: int
) -> Iterable[tuple[list[int], Tensor, Tensor, list[Skipped]]]:
    return DataLoader(
        _Waveforms(manifest, encoder), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate
    )


class TooManySkipped(RuntimeError):
    """More clips got no embedding than allowed."""


def write_embeddings(
    manifest: Manifest,
    encoder: FrozenEncoder,
    out: Path,
    *,
    manifest_out: Path | None = None,
    max_failed_share: float = 1.0,
    **options: object,
) -> tuple[Manifest, list[Skipped]]:
    """Embeds `manifest` into `out` (.npy) and writes the manifest of the embedded clips beside it (OUT.jsonl).

    Clips without an embedding go, with their reason, to OUT.failures.jsonl (removed when there are none). `options` are
    those of `embed_manifest`. Returns the written manifest and what was left out.

    Raises TooManySkipped, having written nothing but the failures, when more than `max_failed_share` of the clips fail.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    skipped: list[Skipped] = []
    with EmbeddingWriter(out, manifest, dim=encoder.dim, encoder=encoder.name) as writer:
        for indices, rows, failed in embed_manifest(manifest, encoder, **options):  # type: ignore[arg-type]
            skipped += failed
            if len(indices):
                writer.append(indices, rows.numpy())
        _record(failures_path(out), skipped)
        if len(skipped) > max_failed_share * len(manifest):
            raise TooManySkipped(
                f"{len(skipped)} of {len(manifest)} clips got no embedding, more than the allowed share of "
                f"{max_failed_share:g}; nothing was written. Reasons: {failures_path(out)}. The first: "
                f"{skipped[0].path}: {skipped[0].reason}"
            )
    write_manifest(writer.manifest, manifest_out or out.with_suffix(".jsonl"))
    return writer.manifest, skipped


def failures_path(out: Path) -> Path:
    return out.with_suffix(".failures.jsonl")


def _record(path: Path, skipped: list[Skipped]) -> None:
    if not skipped:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        lines = [json.dumps({"path": s.path, "reason": s.reason}) for s in skipped]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
