"""Manifests, audio files, features and batches."""

from cat.data.audio import AudioError, read_audio, read_windows
from cat.data.augment import AugmentConfig
from cat.data.batch import Batch, Failure
from cat.data.dataset import DataConfig
from cat.data.embeddings import EmbeddingError, EmbeddingStore, EmbeddingWriter, gather_embeddings, open_embeddings
from cat.data.features import FEATURE_PRESETS, FeatureConfig, log_mel
from cat.data.finetuning import FinetuneDataConfig, finetune_batches, scoring_batches
from cat.data.labels import Labels, labels_of
from cat.data.loader import eval_batches, pretrain_batches
from cat.data.manifest import Clip, Manifest, ManifestError, load_manifest, write_manifest

__all__ = [
    "FEATURE_PRESETS",
    "AudioError",
    "AugmentConfig",
    "Batch",
    "Clip",
    "DataConfig",
    "EmbeddingError",
    "EmbeddingStore",
    "EmbeddingWriter",
    "Failure",
    "FeatureConfig",
    "FinetuneDataConfig",
    "Labels",
    "Manifest",
    "ManifestError",
    "eval_batches",
    "finetune_batches",
    "gather_embeddings",
    "labels_of",
    "load_manifest",
    "log_mel",
    "open_embeddings",
    "pretrain_batches",
    "read_audio",
    "read_windows",
    "scoring_batches",
    "write_manifest",
]
