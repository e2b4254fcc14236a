"""The encoder of the Convolutional Audio Transformer (arXiv 2601.21612), from spectrogram to tokens.

Read top to bottom: configuration, positions, block, encoder (stem, CLS, blocks). `cat.model.pretraining` trains it.

Shapes: B clips, M masks a clip, N = B * M clip-clones (clip b owns rows b*M .. (b+1)*M - 1), T frames, F mel bins,
P patch, H x W = T/P x F/P patches, L = H * W (patch h*W + w), K visible patches, S = 1+K or 1+L tokens with the CLS
first, D embedding width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_kernels import MultiResConv, gather_tokens, residual_layer_norm
from cat_kernels.stem.layout import patchify

MAX_ROWS = 768  # rows of patches the table of positions covers: two minutes of audio at P = 16

# ModelConfig.kernels -> backend of the stem and of every other operator
KERNELS = {
    "auto": ("auto", "auto"),
    "triton": ("triton", "triton"),
    "reference": ("visible", "torch"),
    "dense": ("dense", "torch"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of encoder and decoder; the defaults are the paper's base model.

    ``stem`` is "multires" (the convolution stem) or "patch" (one plain P x P patch embedding; resolutions = (P,)).

    ``kernels`` says what runs the model's operators (`cat_kernels`) and changes numbers by rounding only: "auto" the
    fastest that can run, "reference" plain PyTorch, "triton" the Triton kernels or an error, "dense" plain PyTorch with
    the stem on all positions of all clones, as its formula is written.
    """

    stem: str = "multires"
    resolutions: tuple[int, ...] = (4, 8, 16)
    channels: tuple[int, ...] = (256, 384)
    embed_dim: int = 768
    depth: int = 11
    num_heads: int = 12
    mlp_ratio: float = 4.0
    mel_bins: int = 128
    decoder_dim: int = 768
    decoder_layers: int = 6
    decoder_groups: int = 16
    decoder_kernel: int = 3
    kernels: str = "auto"

    def __post_init__(self) -> None:
        if self.stem not in ("multires", "patch"):
            raise ValueError(f"stem={self.stem!r}; expected 'multires' or 'patch'")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels={self.kernels!r}; expected one of {', '.join(map(repr, KERNELS))}")
        for name in ("embed_dim", "depth", "num_heads", "mel_bins", "decoder_dim", "decoder_groups", "decoder_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.decoder_layers < 0 or self.decoder_kernel % 2 == 0:
            raise ValueError(
                f"decoder_layers={self.decoder_layers} with decoder_kernel={self.decoder_kernel}; expected 0 or more "
                "layers and an odd kernel"
            )
        if not self.resolutions or min(self.resolutions) < 1:
            raise ValueError(f"resolutions={self.resolutions}; expected one or more positive ones, as in (4, 8, 16)")
        if not 1 <= self.embed_dim * self.mlp_ratio < 1 << 31:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}; expected hidden units over embed_dim={self.embed_dim}: 4")
        if self.stem == "patch" and len(self.resolutions) != 1:
            raise ValueError(f"stem='patch' with resolutions={self.resolutions}; expected one, the patch size: (16,)")
        if self.embed_dim % 4 or self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} with num_heads={self.num_heads}; expected a multiple of 4 (sin-cos "
                "positions) and of num_heads"
            )
        if self.mel_bins % self.patch_size:
            raise ValueError(f"mel_bins={self.mel_bins} is not a multiple of the patch size {self.patch_size}")
        for name, width in (("embed_dim", self.embed_dim), ("decoder_dim", self.decoder_dim)):
            if self.decoder_layers and width % self.decoder_groups:
                raise ValueError(f"{name}={width} is not a multiple of decoder_groups={self.decoder_groups}")

    @property
    def patch_size(self) -> int:
        return self.resolutions[-1]

    @property
    def stem_backend(self) -> str:
        return KERNELS[self.kernels][0]

    @property
    def backend(self) -> str:
        """Of every operator but the stem."""
        return KERNELS[self.kernels][1]

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Fields as earlier versions wrote them, in recipes and checkpoints, under today's names."""
        if "stem_backend" in values:
            old = values.pop("stem_backend")
            values.setdefault("kernels", "reference" if old == "visible" else old)
        return values


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        channels=(48, 96), embed_dim=192, depth=4, num_heads=3, decoder_dim=192, decoder_layers=2, decoder_groups=16
    ),
    "small": ModelConfig(channels=(128, 192), embed_dim=384, num_heads=6, decoder_dim=384, decoder_layers=4),
    "base": ModelConfig(),
    "large": ModelConfig(channels=(320, 512), embed_dim=1024, depth=23, num_heads=16, decoder_dim=1024),
}


