"""Audio-MAE, BEATs and Dasheng files with few and random numbers, in the layout and under the names of the released."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BEATS_SETTINGS = {
    "input_patch_size": 16,
    "conv_bias": False,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "num_buckets": 320,
    "max_distance": 800,
    "finetuned_model": False,
}
DASHENG_SETTINGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "target_length": 40, "hop_size": 160, "n_mels": 64}


class Random:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, around: float = 0.0, scale: float = 0.2) -> Tensor:
        return around + scale * torch.randn(shape, generator=self.generator)

    def norm(self, name: str, dim: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(dim, around=1.0), f"{name}.bias": self(dim)}

    def linear(self, name: str, wide_in: int, wide_out: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(wide_out, wide_in), f"{name}.bias": self(wide_out)}

    def block(self, name: str, dim: int) -> dict[str, Tensor]:
        """timm's."""
        return (
            self.norm(f"{name}.norm1", dim)
            | self.linear(f"{name}.attn.qkv", dim, 3 * dim)
            | self.linear(f"{name}.attn.proj", dim, dim)
            | self.norm(f"{name}.norm2", dim)
            | self.linear(f"{name}.mlp.fc1", dim, 4 * dim)
            | self.linear(f"{name}.mlp.fc2", 4 * dim, dim)
        )


def audiomae(*, dim: int = 128, depth: int = 2, rows: int = 4) -> dict[str, Tensor]:
    """A pre-trained file's; `rows` of 8 patches, 16 frames each."""
    random = Random(1)
    tensors = {
        "cls_token": random(1, 1, dim),
        "pos_embed": random(1, 1 + 8 * rows, dim),
        "mask_token": random(1, 1, 64),
        "decoder_pos_embed": random(1, 1 + 8 * rows, 64),
        "patch_embed.proj.weight": random(dim, 1, 16, 16, scale=0.05),
        "patch_embed.proj.bias": random(dim),
    }
    for i in range(depth):
        tensors |= random.block(f"blocks.{i}", dim)
    return tensors | random.norm("norm", dim) | random.linear("decoder_embed", dim, 64)


def audiomae_file(path: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    model = audiomae() if tensors is None else tensors
    torch.save({"model": model, "args": argparse.Namespace(lr=1e-3), "epoch": 32}, path)
    return path


def beats(*, dim: int = 32, depth: int = 2, heads: int = 2, patch_dim: int = 16) -> dict[str, Tensor]:
    random, hidden = Random(2), 2 * dim
    tensors = {"patch_embedding.weight": random(patch_dim, 1, 16, 16, scale=0.05)}
    tensors |= random.norm("layer_norm", patch_dim) | random.linear("post_extract_proj", patch_dim, dim)
    tensors |= {
        "encoder.pos_conv.0.bias": random(dim),
        "encoder.pos_conv.0.weight_g": random(1, 1, 128, around=0.5, scale=0.1),
        "encoder.pos_conv.0.weight_v": random(dim, dim // 16, 128),
    }
    table = random(320, heads, scale=1.0)
    for i in range(depth):
        layer = f"encoder.layers.{i}"
        tensors |= {
            f"{layer}.self_attn.relative_attention_bias.weight": table,
            f"{layer}.self_attn.grep_a": random(1, heads, 1, 1, around=1.0),
        }
        tensors |= random.linear(f"{layer}.self_attn.grep_linear", dim // heads, 8)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            tensors |= random.linear(f"{layer}.self_attn.{name}", dim, dim)
        tensors |= random.norm(f"{layer}.self_attn_layer_norm", dim)
        tensors |= random.linear(f"{layer}.fc1", dim, hidden) | random.linear(f"{layer}.fc2", hidden, dim)
        tensors |= random.norm(f"{layer}.final_layer_norm", dim)
    return tensors | random.norm("encoder.layer_norm", dim)


def beats_file(path: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    torch.save({"cfg": BEATS_SETTINGS | settings, "model": beats() if tensors is None else tensors}, path)
    return path


def dasheng(*, dim: int = 32, depth: int = 2, piece: int = 10) -> dict[str, Tensor]:
    """Without the front end's buffers; `piece` tokens of 4 frames are heard at once."""
    random = Random(3)
    tensors = {
        "time_pos_embed": random(1, dim, 1, piece),
        "freq_pos_embed": random(1, dim, 1, 1),
        "patch_embed.proj.weight": random(dim, 1, 64, 4, scale=0.05),
        "patch_embed.proj.bias": random(dim),
        "init_bn.1.running_mean": random(64, around=-30.0, scale=5.0),
        "init_bn.1.running_var": random(64, around=200.0, scale=20.0),
        "init_bn.1.num_batches_tracked": torch.tensor(7),
    }
    for i in range(depth):
        tensors |= random.block(f"blocks.{i}", dim)
    return tensors | random.norm("init_bn.1", 64) | random.norm("norm", dim)


def dasheng_file(path: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    torch.save({"model": dasheng() if tensors is None else tensors, "config": DASHENG_SETTINGS | settings}, path)
    return path
