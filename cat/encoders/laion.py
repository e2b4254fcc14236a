"""CLAP's audio tower from LAION's own files, into the network of `transformers`: their names, and its configuration.

The files (``630k-audioset-best.pt``, ``630k-audioset-fusion-best.pt``, ``music_speech_audioset_epoch_15_esc_89.98.pt``,
...) hold a whole training state. Of ``state_dict`` the audio tower (HTS-AT, tiny or base, fused or not) and its
projection are read; the text tower is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cat.checkpoints.foreign import read_foreign
from cat.encoders.pretrained import from_tensors, import_transformers

# (LAION's, transformers') beginnings and middles of a name.
NAMES = [
    (r"^audio_branch\.", "audio_model.audio_encoder."),
    (r"\.bn0\.", ".batch_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^audio_projection\.0\.", "audio_projection.linear1."),
    (r"^audio_projection\.2\.", "audio_projection.linear2."),
]
# Parts of the tower that are not on the way to the embedding, or are computed: the spectrogram and mel filters as
# convolutions, the head of 527 AudioSet classes, and the mask of shifted windows.
NOT_READ = re.compile(
    r"audio_branch\.(spectrogram_extractor|logmel_extractor|tscam_conv|head)\.|audio_branch\.layers\..*\.attn_mask$"
)
AUDIO = ("audio_branch.", "audio_projection.")


def load_laion(path: Path) -> tuple[Any, Any]:
    """(ClapAudioModelWithProjection, ClapFeatureExtractor) of a ``.pt`` file of LAION's, or of a ``.safetensors`` file
    with the same names. Nothing in it is executed (`read_foreign`).

    Raises: ImportError without `transformers`, ValueError that names what is missing or has no place.
    """
    transformers = import_transformers("CLAP")
    state = audio_tower(path, read_laion(path))
    config = transformers.ClapAudioConfig(**architecture(path, state))
    extractor = transformers.ClapFeatureExtractor(
        feature_size=config.num_mel_bins,
        frequency_min=50,
        truncation="fusion" if config.enable_fusion else "rand_trunc",
    )
    model = from_tensors("CLAP", str(path), "ClapAudioModelWithProjection", config, to_transformers(state))
    return model, extractor


def read_laion(path: Path) -> dict[str, Tensor]:
    """All of the file's tensors, without the ``module.`` in front of their names."""
    content = read_foreign(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def audio_tower(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of these the audio tower's and its projection's."""
    audio = {name: tensor for name, tensor in state.items() if name.startswith(AUDIO) and not NOT_READ.match(name)}
    if not audio:
        raise ValueError(
            f"CLAP {str(path)!r} holds no audio tower; expected LAION's names (module.audio_branch.*, "
            f"module.audio_projection.*) in its state_dict, and found {sorted(state)[:3] or 'no tensors'}"
        )
    return audio


def architecture(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ClapAudioConfig, from the tensors' shapes."""
    prefix = "audio_branch."
    blocks = [match for name in state if (match := re.match(rf"{prefix}layers\.(\d+)\.blocks\.(\d+)\.", name))]
    depths = [0] * (1 + max((int(match[1]) for match in blocks), default=-1))
    for match in blocks:
        depths[int(match[1])] = max(depths[int(match[1])], 1 + int(match[2]))
    try:
        patches = state[prefix + "patch_embed.proj.weight"]
        tables = [state[f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(len(depths))]
        mel_bins = len(state[prefix + "bn0.weight"])
        mlp = state[prefix + "layers.0.blocks.0.mlp.fc1.weight"]
        projection = state["audio_projection.0.weight"]
        fused = prefix + "patch_embed.mel_conv2d.weight" in state
        ratio = len(patches) // len(state[prefix + "patch_embed.fusion_model.local_att.0.weight"]) if fused else 4
    except KeyError as error:
        raise ValueError(
            f"CLAP {str(path)!r} lacks {error.args[0]}; expected the HTS-AT tower of LAION's CLAP (tiny or base, "
            f"without fusion or with aff_2d), and found {len(state)} tensors of one, such as {sorted(state)[0]}"
        ) from None
    return {
        "num_mel_bins": mel_bins,
        "spec_size": 4 * mel_bins,  # all of LAION's fold time four times
        "patch_size": patches.shape[-1],
        "patch_stride": [patches.shape[-1]] * 2,
        "patch_embeds_hidden_size": patches.shape[0],
        "depths": depths,
        "num_hidden_layers": len(depths),
        "num_attention_heads": [table.shape[1] for table in tables],
        "window_size": (round(len(tables[0]) ** 0.5) + 1) // 2,
        "mlp_ratio": mlp.shape[0] / mlp.shape[1],
        "hidden_size": projection.shape[1],
        "projection_dim": projection.shape[0],
        "enable_fusion": fused,
        "fusion_type": "aff_2d" if fused else None,
        "aff_block_r": ratio,
    }


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under transformers' names; query, key and value, one matrix there, are three here."""
    tensors = {}
    for theirs, tensor in state.items():
        name = theirs
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if ".self.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[name.replace("qkv", part)] = piece
        else:
            tensors[name] = tensor
    return tensors
