"""BEATs (Chen et al., 2023, "Audio pre-training with acoustic tokenizers") from its released files.

Shapes: B clips, n samples, T frames, F mel bins, L tokens, D width, H heads.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cat.checkpoints.store import CheckpointError
from cat.encoders.frozen import checked_lengths
from cat.encoders.untrained import drawn_again, initialise_layers, untrained_twin
from cat.encoders.vit import real_tokens
from cat.encoders.weights import Weights, read_weights
from cat_kernels import fbank

MEL_BINS, PATCH = 128, 16
FRAME_LENGTH, FRAME_SHIFT = 400, 160  # samples
MAX_SAMPLES = 160_000
MEAN, STD = 15.41663, 6.55582  # of the log-mel values of integer samples
MAX_DISTANCE = 800  # tokens, in the settings of every released file; the tensors do not tell it
# What the network below does; anything else would need another one.
SETTINGS = {
    "layer_norm_first": False,
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "activation_fn": "gelu",
    "conv_bias": False,
    "input_patch_size": PATCH,
}
POS_CONV = "encoder.pos_conv.0."
BIAS_TABLE = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
UNUSED = r"predictor\."  # the classifier of fine-tuned files


class BEATsEncoder:
    """BEATs: mean over the tokens of the last layer, (B, 768) at 16 kHz.

    `path` is a file from github.com/microsoft/unilm/tree/master/beats (iteration 3+ is the one to take, pre-trained or
    fine-tuned), or its tensors in a ``.safetensors`` file. Licence: MIT.

    Samples times 2^15 become Kaldi's log-mel spectrogram with Povey's window. The first 10 s (160,000 samples) of a
    clip are heard, in tokens of 16 frames by 16 bins; frames past the last whole 16 are left out, so that a clip must
    have 16 (0.175 s). Padding beside longer clips is hidden from it.

    Raises: `CheckpointError`, ValueError, FileNotFoundError: a file that is none, or does not fit, in words.
    """

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        weights = read_weights(path, "BEATs", settings="cfg").without(UNUSED)
        self.model = _network(weights, device)
        self.device = torch.device(device)
        self.name, self.sample_rate, self.dim = f"beats:{path}", 16_000, self.model.post_extract_proj.out_features
        self.min_samples = FRAME_LENGTH + (PATCH - 1) * FRAME_SHIFT

    def untrained_twin(self, seed: int = 0) -> BEATsEncoder:
        """The same network, initialised anew."""
        return untrained_twin(self, seed, lambda: drawn_again(self.model))

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths_B = checked_lengths(waveform, lengths).clamp(max=MAX_SAMPLES)
        if (least := int(lengths_B.min())) < self.min_samples:
            raise ValueError(f"a clip has {least} samples at 16 kHz; BEATs hears no fewer than {self.min_samples}")
        rows_B = (1 + (lengths_B - FRAME_LENGTH) // FRAME_SHIFT) // PATCH
        spec_BTF = fbank(
            waveform[:, :MAX_SAMPLES].to(self.device),
            lengths_B.to(self.device),
            num_mel_bins=MEL_BINS,
            window="povey",
            scale=2.0**15,
            target_length=PATCH * int(rows_B.max()),
            mean=MEAN,
            std=STD,
        )
        embedding: Tensor = self.model(spec_BTF, rows_B * (MEL_BINS // PATCH))
        return embedding.float()


class BEATsNetwork(nn.Module):
    """Spectrogram (B, T, F) -> (B, D), the mean of each clip's first ``tokens_B`` (on the CPU). `buckets` are the rows
    of the table of position biases."""

    def __init__(
        self, patch_dim: int, dim: int, depth: int, heads: int, hidden: int, kernel: int, groups: int, buckets: int
    ) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, patch_dim, PATCH, PATCH, bias=False)
        self.layer_norm = nn.LayerNorm(patch_dim)
        self.post_extract_proj = nn.Linear(patch_dim, dim)
        self.encoder = Transformer(dim, depth, heads, hidden, kernel, groups, buckets)

    def initialise(self) -> None:
        """As the released code does."""
        self.patch_embedding.reset_parameters()
        self.layer_norm.reset_parameters()
        self.post_extract_proj.reset_parameters()
        self.encoder.initialise()

    def forward(self, spec_BTF: Tensor, tokens_B: Tensor) -> Tensor:
        patches_BLD = self.patch_embedding(spec_BTF[:, None]).flatten(2).transpose(1, 2)
        real_BL = real_tokens(tokens_B, patches_BLD.shape[1], patches_BLD.device)
        x_BLD = self.encoder(self.post_extract_proj(self.layer_norm(patches_BLD)), real_BL)
        if real_BL is not None:
            x_BLD = x_BLD * real_BL[..., None]
        return x_BLD.sum(1) / tokens_B[:, None].to(x_BLD.device)


class Transformer(nn.Module):
    """A convolution as absolute position, post-norm layers, one table of relative position biases for all of them."""

    max_distance = MAX_DISTANCE

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, kernel: int, groups: int, buckets: int) -> None:
        super().__init__()
        self.pos_conv = nn.ModuleList([nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)])
        self.layer_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(Layer(dim, heads, hidden, deep_norm_alpha(depth)) for _ in range(depth))
        self.relative_attention_bias = nn.Parameter(torch.empty(buckets, heads))

    def initialise(self) -> None:
        """BERT's, and deep norm's smaller weights (DeepNet, table 2, of an encoder alone)."""
        initialise_layers(self, partial(nn.init.normal_, std=0.02))
        nn.init.normal_(self.relative_attention_bias, std=0.02)
        conv: Any = self.pos_conv[0]
        nn.init.normal_(conv.weight, std=(4 / (conv.kernel_size[0] * conv.out_channels)) ** 0.5)
        nn.init.zeros_(conv.bias)
        layers: Any = self.layers
        for layer in layers:
            layer.initialise((8 * len(layers)) ** -0.25)

    def forward(self, x_BLD: Tensor, real_BL: Tensor | None) -> Tensor:
        if real_BL is not None:  # the convolution would carry what stands behind a clip's end into it
            x_BLD = x_BLD * real_BL[..., None]
        length = x_BLD.shape[1]
        place_BDL = self.pos_conv[0](x_BLD.transpose(1, 2))[..., :length]  # an even kernel gives one more
        x_BLD = self.layer_norm(x_BLD + nn.functional.gelu(place_BDL).transpose(1, 2))
        buckets_LL = relative_buckets(length, len(self.relative_attention_bias), self.max_distance)
        bias_HLL = self.relative_attention_bias[buckets_LL.to(x_BLD.device)].permute(2, 0, 1)
        for layer in self.layers:
            x_BLD = layer(x_BLD, bias_HLL, real_BL)
        return x_BLD


class Layer(nn.Module):
    """Deep norm: LayerNorm(alpha x + f(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.self_attn = GatedAttention(dim, heads)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def initialise(self, beta: float) -> None:
        attention = self.self_attn
        nn.init.ones_(attention.grep_a)
        for linear in (attention.q_proj, attention.k_proj):
            nn.init.xavier_normal_(linear.weight)
        for linear in (attention.v_proj, attention.out_proj, self.fc1, self.fc2):
            nn.init.xavier_normal_(linear.weight, gain=beta)

    def forward(self, x_BLD: Tensor, bias_HLL: Tensor, real_BL: Tensor | None) -> Tensor:
        x_BLD = self.self_attn_layer_norm(self.alpha * x_BLD + self.self_attn(x_BLD, bias_HLL, real_BL))
        hidden_BLh = nn.functional.gelu(self.fc1(x_BLD))
        out: Tensor = self.final_layer_norm(self.alpha * x_BLD + self.fc2(hidden_BLh))
        return out


class GatedAttention(nn.Module):
    """Attention with a position bias that each query scales by two gates of its own (WavLM, section 3.1)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.grep_linear = nn.Linear(dim // heads, 8)
        self.grep_a = nn.Parameter(torch.empty(1, heads, 1, 1))

    def forward(self, x_BLD: Tensor, bias_HLL: Tensor, real_BL: Tensor | None) -> Tensor:
        q, k, v = (
            project(x_BLD).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates_BHL2 = self.grep_linear(q).unflatten(3, (2, 4)).sum(-1).sigmoid()
        update_BHL1, reset_BHL1 = gates_BHL2.chunk(2, dim=-1)
        bias_BHLL = (update_BHL1 * (reset_BHL1 * self.grep_a - 1) + 2) * bias_HLL
        if real_BL is not None:
            bias_BHLL = bias_BHLL.masked_fill(~real_BL[:, None, None], -math.inf)
        out_BHLd = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHLL.to(q.dtype))
        out: Tensor = self.out_proj(out_BHLd.transpose(1, 2).flatten(2))
        return out


def deep_norm_alpha(depth: int) -> float:
    """DeepNet, table 2, of an encoder alone."""
    return float((2 * depth) ** 0.25)


def relative_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """(length, length) int64, of query i and key j: half of the buckets for j > i, and of each half the first half for
    one distance each, the rest logarithmically up to `max_distance` (T5's). On the CPU: a GPU's logarithm may round
    another way."""
    position_L = torch.arange(length, device="cpu")
    distance_LL = position_L[None] - position_L[:, None]
    side, exact = buckets // 2, buckets // 4
    far_LL = distance_LL.abs().clamp(min=1).float()
    steps_LL = torch.log(far_LL / exact) / math.log(max_distance / exact) * (side - exact)
    far_LL = (exact + steps_LL.long()).clamp(max=side - 1)
    return (distance_LL > 0) * side + torch.where(distance_LL.abs() < exact, distance_LL.abs(), far_LL)


def _network(weights: Weights, device: torch.device | str) -> BEATsNetwork:
    weights.check_settings(SETTINGS)
    dim, patch_dim = weights.shape("post_extract_proj.weight", 2)
    hidden, _ = weights.shape("encoder.layers.0.fc1.weight", 2)
    depth = weights.depth("encoder.layers")
    _fold_weight_norm(weights)
    _share_table(weights, depth)
    buckets, heads = weights.shape("encoder.relative_attention_bias", 2)
    _, group_dim, kernel = weights.shape(POS_CONV + "weight", 3)
    if dim % heads or dim % group_dim:
        raise CheckpointError(
            f"{weights.path}: a width of {dim} is no multiple of {heads} heads and of {group_dim} channels a group"
        )
    network = weights.into(
        lambda: BEATsNetwork(patch_dim, dim, depth, heads, hidden, kernel, dim // group_dim, buckets), device
    )
    network.encoder.max_distance = int(weights.settings.get("max_distance", MAX_DISTANCE))
    return network


def _fold_weight_norm(weights: Weights) -> None:
    """w = g v / |v|, the norm taken at each of the kernel's places (``weight_norm(dim=2)``)."""
    shape_g, shape_v = weights.shape(POS_CONV + "weight_g", 3), weights.shape(POS_CONV + "weight_v", 3)
    if shape_g != (1, 1, shape_v[2]):
        raise CheckpointError(
            f"{weights.path}: {POS_CONV}weight_g has shape {shape_g}; expected {(1, 1, shape_v[2])}, a norm for each "
            "place of the kernel"
        )
    g, v = (weights.tensors.pop(POS_CONV + name).float() for name in ("weight_g", "weight_v"))
    weights.tensors[POS_CONV + "weight"] = g * v / v.norm(dim=(0, 1), keepdim=True)


def _share_table(weights: Weights, depth: int) -> None:
    """The file has the one table under every layer's name."""
    weights.shape(BIAS_TABLE.format(0), 2)
    table = weights.tensors[BIAS_TABLE.format(0)]
    for name in map(BIAS_TABLE.format, range(depth)):
        if not torch.equal(weights.tensors.pop(name, table), table):
            raise CheckpointError(f"{weights.path}: {name} differs from the first layer's; expected one for all layers")
    weights.tensors["encoder.relative_attention_bias"] = table
