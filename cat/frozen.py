"""Frozen audio encoders: waveform in, one embedding a clip out.

Two commands need them: ``cat-audio embed`` computes the external embeddings that representation regularisation pulls
the student's CLS token towards, and ``cat-audio probe`` measures features.
`build_encoder` is the one way to get them:

===================  ==================================================================================================
``clap``             CLAP's audio tower with its projection, from the hub (laion/clap-htsat-fused)
``clap:NAME``        the same from a local directory or another hub name
``random``           control: a fixed random projection of log-mel statistics (``random:SEED`` for another one)
``logmel``           those statistics themselves: mean and deviation over time of every mel bin
anything else        a CAT run directory, checkpoint directory or ``.safetensors`` file
===================  ==================================================================================================

Shapes: B clips, n samples, T frames, F mel bins, P patch, H = T/P, W = F/P, L = H*W patches, D embedding width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from cat.data.features import FeatureConfig, log_mel
from cat.model import Encoder

DEFAULT_CLAP = "laion/clap-htsat-fused"
POOLINGS = ("mean", "cls", "both")


@runtime_checkable
class FrozenEncoder(Protocol):
    """What `embed` and `probe` ask of an encoder. Its parameters never change and it draws no random numbers: a clip's
    embedding depends on the clip alone, not on the clips beside it in the batch.

    An encoder may also have ``min_samples`` and ``max_samples`` (at its sample rate): shorter clips are then refused
    when they are read, and of longer ones only the middle is read.
    """

    name: str
    sample_rate: int
    dim: int

    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """waveform (B, n) float32 at `sample_rate`, clip b in its first ``lengths[b]`` samples -> (B, dim) float32."""
        ...


def build_encoder(
    spec: str, *, pooling: str = "mean", weights: str = "student", device: torch.device | str = "cpu"
) -> FrozenEncoder:
    """The encoder that `spec` names (see the table above).

    `pooling` ("mean" of the patch tokens, "cls", or "both" side by side) and `weights` ("student" or "teacher")
    apply to CAT checkpoints only.
    """
    kind, _, rest = spec.partition(":")
    if kind == "clap":
        return ClapEncoder(rest or DEFAULT_CLAP, device=device)
    if kind == "random":
        if rest and not rest.isdecimal():
            raise ValueError(f"encoder {spec!r}: the seed after 'random:' must be a whole number, got {rest!r}.")
        return RandomProjection(seed=int(rest or 0), device=device)
    if spec == "logmel":
        return LogMelStatistics(device=device)
    if not Path(spec).exists():
        raise FileNotFoundError(
            f"encoder {spec!r} is neither 'clap', 'clap:PATH_OR_HUB_NAME', 'random', 'random:SEED', 'logmel' "
            "nor an existing run directory, checkpoint directory or .safetensors file."
        )
    return CatEncoder.from_checkpoint(spec, weights=weights, pooling=pooling, device=device)


class CatEncoder:
    """A CAT encoder without a mask, its tokens pooled to one vector a clip.

    Clips are padded or cropped to the `frames` the features ask for, as in pre-training. The mean runs over the patches
    that hold at least one real frame: padding would otherwise dominate a short clip. dim is D, or 2 D for "both".
    """

    def __init__(
        self,
        encoder: Encoder,
        features: FeatureConfig,
        *,
        name: str = "cat",
        pooling: str = "mean",
        device: torch.device | str = "cpu",
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.features, self.name, self.pooling, self.device = features, name, pooling, torch.device(device)
        self.sample_rate = features.sample_rate
        self.dim = encoder.config.embed_dim * (2 if pooling == "both" else 1)
        self.min_samples, self.max_samples = features.frame_length, features.samples

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        weights: str = "student",
        pooling: str = "mean",
        device: torch.device | str = "cpu",
    ) -> CatEncoder:
        """The encoder of a run (its newest checkpoint), a checkpoint directory or a .safetensors file."""
        from cat.checkpoint import load_encoder

        encoder, info = load_encoder(path, weights=weights)
        return cls(encoder, info.features, name=f"cat:{path}", pooling=pooling, device=device)

    def untrained_twin(self, seed: int = 0) -> CatEncoder:
        """The same architecture, features and pooling, freshly initialised from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = Encoder(self.encoder.config)
        return CatEncoder(encoder, self.features, name=f"untrained:{seed}", pooling=self.pooling, device=self.device)

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = _checked_lengths(waveform, lengths)
        spec_B1TF = log_mel(waveform.to(self.device), self.features, lengths=lengths_B.to(self.device))
        tokens_BSD = self.encoder(spec_B1TF).float()
        cls_BD, patches_BLD = tokens_BSD[:, 0], tokens_BSD[:, 1:]
        if self.pooling == "cls":
            return cls_BD
        mean_BD = self._mean_of_real_patches(patches_BLD, lengths_B, spec_B1TF.shape[-2])
        return mean_BD if self.pooling == "mean" else torch.cat([cls_BD, mean_BD], dim=1)

    def _mean_of_real_patches(self, patches_BLD: Tensor, lengths_B: Tensor, frames: int) -> Tensor:
        clips, _, width = patches_BLD.shape
        patch = self.encoder.config.patch_size
        rows_BHD = patches_BLD.reshape(clips, frames // patch, -1, width).mean(dim=2)
        real_B = _frames_in(self.features, lengths_B).clamp(1, frames).to(self.device)
        used_BH = torch.arange(rows_BHD.shape[1], device=self.device) * patch < real_B[:, None]
        return (rows_BHD * used_BH[..., None]).sum(1) / used_BH.sum(1, keepdim=True)


class LogMelStatistics:
    """Mean and standard deviation over time of every log-mel bin: (B, 2 F). No learning at all: the honest floor.

    Runs over the whole clip, or the middle `max_samples` of it, real frames only. `features`: AudioSet's by default.
    """

    def __init__(
        self,
        features: FeatureConfig | None = None,
        *,
        max_samples: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.features, self.device = features or FeatureConfig(), torch.device(device)
        self.name, self.sample_rate, self.dim = "logmel", self.features.sample_rate, 2 * self.features.mel_bins
        self.min_samples, self.max_samples = self.features.frame_length, max_samples

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = _checked_lengths(waveform, lengths).to(self.device)
        frames_B = _frames_in(self.features, lengths_B).clamp(min=1)
        whole = dataclasses.replace(self.features, frames=int(frames_B.max()))
        spec_BTF = log_mel(waveform.to(self.device), whole, lengths=lengths_B).squeeze(1).float()
        real_BT1 = (torch.arange(spec_BTF.shape[1], device=self.device) < frames_B[:, None])[..., None]
        count_B1 = frames_B[:, None]
        mean_BF = (spec_BTF * real_BT1).sum(1) / count_B1
        variance_BF = ((spec_BTF - mean_BF[:, None]).square() * real_BT1).sum(1) / count_B1
        return torch.cat([mean_BF, variance_BF.sqrt()], dim=1)


class RandomProjection:
    """Control for representation regularisation: R s / |R s|, with R (dim, 2 F) drawn once from N(0, 1) with `seed`
    and s = `LogMelStatistics`, its means and its deviations each less their average over the bins.

    It has CLAP's width (512) and CLAP's scale (unit length), and knows about the clip only the shape of its average
    spectrum, not the level: a gain over it is what the external encoder's learning is worth. (With the averages left
    in, the mean embedding has 58 % of the energy on the sounds of ``cat-audio synth``; without them 32 %.)
    """

    def __init__(self, dim: int = 512, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}.")
        self.statistics = LogMelStatistics(device=device)
        self.name, self.sample_rate, self.dim = f"random:{seed}", self.statistics.sample_rate, dim
        self.min_samples = self.statistics.min_samples
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same matrix on every device
        self.matrix = torch.randn(dim, self.statistics.dim, generator=generator).to(device)

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        halves_B2F = self.statistics(waveform, lengths).unflatten(1, (2, -1))
        shape_BS = (halves_B2F - halves_B2F.mean(dim=2, keepdim=True)).flatten(1)
        return nn.functional.normalize(shape_BS @ self.matrix.T, dim=1)


class ClapEncoder:
    """CLAP's audio tower and projection through `transformers`: (B, 512) of unit length at 48 kHz.

    `path` is a local directory (``save_pretrained`` of ClapModel or ClapAudioModelWithProjection, with its feature
    extractor) or a hub name. Weights are read from safetensors only. Unit length is what LAION's own
    ``get_audio_embedding_from_data`` returns.

    Raises ImportError without `transformers`, FileNotFoundError when there are no weights (offline, no safetensors).
    """

    def __init__(self, path: str | Path = DEFAULT_CLAP, *, device: torch.device | str = "cpu") -> None:
        self.extractor, self.model = _load_clap(str(path))
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.name = f"clap:{path}"
        self.sample_rate: int = self.extractor.sampling_rate
        self.dim: int = self.model.config.projection_dim

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = _checked_lengths(waveform, lengths).tolist()
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


def _checked_lengths(waveform: Tensor, lengths: Tensor | None) -> Tensor:
    """Samples of each clip, (B,) int64 on the CPU."""
    if waveform.ndim != 2:
        raise ValueError(f"waveform must be (clips, samples), got shape {tuple(waveform.shape)}.")
    if lengths is None:
        return torch.full((waveform.shape[0],), waveform.shape[1], dtype=torch.int64)
    lengths_B = lengths.to("cpu", torch.int64)
    if lengths_B.shape != (waveform.shape[0],) or (lengths_B > waveform.shape[1]).any() or (lengths_B < 1).any():
        raise ValueError(
            f"lengths must hold one sample count in 1..{waveform.shape[1]} for each of the {waveform.shape[0]} clips, "
            f"got {lengths_B.tolist()}."
        )
    return lengths_B


def _frames_in(features: FeatureConfig, samples: Tensor) -> Tensor:
    """Frames that fit wholly into so many samples (Kaldi's snip_edges)."""
    return 1 + (samples - features.frame_length).div(features.frame_shift, rounding_mode="floor")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
