"""CLAP's audio tower through `transformers`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cat.encoders.frozen import checked_lengths, mean_direction

DEFAULT_CLAP = "laion/clap-htsat-fused"


class ClapEncoder:
    """CLAP's audio tower and projection through `transformers`: (B, 512) of unit length at 48 kHz.

    `path` is a local directory (``save_pretrained`` of ClapModel or ClapAudioModelWithProjection, with its feature
    extractor) or a hub name. Weights are read from safetensors only. Unit length is what LAION's own
    ``get_audio_embedding_from_data`` returns.

    Raises ImportError without `transformers`, FileNotFoundError when there are no weights (offline, no safetensors).
    """

    combine = staticmethod(mean_direction)

    def __init__(self, path: str | Path = DEFAULT_CLAP, *, device: torch.device | str = "cpu") -> None:
        self.extractor, self.model = _load_clap(str(path))
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.name = f"clap:{path}"
        self.sample_rate: int = self.extractor.sampling_rate
        self.dim: int = self.model.config.projection_dim

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths).tolist()
        clips = [clip[:n].float().cpu().numpy() for clip, n in zip(waveform, lengths_B, strict=True)]
        inputs = [self._features(clip) for clip in clips]
        spectrograms = torch.from_numpy(np.concatenate([spec for spec, _ in inputs])).to(self.device, torch.float32)
        longer = torch.tensor([[longer] for _, longer in inputs], device=self.device)
        return nn.functional.normalize(
            self.model(input_features=spectrograms, is_longer=longer).audio_embeds.float(), dim=1
        )

    def _features(self, clip: np.ndarray) -> tuple[np.ndarray, bool]:
        """Clip by clip and with numpy's generator fixed: the extractor crops long clips at random, and marks a random
        clip of the batch as long when none is. Both would make an embedding depend on chance and on its batch."""
        with _fixed_numpy_seed(0):
            features: Any = self.extractor(clip, sampling_rate=self.sample_rate, return_tensors="np")
        return features["input_features"], len(clip) > self.extractor.nb_max_samples


def _load_clap(path: str) -> tuple[Any, Any]:
    """CLAP's feature extractor and audio tower; the text tower in the file is not built."""
    try:
        from transformers import AutoFeatureExtractor, ClapAudioModelWithProjection, logging
    except ImportError as error:
        raise ImportError("CLAP needs the package 'transformers': pip install 'cat-kernels[clap]'") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every tensor of the text tower as unexpected
    try:
        extractor = AutoFeatureExtractor.from_pretrained(path)
        load: Any = ClapAudioModelWithProjection.from_pretrained
        model, found = load(path, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"CLAP {path!r} could not be loaded. Give a local directory with config.json, preprocessor_config.json and "
            "model.safetensors (clap:/path/to/directory), or a hub name with network access. Weights in pickles are "
            f"refused: convert them once with model.save_pretrained(directory). transformers says: {_first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
    if wrong:  # transformers would go on with random weights in their place
        raise ValueError(
            f"CLAP {path!r} lacks {len(wrong)} tensors of the audio tower (first: {wrong[0]}); expected the files that "
            "ClapModel.save_pretrained or ClapAudioModelWithProjection.save_pretrained writes."
        )
    return extractor, model


@contextlib.contextmanager
def _fixed_numpy_seed(seed: int) -> Iterator[None]:
    """The generator is the global one because that is the one the extractor draws from."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
