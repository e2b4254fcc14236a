"""What a run hears: clips with their audio, their spectrogram and the masks they are trained under.

Shapes: T frames, F mel bins, M masks, K visible patches.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from cat.data import Batch, load_manifest
from cat.data.dataset import EvalDataset, PretrainDataset
from cat.data.features import FeatureConfig
from cat.data.manifest import Manifest
from cat.report.runs import Run
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.recipe import PretrainConfig, read_run


def samples(run: Run, count: int) -> list[dict[str, Any]]:
    """The first clips of a run, cropped and masked as in its first update (fine-tuning: the first of its data), as the
    page shows them. Raises: what reading the data raises."""
    config: PretrainConfig | FinetuneConfig = (
        read_run(PretrainConfig, run.path)[0] if run.pretraining else read_run(FinetuneConfig, run.path)[0]
    )
    manifest = load_manifest(config.data.train)
    count = min(count, len(manifest))
    patch_size, masks = config.model.patch_size, 0
    dataset: PretrainDataset | EvalDataset
    if isinstance(config, PretrainConfig):
        data, masks = dataclasses.replace(config.data, batch_size=count), config.masks.num_masks
        dataset = PretrainDataset(
            manifest, data, config.features, config.masks, patch_size=patch_size, seed=config.run.seed, waveforms=True
        )
    else:
        dataset = EvalDataset(manifest, config.features, count, waveforms=True)
    return _shown(dataset[0], manifest, config.features, patch_size, masks)


def _shown(
    batch: Batch, manifest: Manifest, features: FeatureConfig, patch_size: int, num_masks: int
) -> list[dict[str, Any]]:
    # Asked for, and so there.
    waves, lengths = cast(Tensor, batch.waveform), cast(Tensor, batch.lengths)
    spec = cast(Tensor, batch.with_features(features).spec)
    found = []
    for row, index in enumerate(batch.clips.tolist()):
        spec_TF = spec[row, 0].numpy()
        visible = [] if batch.visible is None else batch.visible[row * num_masks : (row + 1) * num_masks].tolist()
        found.append(
            {
                "name": Path(manifest.path(index)).name,
                "labels": list(batch.labels[row]),
                "seconds": int(lengths[row]) / features.sample_rate,
                "shown_seconds": features.frames * features.frame_shift_ms / 1000,
                "frames": spec_TF.shape[0],
                "bins": spec_TF.shape[1],
                "patch": patch_size,
                "spectrogram": _bytes(spec_TF),
                "visible": visible,
                "audio": _flac(waves[row, : int(lengths[row])].numpy(), features.sample_rate),
            }
        )
    return found


def _bytes(spec_TF: np.ndarray) -> str:
    """Base64 of 0 (quiet) to 255, a byte a point."""
    low, high = np.percentile(spec_TF[np.isfinite(spec_TF)], [1, 99.8]) if np.isfinite(spec_TF).any() else (0.0, 1.0)
    scaled = (np.nan_to_num(spec_TF, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-9)
    return base64.b64encode((255 * scaled.clip(0, 1)).astype(np.uint8).tobytes()).decode()


def _flac(wave: np.ndarray, rate: int) -> str:
    """A data: URI, as 16-bit FLAC, which every browser plays."""
    import soundfile

    if wave.dtype != np.int16:
        wave = np.nan_to_num(wave).clip(-1, 1 - 2.0**-15).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()
