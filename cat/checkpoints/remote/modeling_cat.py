"""The encoder of the Convolutional Audio Transformer for transformers: `AutoModel`, with `trust_remote_code=True`.

It runs on `cat` where that is installed (pip install cat-kernels), which has fused kernels for GPUs; otherwise on the
plain PyTorch below, which gives the same numbers to rounding. `from cat import CATEncoder` loads the same folder, takes
waveforms of any rate and length, and needs no remote code.

Shapes: B clips, T frames, F mel bins, P patch, H x W = T/P x F/P patches, L = H * W, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

try:
    from cat.config import from_mapping
    from cat.model import Encoder, ModelConfig
except ImportError:
    Encoder = None


class CATConfig(PretrainedConfig):
    """`model`: architecture; `features`: how spectrograms are made; `pooling`: "mean", "cls" or "both"."""

    model_type = "cat-audio"

    def __init__(self, model=None, features=None, pooling="mean", **others):
        super().__init__(**others)
        self.model, self.features, self.pooling = model or {}, features or {}, pooling
        self.hidden_size, self.num_hidden_layers = self.model.get("embed_dim"), self.model.get("depth")


class CATModel(PreTrainedModel):
    """(B, T, F) log-mel spectrograms of `AutoFeatureExtractor` to tokens (B, 1 + L, D), CLS first, and an embedding.

    With `num_frames` (B,), which the extractor gives too, a clip does not hear what lies behind its end, nor is it
    pooled; the tokens there are 0.
    """

    config_class = CATConfig
    main_input_name = "input_values"
    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012 (of a classifier)

    def __init__(self, config):
        super().__init__(config)
        if Encoder is None:
            self.encoder = PlainEncoder(config.model)
        else:
            self.encoder = Encoder(from_mapping(ModelConfig, config.model))
        self._placed = False
        self.post_init()

    def _init_weights(self, module):
        """The network initialises itself."""

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **options):
        """Strict: a missing tensor is an error, and nothing is unpickled."""
        options["use_safetensors"] = True
        model, found = super().from_pretrained(*args, output_loading_info=True, **options)
        wrong = sorted({*found["missing_keys"], *map(str, found["mismatched_keys"]), *found["unexpected_keys"]})
        if wrong:
            raise ValueError(f"{args[0]}: {len(wrong)} tensors are missing, unknown or of another shape: {wrong[0]}")
        return (model, found) if output_loading_info else model

    def forward(self, input_values, num_frames=None, output_hidden_states=False, return_dict=True):
        P = self.config.model["resolutions"][-1]
        spec_B1TF = F.pad(input_values, (0, 0, 0, -input_values.shape[1] % P))[:, None].to(self.encoder.cls.dtype)
        H, W = spec_B1TF.shape[2] // P, spec_B1TF.shape[3] // P
        rows = [H] * len(spec_B1TF) if num_frames is None else [max(1, -(-int(n) // P)) for n in num_frames]
        if Encoder is not None and not self._placed:  # no file has the table of positions, which is made on "meta"
            self.encoder.positions = self.encoder._table().to(self.encoder.cls)
            self._placed = True
        hidden = self.encoder.layers(spec_B1TF, rows=rows)
        inside_BH = torch.arange(H, device=spec_B1TF.device) < torch.tensor(rows, device=spec_B1TF.device)[:, None]
        cls_BD, rows_BHD = hidden[-1][:, 0], hidden[-1][:, 1:].unflatten(1, (H, W)).mean(2)
        mean_BD = (rows_BHD * inside_BH[:, :, None]).sum(1) / inside_BH.sum(1, keepdim=True)
        pooled = {"cls": cls_BD, "mean": mean_BD, "both": torch.cat([cls_BD, mean_BD], dim=1)}[self.config.pooling]
        states = tuple(hidden) if output_hidden_states else None
        output = BaseModelOutputWithPooling(last_hidden_state=hidden[-1], pooler_output=pooled, hidden_states=states)
        return output if return_dict else output.to_tuple()


# ------------------------------------------------------------------------------------------------ plain PyTorch


class PlainEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config["embed_dim"]
        self.patch_size = config["resolutions"][-1]
        if config["stem"] == "patch":
            self.stem = PatchEmbed(self.patch_size, dim)
        else:
            self.stem = Stem(config["resolutions"], [*config["channels"], dim])
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * config["mlp_ratio"])
        self.blocks = nn.ModuleList(Block(dim, config["num_heads"], hidden) for _ in range(config["depth"]))

    def layers(self, spec_B1TF, rows):
        H, W = (size // self.patch_size for size in spec_B1TF.shape[2:])
        seen_BH = torch.arange(H, device=spec_B1TF.device) < torch.tensor(rows, device=spec_B1TF.device)[:, None]
        x = self.stem(spec_B1TF, seen_BH).flatten(2).transpose(1, 2)
        x = x + positions(x.shape[2], H, W).to(x)
        x = self.norm(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1))
        seen_BS = F.pad(seen_BH.repeat_interleave(W, dim=1), (1, 0), value=True)
        x = torch.where(seen_BS[:, :, None], x, 0)
        outputs = [x]
        for block in self.blocks:
            x = torch.where(seen_BS[:, :, None], block(x, seen_BS[:, None, None]), 0)
            outputs.append(x)
        return outputs


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(1, dim, patch_size, patch_size)

    def forward(self, spec_B1TF, seen_BH):
        return self.proj(spec_B1TF)


class Stem(nn.Module):
    """The multi-resolution convolution stem (arXiv 2601.21612), on all positions: (B, 1, T, F) to (B, D, H, W)."""

    def __init__(self, resolutions, widths):
        super().__init__()
        self.resolutions, patch = resolutions, resolutions[-1]
        strides = [r // before for r, before in zip(resolutions, [1, *resolutions[:-1]], strict=True)]
        inputs = [1, *widths[:-1]]
        self.embeds = nn.ModuleList(Embed(i, o, k) for i, o, k in zip(inputs, widths, strides, strict=True))
        self.stages = nn.ModuleList(nn.ModuleList(ConvBlock(c) for _ in range(2)) for c in widths[:-1])
        sides = [patch // r for r in resolutions[:-1]]
        self.sides = nn.ModuleList(nn.Conv2d(c, widths[-1], k, k) for c, k in zip(widths[:-1], sides, strict=True))
        self.proj = nn.Linear(widths[-1], widths[-1])

    def forward(self, spec_B1TF, seen_BH):
        x, tokens = spec_B1TF, 0
        for embed, stage, side in zip(self.embeds, self.stages, self.sides, strict=False):
            x = channels_last(embed.norm, embed.proj(x))
            seen_B1H1 = seen_BH.repeat_interleave(x.shape[2] // seen_BH.shape[1], dim=1)[:, None, :, None].to(x.dtype)
            for block in stage:
                x = block(x, seen_B1H1)
            tokens = tokens + side(x)
        embed = self.embeds[-1]
        return channels_last(self.proj, channels_last(embed.norm, embed.proj(x))) + tokens


class Embed(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, stride, stride)
        self.norm = nn.LayerNorm(outputs, eps=1e-5)


class ConvBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.conv1, self.conv2 = nn.Linear(width, width), nn.Linear(width, width)
        self.dwconv = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, seen_B1H1):
        y = channels_last(lambda rows: self.conv1(self.norm1(rows)), x) * seen_B1H1
        x = x + channels_last(self.conv2, self.dwconv(y))
        return x + channels_last(lambda rows: self.fc2(F.gelu(self.fc1(self.norm2(rows)))), x)


class Block(nn.Module):
    """Post-norm transformer block."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x, seen_B11S):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B11S).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.proj(a))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


def channels_last(function, x_BCHW):
    return function(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def positions(dim, rows, columns):
    """Fixed 2-D sin-cos table (rows * columns, dim): the first half encodes the column, the second the row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def half(count):
        angles = torch.arange(count)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    return torch.cat([half(columns).repeat(rows, 1), half(rows).repeat_interleave(columns, dim=0)], dim=1)
