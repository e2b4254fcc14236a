"""Models on the Hugging Face hub, and in folders that look like one of its repositories."""

from __future__ import annotations

from dataclasses import dataclass

from cat.data.features import FeatureConfig
from cat.model import ModelConfig

POOLINGS = ("mean", "cls", "both")


@dataclass(frozen=True)
class EncoderConfig:
    """All that rebuilds an encoder: config.json.

    ``pooling`` makes the clip's embedding: the "mean" of the patches, the "cls" token, or "both" side by side.
    """

    model: ModelConfig
    features: FeatureConfig
    pooling: str = "mean"
    format_version: int = 1

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}.")
