"""CLAP's audio tower: the network is that of `transformers`, the features are made here.

Shapes: B clips, n samples, C spectrograms a clip, T frames, F mel bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cat.encoders.frozen import checked_lengths, mean_direction
from cat.encoders.laion import load_laion
from cat.encoders.pretrained import load_pretrained
from cat.encoders.untrained import untrained_twin

DEFAULT_CLAP = "laion/clap-htsat-fused"


class ClapEncoder:
    """CLAP's audio tower and projection: (B, 512) of unit length at 48 kHz.

    ``path`` is a local directory (``save_pretrained`` of ClapModel or ClapAudioModelWithProjection, with its feature
    extractor), a hub name (laion/clap-htsat-unfused, laion/clap-htsat-fused, laion/larger_clap_general, ...), or a file
    of LAION's own (``630k-audioset-best.pt``, see `load_laion`). Unit length is what LAION's
    ``get_audio_embedding_from_data`` returns.

    ================ ==================================================================================================
    length           10 s; shorter clips are repeated whole as often as they fit and filled up with zeros. Of longer
                     ones an unfused network hears 10 s, a fused one the whole, squeezed, and 10 s of each third. Where
                     these begin is drawn by a generator that starts anew for each clip: the length alone decides
    input            64 mel bins of 50 to 14,000 Hz, 21.3 ms windows every 10 ms, in dB (`ClapFeatures`)
    pooling          mean over HTS-AT's last grid, two linear layers
    width            512
    licence          code CC0 (LAION) and Apache 2.0 (`transformers`); of the weights, see where you got them
    source           Wu et al., Large-scale contrastive language-audio pretraining, arXiv:2211.06687
    ================ ==================================================================================================

    Raises ImportError without `transformers`, FileNotFoundError when there are no weights (offline, no safetensors),
    ValueError when they do not fit.
    """

    combine = staticmethod(mean_direction)

    def __init__(self, path: str | Path = DEFAULT_CLAP, *, device: torch.device | str = "cpu") -> None:
        of_laion = Path(path).is_file()
        if of_laion:
            model, extractor = load_laion(Path(path))
        else:
            model, extractor = load_pretrained(
                "CLAP", str(path), "ClapAudioModelWithProjection", "ClapFeatureExtractor"
            )
        _check_agree(str(path), model.config, extractor)
        self.features = ClapFeatures.of(extractor, quantised=of_laion)
        self.model = model.to(device)
        self.device = torch.device(device)
        self.name = f"clap:{path}"
        self.sample_rate: int = self.features.sample_rate
        self.dim: int = model.config.projection_dim

    def untrained_twin(self, seed: int = 0) -> ClapEncoder:
        """The same network, initialised anew by `transformers`."""
        return untrained_twin(self, seed, lambda: self._initialised())

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths).tolist()
        inputs = [self.features(clip[:n].to(self.device)) for clip, n in zip(waveform, lengths_B, strict=True)]
        spec_BCTF = torch.stack([spec for spec, _ in inputs])
        longer_B1 = torch.tensor([[longer] for _, longer in inputs], device=self.device)
        embedding_BE = self.model(input_features=spec_BCTF, is_longer=longer_B1).audio_embeds.float()
        return nn.functional.normalize(embedding_BE, dim=1)

    def _initialised(self) -> Any:
        fresh = type(self.model)(self.model.config)
        # The first batch norm is of the input: what spectrograms are like is no weight.
        ours, theirs = (model.audio_model.audio_encoder.batch_norm for model in (fresh, self.model))
        ours.running_mean.copy_(theirs.running_mean)
        ours.running_var.copy_(theirs.running_var)
        return fresh


@dataclass(frozen=True)
class ClapFeatures:
    """The log-mel spectrograms that CLAP's network sees: those of `transformers`' ClapFeatureExtractor.

    Made by it they would depend on chance and on the batch, as it draws from numpy's global generator and marks some
    short clip of every batch as long; and they took 225 ms a clip in place of 87 (10 s, one core).
    """

    filters: Tensor  # (frequencies, F)
    fused: bool
    quantised: bool  # samples go through int16 first, as in LAION's package but not in transformers
    sample_rate: int
    samples: int  # of the network's input
    window: int
    hop: int
    padding: str  # "repeatpad": whole repetitions, then zeros; "repeat": the last one cut; "pad": zeros

    @classmethod
    def of(cls, extractor: Any, *, quantised: bool) -> ClapFeatures:
        fused = extractor.truncation == "fusion"
        # A fused network was trained on torchaudio's filters (HTK), others on librosa's (Slaney).
        filters = extractor.mel_filters if fused else extractor.mel_filters_slaney
        return cls(
            torch.from_numpy(filters).float(),
            fused,
            quantised,
            extractor.sampling_rate,
            extractor.nb_max_samples,
            extractor.fft_window_size,
            extractor.hop_length,
            extractor.padding,
        )

    def __call__(self, clip: Tensor) -> tuple[Tensor, bool]:
        """(n,) -> (C, T, F) float32, and whether the clip was longer than what the network takes."""
        wave = clip.float()
        if self.quantised:
            wave = (wave.clamp(-1, 1) * 32767).to(torch.int16).float() / 32767
        frames = 1 + self.samples // self.hop
        draw = np.random.RandomState(0)  # the draws of transformers and LAION after a seed of 0
        if len(wave) <= self.samples:
            spec_TF, longer = self._log_mel(self._filled(wave)), False
        elif not self.fused:
            start = draw.randint(0, len(wave) - self.samples + 1)
            spec_TF, longer = self._log_mel(wave[start : start + self.samples]), True
        else:
            spec_TF = self._log_mel(wave)
            longer = len(spec_TF) > frames
        if not self.fused:
            return spec_TF[None], longer
        if not longer:
            return spec_TF.expand(4, -1, -1), longer
        thirds = np.array_split(np.arange(len(spec_TF) - frames + 1), 3)
        starts = [draw.choice(third) if len(third) else 0 for third in thirds]
        whole_TF = nn.functional.interpolate(
            spec_TF[None, None], size=[frames, spec_TF.shape[1]], mode="bilinear", align_corners=False
        )[0, 0]
        return torch.stack([whole_TF, *(spec_TF[start : start + frames] for start in starts)]), longer

    def _filled(self, wave: Tensor) -> Tensor:
        if self.padding != "pad":
            wave = wave.repeat(self.samples // len(wave) + (self.padding == "repeat"))[: self.samples]
        return nn.functional.pad(wave, (0, self.samples - len(wave)))

    def _log_mel(self, wave: Tensor) -> Tensor:
        """(T, F) in dB."""
        window = torch.hann_window(self.window, device=wave.device)
        spectrum = torch.stft(wave, self.window, self.hop, window=window, pad_mode="reflect", return_complex=True)
        power_TF = spectrum.abs().square().T @ self.filters.to(wave.device)
        return 10 * power_TF.clamp(min=1e-10).log10()


def _check_agree(path: str, config: Any, extractor: Any) -> None:
    """A feature extractor that is not the network's gives wrong numbers, or an error that tells nothing."""
    fused = extractor.truncation == "fusion"
    if fused != config.enable_fusion or extractor.feature_size != config.num_mel_bins:
        raise ValueError(
            f"CLAP {path!r}: preprocessor_config.json makes {extractor.feature_size} mel bins "
            f"{'with' if fused else 'without'} fusion (truncation {extractor.truncation!r}), and config.json describes "
            f"a network of {config.num_mel_bins} {'with' if config.enable_fusion else 'without'} it; take both files "
            "from where the weights are from"
        )
