"""What probes read: of every clip its embedding, every layer's embedding, and tokens of layers.

Shapes: B clips of a batch, n clips of a manifest, N rows of patches of all of them, n samples, T frames, P patch,
H = T/P rows of patches in time, W patches in frequency, L = H*W, D embedding width, Y layers, E width of a pooled clip
(D, or 2 D for CLS and mean side by side).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cat.data.audio import AudioError
from cat.data.manifest import Manifest
from cat.encoders import CatEncoder, FrozenEncoder
from cat.encoders.embed import Skipped, embed_manifest
from cat.encoders.frozen import WINDOW_SECONDS, checked_lengths

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tokens:
    """CLS and the rows of patches of every clip, in float16; clip i owns ``rows[ends[i-1]:ends[i]]``.

    A row of patches is the mean over frequency of the patches of one time (P frames, 160 ms): W times less to keep than
    the patches themselves. Memory-mapped: `batch` reads what it needs.
    """

    rows_NYD: np.ndarray
    cls_BYD: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def layers(self) -> int:
        return self.cls_BYD.shape[1]

    @property
    def width(self) -> int:
        return self.cls_BYD.shape[2]

    def batch(self, clips: np.ndarray, layer: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Of some clips: rows (B, H, Y, D) float32, zero behind a clip's own; which are its own (B, H) bool; and CLS
        (B, Y, D) float32. ``layer``: the one at that place among the layers, then without the axis Y."""
        ends = self.ends[clips]
        starts = np.where(clips > 0, self.ends[np.maximum(clips, 1) - 1], 0)
        own_BH = torch.from_numpy(np.arange((ends - starts).max()) < (ends - starts)[:, None])
        which = slice(None) if layer is None else layer
        rows = np.zeros((*own_BH.shape, *self.rows_NYD[:1, which].shape[1:]), np.float32)
        for row, start, end in zip(rows, starts.tolist(), ends.tolist(), strict=True):
            row[: end - start] = self.rows_NYD[start:end, which]
        return torch.from_numpy(rows), own_BH, torch.from_numpy(self.cls_BYD[clips, which].astype(np.float32))


@dataclass
class Features:
    """Of the clips at ``indices`` of a manifest, in their order; ``skipped`` are the others."""

    indices: np.ndarray
    clip: np.ndarray  # (n, E) float32
    layers: tuple[int, ...] = ()
    pooled: np.ndarray | None = None  # (n, Y, E) float32: every layer's `clip`
    tokens: Tokens | None = None
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """Which features: of every clip its embedding alone, or these ``layers`` (0: what the first block sees), pooled as
    the encoder pools, with their ``tokens`` or without. The last layer must be among them: it is the embedding."""

    layers: tuple[int, ...] = ()
    tokens: bool = False


def compute(
    manifest: Manifest, encoder: FrozenEncoder, wanted: Wanted, skipped: list[Skipped], **options: object
) -> Iterator[Arrays]:
    """The features, some clips at a time, to be put one after another along the first axis: "indices" and "clip", or
    "indices", "pooled" and, with tokens, "rows", "cls" and "counts". Clips without are added to ``skipped``.
    ``options`` are those of `embed_manifest`. Memory does not grow with the number of clips."""
    layered = LayerEncoder(encoder, wanted) if wanted.layers and isinstance(encoder, CatEncoder) else None
    for indices, found, failed in embed_manifest(manifest, layered or encoder, **options):  # type: ignore[arg-type]
        skipped += (dataclasses.replace(clip, path=str(manifest.path(clip.index))) for clip in failed)
        if len(indices):
            yield {"indices": indices, **(layered.parts(found) if layered else {"clip": found.numpy()})}


