"""What probes read: of every clip its embedding, every layer's embedding, and tokens of layers.

Shapes: B clips of a batch, n clips of a manifest, N rows of patches of all of them, n samples, T frames, P patch,
H = T/P rows of patches in time, W patches in frequency, L = H*W, D embedding width, Y layers, E width of a pooled clip
(D, or 2 D for CLS and mean side by side).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cat.data.features import frames_in, log_mel
from cat.data.manifest import Manifest
from cat.encoders import CatEncoder, FrozenEncoder
from cat.encoders.embed import Skipped, embed_manifest
from cat.encoders.frozen import checked_lengths

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
        skipped += failed
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

    Padding is hidden from the network, as in `CatEncoder`. Raises ValueError for a layer that there is not.
    """

    def __init__(self, encoder: CatEncoder, wanted: Wanted) -> None:
        self.inner, self.wanted = encoder, wanted
        check_layers(wanted.layers, depth_of(encoder))
        self.name, self.sample_rate = encoder.name, encoder.sample_rate
        self.min_samples, self.max_samples = encoder.min_samples, encoder.max_samples
        self.dim = 1 + len(wanted.layers) * encoder.dim

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, 1 + Y E [+ (1 + H) Y D]): the count of a clip's rows, its pooled layers, CLS and rows of the layers."""
        inner, patch = self.inner, self.inner.encoder.config.patch_size
        lengths_B = checked_lengths(waveform, lengths)
        spec_B1TF = log_mel(waveform.to(inner.device), inner.features, lengths=lengths_B.to(inner.device))
        frames_B = frames_in(inner.features, lengths_B).clamp(1, spec_B1TF.shape[2])
        counts_B = (frames_B + patch - 1) // patch
        spec_B1TF = spec_B1TF[:, :, : int(counts_B.max()) * patch]
        every = inner.encoder.layers(spec_B1TF, rows=counts_B.tolist())
        tokens_BYSD = torch.stack([every[layer] for layer in self.wanted.layers], dim=1).float()
        cls_BYD, patches_BYLD = tokens_BYSD[:, :, 0], tokens_BYSD[:, :, 1:]
        rows_BYHD = patches_BYLD.unflatten(2, (int(counts_B.max()), -1)).mean(dim=3)
        own_BH = torch.arange(rows_BYHD.shape[2], device=inner.device) < counts_B[:, None].to(inner.device)
        mean_BYD = (rows_BYHD * own_BH[:, None, :, None]).sum(2) / own_BH.sum(1)[:, None, None]
        pooled = {"cls": [cls_BYD], "mean": [mean_BYD], "both": [cls_BYD, mean_BYD]}[inner.pooling]
        parts = [counts_B[:, None].to(mean_BYD), torch.cat(pooled, dim=-1).flatten(1)]
        if self.wanted.tokens:
            # As they will be kept: what float16 cannot hold is not finite, and its clip is left out with that reason.
            parts += [cls_BYD.half().flatten(1), rows_BYHD.transpose(1, 2).half().flatten(1)]
        return torch.cat([part.float() for part in parts], dim=1)

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
