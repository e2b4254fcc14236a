"""`LogMelFbank`: fbank with its settings, as a module; and the settings of published models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .op import check_options, fbank

# What published models were trained on; everything else is fbank's default. AudioSet, ESC-50 and SPC-2: the statistics
# of AST, EAT and CAT. BEATs: its own, on samples scaled to 16 bits, and Kaldi's own window.
FBANK_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "audioset": {"target_length": 1024, "mean": -4.268, "std": 4.569},
    "esc50": {"target_length": 512, "mean": -6.627, "std": 5.359},
    "spc2": {"target_length": 128, "mean": -6.846, "std": 5.565},
    "beats": {"window": "povey", "scale": 32768.0, "mean": 15.41663, "std": 6.55582},
}


class LogMelFbank(nn.Module):
    """Log-mel filter bank energies with fixed settings: `cat_kernels.fbank` as a module without parameters.

    Args:
        preset: "audioset", "esc50", "spc2" or "beats" (`FBANK_PRESETS`): the settings of models trained on them.
        options: any keyword argument of `cat_kernels.fbank`; these win over the preset's.

    Shapes: (B, n) or (n,) waveforms give (B, T, F) or (T, F). The clip's mean is not removed; the published CAT, EAT
    and AST pipelines subtract it first (`cat.data.log_mel` does).

    Raises:
        ValueError, TypeError: a preset or an option that there is not, settings that contradict each other.

    Example:
        >>> LogMelFbank("audioset")(torch.zeros(2, 160_000)).shape
        torch.Size([2, 1024, 128])
    """

    def __init__(self, preset: str | None = None, **options: Any) -> None:
        super().__init__()
        if preset is not None and preset not in FBANK_PRESETS:
            names = ", ".join(map(repr, FBANK_PRESETS))
            raise ValueError(f"LogMelFbank: preset={preset!r}; expected one of {names}, or None")
        self.preset = preset
        self.options = {**FBANK_PRESETS.get(preset or "", {}), **options}
        check_options(**self.options)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, n) or (n,) -> (B, T, F) or (T, F); ``lengths`` (B,) int64 for a ragged batch. See `cat_kernels.fbank`."""
        return fbank(waveform, lengths, **self.options)

    def extra_repr(self) -> str:
        given = [repr(self.preset)] if self.preset else []
        preset = FBANK_PRESETS.get(self.preset or "", {})
        changed = {name: value for name, value in self.options.items() if preset.get(name, torch) != value}
        return ", ".join(given + [f"{name}={value!r}" for name, value in changed.items()])