def features_of(arrays: Arrays, wanted: Wanted, skipped: list[Skipped]) -> Features:
    if not wanted.layers:
        return Features(arrays["indices"], arrays["clip"], skipped=skipped)
    tokens = Tokens(arrays["rows"], arrays["cls"], np.cumsum(arrays["counts"])) if wanted.tokens else None
    pooled = arrays["pooled"]
    return Features(arrays["indices"], pooled[:, -1], wanted.layers, pooled, tokens, skipped)


class LayerEncoder:
    """Layers of a CAT encoder as a frozen encoder: what `parts` takes apart again in one row a clip.

    Raises ValueError for a layer that there is not.
    """

    def __init__(self, encoder: CatEncoder, wanted: Wanted) -> None:
        self.inner, self.wanted = encoder, wanted
        check_layers(wanted.layers, depth_of(encoder))
        self.name, self.sample_rate, self.min_samples = encoder.name, encoder.sample_rate, encoder.min_samples
        self.dim = 1 + len(wanted.layers) * encoder.dim

    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, 1 + Y E [+ (1 + H) Y D]): the count of a clip's rows, its pooled layers, CLS and rows of the layers."""
        ends = checked_lengths(waveform, lengths).tolist()
        clips = [clip[:end] for clip, end in zip(waveform, ends, strict=True)]
        out = self.inner.model(
            clips, self.sample_rate, layers=self.wanted.layers, patches=False, batch_size=max(16, len(clips))
        )
        every = [out.layers[layer] for layer in self.wanted.layers]
        counts_B1 = torch.tensor(out.rows, dtype=torch.float32, device=out.clip.device)[:, None]
        parts = [counts_B1, *(layer.clip for layer in every)]
        if self.wanted.tokens:
            # As they will be kept: what float16 cannot hold is not finite, and its clip is left out with that reason.
            parts += [layer.cls.half() for layer in every]
            parts.append(torch.stack([layer.frames for layer in every], dim=2).half().flatten(1))
        return torch.cat([part.float() for part in parts], dim=1)

    def of_stream(self, chunks: Iterable[np.ndarray]) -> Tensor:
        """The same of a clip of more than `WINDOW_SECONDS`, (1 + Y E,); not for tokens, whose number has no bound."""
        if self.wanted.tokens:
            raise AudioError("", f"longer than {WINDOW_SECONDS} s; too many tokens for a probe to read")
        total, rows = torch.zeros(self.dim - 1, dtype=torch.float64), 0
        for out in self.inner.model.stream(chunks, self.sample_rate, layers=self.wanted.layers):
            pooled = torch.cat([out.layers[layer].clip[0] for layer in self.wanted.layers])
            total, rows = total + pooled.double().cpu() * out.rows[0], rows + out.rows[0]
        return torch.cat([torch.tensor([float(rows)]), (total / rows).float()])

    def parts(self, flat: Tensor) -> Arrays:
        Y, E, D = len(self.wanted.layers), self.inner.dim, self.inner.encoder.config.embed_dim
        counts, pooled, cls, rows = np.split(flat.numpy(), np.cumsum([1, Y * E, Y * D]), axis=1)
        arrays = {"pooled": pooled.reshape(-1, Y, E)}
        if self.wanted.tokens:
            counts_B = counts[:, 0].astype(np.int64)
            rows_BHYD = rows.reshape(len(rows), -1, Y, D).astype(np.float16)
            own_BH = np.arange(rows_BHYD.shape[1]) < counts_B[:, None]
            arrays |= {"rows": rows_BHYD[own_BH], "cls": cls.reshape(-1, Y, D).astype(np.float16), "counts": counts_B}
        return arrays


def depth_of(encoder: CatEncoder) -> int:
    return encoder.encoder.config.depth


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raises ValueError for a layer that there is not, or twice."""
    for layer in layers:
        if not 0 <= layer <= depth:
            raise ValueError(
                f"layer {layer} is asked for; expected 0 (what the encoder's first block sees) to {depth} (its last)"
            )
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers {', '.join(map(str, layers))}: each one once, expected no layer twice")