# --------------------------------------------------------------------------------------------------------- encoder


def rows_of(frames: int, patch_size: int) -> int:
    """Rows of patches that so many frames fill, the last one perhaps in part."""
    return max(1, -(-frames // patch_size))


def sincos_positions(dim: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sin-cos table (rows * columns, dim) float32: first half encodes the column w, second half the row h."""
    with torch.device("cpu"):
        omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

        def half(count: int) -> Tensor:
            angles = torch.arange(count)[:, None] * omega
            return torch.cat([angles.sin(), angles.cos()], dim=1).float()

        return torch.cat([half(columns).repeat(rows, 1), half(rows).repeat_interleave(columns, dim=0)], dim=1)


def low_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype, under which norms put out float32 and every product rounds it; None where autocast is off, and
    for float64, which it leaves alone.

    Autocast has it so on GPUs alone; here it is the same on a CPU, where norms of PyTorch put out what they take in.
    Then the gradient of the global loss would be lost in rounding: it comes along a token that was normed, and of that
    direction the norm's backward leaves nothing (gradients of a new model's blocks: 0.14 off, in float32 0.003).
    """
    device = x.device.type
    if device not in ("cpu", "cuda") or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def for_products(x: Tensor) -> Tensor:
    """As products under autocast read it."""
    dtype = low_dtype(x)
    return x if dtype is None else x.to(dtype)


# Tokens up to which a CPU trains attention in float32: the gradient of PyTorch's kernel is slow in bf16. Forward and
# backward in bf16 against this, in turn on one core without matrix units: 3.0x to 3.7x the time with 26 tokens, 1.8x to
# 2.3x with 103 and 129, 1.0x to 1.2x with 513 and 1025. Without gradients it is 0.8x to 1.2x.
FEW_TOKENS = 256


def attend(q_NHSd: Tensor, k_NHSd: Tensor, v_NHSd: Tensor, seen_N11S: Tensor | None = None) -> Tensor:
    """Softmax attention, (N, H, S, d) in the queries' dtype; on a CPU in float32 where gradients of few tokens are
    recorded (`FEW_TOKENS`)."""
    trains = q_NHSd.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not trains or q_NHSd.shape[2] > FEW_TOKENS:
        return F.scaled_dot_product_attention(q_NHSd, k_NHSd, v_NHSd, attn_mask=seen_N11S)
    wide = torch.promote_types(q_NHSd.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        x = F.scaled_dot_product_attention(q_NHSd.to(wide), k_NHSd.to(wide), v_NHSd.to(wide), attn_mask=seen_N11S)
    return x.to(q_NHSd.dtype)


class Block(nn.Module):
    """Post-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, backend: str = "auto") -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)

    def attention(self, x_NSD: Tensor, seen_N11S: Tensor | None = None) -> Tensor:
        N, S, D = x_NSD.shape
        # Split where they lie, backward writes the three gradients where the Linear reads them, in one copy. Behind a
        # permute it would stack them first.
        qkv_NSHd = self.qkv(x_NSD).reshape(N, S, 3, self.num_heads, D // self.num_heads).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in qkv_NSHd)
        x = attend(q, k, v, seen_N11S)
        return self.proj(x.transpose(1, 2).reshape(N, S, D))

    def forward(
        self,
        x_NSD: Tensor,
        low_NSD: Tensor | None = None,
        seen_N11S: Tensor | None = None,
        keep_N2: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output; the same for the next block's products, its ``low`` (`for_products`); and the output of
        the MLP, from which targets are made.

        ``seen``: the tokens that attention may look at. ``keep``: what the clone's two branches are multiplied by (drop
        path)."""
        a = self.attention(x_NSD if low_NSD is None else low_NSD, seen_N11S)
        x, low = self._add(x_NSD, a if keep_N2 is None else a * keep_N2[:, 0, None, None].to(a.dtype), self.norm1)
        t = self.fc2(F.gelu(self.fc1(low)))
        x, low = self._add(x, t if keep_N2 is None else t * keep_N2[:, 1, None, None].to(t.dtype), self.norm2)
        return x, low, t

    def _add(self, x_NSD: Tensor, branch_NSD: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        low = low_dtype(x_NSD)
        return residual_layer_norm(
            x_NSD, branch_NSD, norm.weight, norm.bias, eps=norm.eps, low_dtype=low, backend=self.backend
        )


class PatchEmbed(nn.Module):
    """One plain P x P patch embedding, on the visible patches only: the stem of the authors' ablation."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(1, embed_dim, patch_size, patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))

    def forward(self, spec_B1TF: Tensor, visible_NK: Tensor | None = None) -> Tensor:
        pixels_BLP = patchify(spec_B1TF, (self.patch_size,)).squeeze(2)
        if visible_NK is not None:
            B, N = spec_B1TF.shape[0], visible_NK.shape[0]
            clip = torch.arange(N, device=spec_B1TF.device) // (N // max(B, 1))
            pixels_BLP = pixels_BLP[clip[:, None], visible_NK]
        return F.linear(pixels_BLP, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """Stem, fixed positions, CLS token, LayerNorm, post-norm blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D = config.embed_dim
        if config.stem == "patch":
            self.stem: nn.Module = PatchEmbed(config.patch_size, D)
        else:
            self.stem = MultiResConv(config.resolutions, config.channels, D, backend=config.stem_backend)
        self.cls = nn.Parameter(torch.randn(1, 1, D))  # 3-D, as released: matrices' weight decay applies to it
        self.positions: Tensor
        self.register_buffer("positions", self._table().to(self.cls.device), persistent=False)
        self.register_load_state_dict_post_hook(_place_positions)
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(D, config.num_heads, config.mlp_ratio, config.backend) for _ in range(config.depth)
        )
        self.blocks.apply(init_linear)

    def _table(self) -> Tensor:
        config = self.config
        return sincos_positions(config.embed_dim, MAX_ROWS, config.mel_bins // config.patch_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """No state dict brings the positions back that `to_empty` leaves uninitialised."""
        super()._apply(fn, recurse)
        if not self.positions.is_meta:
            self.positions.copy_(self._table())
        return self

    def embed(self, spec: Tensor, visible: Tensor | None = None, *, rows: Sequence[int] | None = None) -> Tensor:
        """What the first block sees: (N, 1+K, D), CLS first, or (B, 1+L, D) without ``visible``."""
        self._check_spec(spec)
        tokens = self.stem(spec, visible) if rows is None else self._stem_of_each_length(spec, rows)
        x = gather_tokens(
            tokens, visible, self.positions, self.cls.flatten(), select=False, backend=self.config.backend
        )
        return self.norm(x if low_dtype(x) is None else x.float())

    def _stem_of_each_length(self, spec: Tensor, rows: Sequence[int]) -> Tensor:
        """Tokens of clips that end before the spectrogram does, (B, L, D) with zeros behind: the stem's convolution
        meets its zero padding at a clip's own end, whatever lies behind it."""
        P = self.config.patch_size
        L = spec.shape[2] // P * (spec.shape[3] // P)
        order = sorted(range(len(rows)), key=rows.__getitem__)
        parts = []
        for count, clips in itertools.groupby(order, key=rows.__getitem__):
            tokens = self.stem(spec[_on(list(clips), spec.device), :, : count * P])
            parts.append(F.pad(tokens, (0, 0, 0, L - tokens.shape[1])))
        place = sorted(range(len(rows)), key=order.__getitem__)
        return torch.cat(parts)[_on(place, spec.device)]

    def forward(
        self,
        spec: Tensor,
        visible: Tensor | None = None,
        *,
        rows: Sequence[int] | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Output of the last block.

        Args:
            spec: (B, 1, T, F) normalised log-mel spectrogram; T a multiple of P, F = ``config.mel_bins``.
            visible: (B*M, K) int64 patch indices; None: all patches.
            rows: B numbers of 1 to T/P: clip b ends with its row of patches ``rows[b] - 1``. What lies behind is
                seen by nothing, so that the clip's tokens are those of the clip alone, and the tokens there are 0.
                Not with ``visible``. None: all rows.
            keep: (N, depth, 2) factors of the blocks' two residual branches (attention, MLP), clone by clone: 0, or
                1 / (1 - p), for drop path. None: 1.

        Returns:
            (B*M, 1+K, D), or (B, 1+L, D) without ``visible``: CLS, then the patches in the order asked for.

        Raises: ValueError for shapes that do not fit.
        """
        return self._run(spec, visible, rows, keep, None)

    def layers(self, spec: Tensor, *, rows: Sequence[int] | None = None) -> list[Tensor]:
        """What the first block sees, and then every block's output: depth + 1 times (B, 1+L, D). ``spec`` and ``rows``
        as in `forward`, whose result is the last of them."""
        outputs: list[Tensor] = []
        self._run(spec, None, rows, None, outputs)
        return outputs

    def _run(
        self,
        spec: Tensor,
        visible: Tensor | None,
        rows: Sequence[int] | None,
        keep: Tensor | None,
        outputs: list[Tensor] | None,
    ) -> Tensor:
        spec, rows, behind = self._within_rows(spec, visible, rows)
        x = self.embed(spec, visible, rows=rows)
        if keep is not None and keep.shape != (x.shape[0], len(self.blocks), 2):
            raise ValueError(
                f"keep has shape {tuple(keep.shape)}; expected ({x.shape[0]}, {len(self.blocks)}, 2): two factors for "
                "each block of each clone"
            )
        inside_BS1, seen_B11S = None, None
        if rows is not None:
            inside_BS1 = self._inside(rows, x)
            x, seen_B11S = torch.where(inside_BS1, x, 0), inside_BS1.transpose(1, 2)[:, None]
        if outputs is not None:
            outputs.append(F.pad(x, (0, 0, 0, behind)))
        low = for_products(x)
        for number, block in enumerate(self.blocks):
            x, low, _ = block(x, low, seen_B11S, None if keep is None else keep[:, number])
            if inside_BS1 is not None:
                x = torch.where(inside_BS1, x, 0)
                low = for_products(x)
            if outputs is not None:
                outputs.append(F.pad(x, (0, 0, 0, behind)))
        return F.pad(x, (0, 0, 0, behind)) if behind else x

    def _inside(self, rows: Sequence[int], x_BSD: Tensor) -> Tensor:
        """(B, S, 1) bool: the CLS token and the patches of each clip's own rows."""
        per_row = self.config.mel_bins // self.config.patch_size
        ends_B = _on([1 + count * per_row for count in rows], x_BSD.device)
        return (torch.arange(x_BSD.shape[1], device=x_BSD.device) < ends_B[:, None])[:, :, None]

    def _within_rows(
        self, spec: Tensor, visible: Tensor | None, rows: Sequence[int] | None
    ) -> tuple[Tensor, Sequence[int] | None, int]:
        """The spectrogram as far as the longest clip goes, ``rows``, None where all clips are as long as that, and the
        number of patches left off."""
        if rows is None:
            return spec, None, 0
        self._check_spec(spec)
        P = self.config.patch_size
        most = spec.shape[2] // P
        if visible is not None:
            raise ValueError("visible and rows were both given; expected one: list the patches of a clip's own rows")
        if len(rows) != spec.shape[0] or not all(1 <= count <= most for count in rows):
            raise ValueError(
                f"rows is {list(rows)}; expected a number from 1 to {most}, the rows of patches of this spectrogram, "
                f"for each of the {spec.shape[0]} clips"
            )
        longest = max(rows, default=most)
        behind = (most - longest) * (self.config.mel_bins // P)
        same = all(count == longest for count in rows)
        return spec[:, :, : longest * P], None if same else [int(count) for count in rows], behind

    def _check_spec(self, spec: Tensor) -> None:
        P, n_mels = self.config.patch_size, self.config.mel_bins
        if spec.ndim != 4 or spec.shape[1] != 1 or spec.shape[3] != n_mels:
            raise ValueError(f"spec has shape {tuple(spec.shape)}; this encoder expects (B, 1, T, {n_mels})")
        if spec.shape[2] == 0 or spec.shape[2] % P or spec.shape[2] > MAX_ROWS * P:
            raise ValueError(
                f"spec has T={spec.shape[2]} frames; expected a positive multiple of the patch size {P}, at most "
                f"{MAX_ROWS * P}"
            )


def _on(numbers: list[int], device: torch.device) -> Tensor:
    """(n,) int64; the device is not waited for."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def _place_positions(encoder: Encoder, _: Any) -> None:
    """After ``load_state_dict(assign=True)`` into an encoder made on the meta device."""
    if encoder.positions.is_meta:
        encoder.positions = encoder._table().to(encoder.cls.device, encoder.cls.dtype)


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
