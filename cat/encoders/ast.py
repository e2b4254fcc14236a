"""AST, the Audio Spectrogram Transformer: the network is that of `transformers`, the features are made here.

Shapes: B clips, n samples, W windows a clip, T frames, F mel bins, E embedding width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cat.encoders.frozen import checked_lengths
from cat.encoders.pretrained import load_pretrained
from cat.encoders.untrained import untrained_twin
from cat_kernels.mel import fbank

_MOST_WINDOWS = 16  # that go through the network at once
_FRAME, _SHIFT = 400, 160  # samples, at 16 kHz


class AstEncoder:
    """AST's embedding: (B, 768) at 16 kHz.

    ``path`` is a local directory (``save_pretrained`` of ASTModel or ASTForAudioClassification, with its feature
    extractor) or a hub name, such as MIT/ast-finetuned-audioset-10-10-0.4593.

    ================ ==================================================================================================
    length           windows of as many frames as it was trained on (1024, 10.24 s), one behind the other; of a clip the
                     mean over its windows, each with the weight of its frames. The last one is filled up with zeros
                     before the normalisation, as shorter clips were in training
    input            Kaldi's log-mel spectrogram: 128 bins, 25 ms Hann windows every 10 ms, the waveform's mean not
                     subtracted; (x - mean) / (2 std), AudioSet's -4.2677393 and 4.5689974 (preprocessor_config.json)
    pooling          mean of the CLS and the distillation token, after the last norm
    width            768
    licence          BSD 3-Clause (authors' code and weights), Apache 2.0 (`transformers`)
    source           Gong et al., AST: Audio Spectrogram Transformer, arXiv:2104.01778
    ================ ==================================================================================================

    Raises ImportError without `transformers`, FileNotFoundError when there are no weights (offline, no safetensors),
    ValueError when they do not fit.
    """

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        model, extractor = load_pretrained("AST", str(path), "ASTModel", "ASTFeatureExtractor")
        config = model.config
        theirs = (extractor.num_mel_bins, extractor.max_length, extractor.sampling_rate)
        if theirs != (config.num_mel_bins, config.max_length, 16000):
            raise ValueError(
                f"AST {str(path)!r}: preprocessor_config.json makes {theirs[0]} mel bins by {theirs[1]} frames at "
                f"{theirs[2]} Hz, and config.json describes a network of {config.num_mel_bins} by {config.max_length} "
                "at 16000 Hz; take both files from where the weights are from"
            )
        self.model = model.to(device)
        self.device = torch.device(device)
        self.name = f"ast:{path}"
        self.sample_rate, self.min_samples, self.dim = 16000, _FRAME, config.hidden_size
        self.frames: int = config.max_length
        self.mean: float = extractor.mean if extractor.do_normalize else 0.0
        self.std: float = extractor.std if extractor.do_normalize else 0.5

    def untrained_twin(self, seed: int = 0) -> AstEncoder:
        """The same network, initialised anew by `transformers`."""
        return untrained_twin(self, seed, lambda: type(self.model)(self.model.config))

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths).to(self.device)
        frames_B = 1 + (lengths_B - _FRAME) // _SHIFT
        windows = -(-int(frames_B.max()) // self.frames)
        spec_BTF = fbank(
            waveform.to(self.device, torch.float32),
            lengths_B,
            num_mel_bins=self.model.config.num_mel_bins,
            target_length=windows * self.frames,
            mean=self.mean,
            std=self.std,
        )
        spec_BWTF = spec_BTF.unflatten(1, (windows, self.frames))
        starts_W = self.frames * torch.arange(windows, device=self.device)
        weights_BW = (frames_B[:, None] - starts_W).clamp(0, self.frames)
        heard_BW = weights_BW > 0
        rows = [self.model(batch).pooler_output.float() for batch in spec_BWTF[heard_BW].split(_MOST_WINDOWS)]
        embedding_BWE = torch.zeros(*heard_BW.shape, self.dim, device=self.device)
        embedding_BWE[heard_BW] = torch.cat(rows)
        return (embedding_BWE * weights_BW[..., None]).sum(1) / frames_B[:, None]
