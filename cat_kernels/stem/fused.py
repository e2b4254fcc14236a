"""The stem in Triton: the visible-only stem (`visible.py`), its memory-bound chains of operations fused.

Four registered operators carry the fusion; what is one plain matrix product is left to PyTorch:

- `stem_embed_pixels`: pixels of visible patches -> embedding -> LayerNorm
- `stem_halo_rows`: the table of neighbours
- `stem_layer_norm`: LayerNorm of the coarser embeddings
- `stem_conv_block`: LN + 1x1; depthwise + 1x1 + residual; LN + MLP + residual

Shapes: N clone rows, K visible patches each, S positions in a patch of a stage, R = N * K * S rows, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._library import register
from . import composite
from .layout import block_places, strides
from .products import add_product
from .visible import patch_weight
from .weights import ConvBlock, Embed, StemWeights

OPERATOR = "MultiResConv"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_fused(stem: StemWeights, dtype: torch.dtype) -> str | None:
    """What the kernels do not compute, in words; None where there is nothing."""
    if dtype not in DTYPES:
        return f"{dtype} input, the kernels take float32, bfloat16 and float16"
    for name, width in [("embed_dim", stem.embed_dim), *(("channels", c) for c in stem.channels)]:
        if width % 16:
            return f"{name}={width} is no multiple of 16"
    return None


def compute_dtype(spec: Tensor) -> torch.dtype:
    """The spectrogram's, or autocast's where that is on."""
    device = spec.device.type
    if torch.is_autocast_enabled(device) and spec.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return spec.dtype


def multires_conv_triton(
    stem: StemWeights, spec_BCTF: Tensor, visible_NK: Tensor | None = None, *, recompute: bool = False
) -> Tensor:
    """The stem on visible patches only. Returns (N, K, D), or (B, L, D) without ``visible`` (all patches visible).

    recompute: see `MultiResConv`.
    """
    dtype = compute_dtype(spec_BCTF)
    with torch.autocast(spec_BCTF.device.type, enabled=False):
        return _stem(stem, spec_BCTF.to(dtype), visible_NK, recompute)


def _stem(stem: StemWeights, spec_BCTF: Tensor, visible_NK: Tensor | None, recompute: bool) -> Tensor:
    B, _, T, n_mels = spec_BCTF.shape
    H, W = T // stem.patch_size, n_mels // stem.patch_size
    if visible_NK is None:
        visible_NK = torch.arange(H * W, device=spec_BCTF.device).expand(B, H * W)
    N, K = visible_NK.shape

    factors, levels = strides(stem.resolutions), stem.levels()
    # Side outputs, the last Linear and all of their biases are summed by the products themselves.
    tokens: Tensor = sum((cast(Tensor, side.bias) for side in stem.sides), stem.proj.bias)
    x = _embed_pixels(levels[0][0], spec_BCTF, visible_NK, stem.resolutions)
    for i, (embed, blocks, side) in enumerate(levels):
        if i:
            x = _embed(embed, x, factors[i])
        if side is None:
            break
        coarser = factors[:i:-1]  # k_{n-1} .. k_{i+1}
        places = block_places(coarser, x.device).int()
        halo = _stem_halo_rows(visible_NK, places, [H, W], stem.kernel_size // 2, backend="triton")
        for block in blocks:
            x = _conv_block(block, x, halo, places, keep=not recompute)
        weight = patch_weight(side, coarser)
        tokens = add_product(tokens, x.reshape(N * K, weight.shape[1]), weight)
    return add_product(tokens, x, stem.proj.weight).unflatten(0, (N, K))


def _embed_pixels(embed: Embed, spec: Tensor, visible: Tensor, resolutions: Sequence[int]) -> Tensor:
    weight = patch_weight(embed.proj, (resolutions[0],))
    norm = embed.norm
    return _stem_embed_pixels(
        spec, visible, weight, embed.proj.bias, norm.weight, norm.bias, list(resolutions), norm.eps, backend="triton"
    )


def _embed(embed: Embed, x: Tensor, factor: int) -> Tensor:
    weight = patch_weight(embed.proj, (factor,))
    rows = add_product(embed.proj.bias, x.reshape(-1, weight.shape[1]), weight)
    return _stem_layer_norm(rows, embed.norm.weight, embed.norm.bias, embed.norm.eps, backend="triton")


def _conv_block(block: ConvBlock, x: Tensor, halo: Tensor, places: Tensor, *, keep: bool) -> Tensor:
    weights = [
        *(block.norm1.weight, block.norm1.bias, block.conv1.weight, block.conv1.bias),
        *(block.dwconv.weight.flatten(1), block.dwconv.bias, block.conv2.weight, block.conv2.bias),
        *(block.norm2.weight, block.norm2.bias, block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias),
    ]
    keep = keep and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights))
    return _stem_conv_block(x, halo, places, weights, block.norm1.eps, keep, backend="triton")[0]


# --- embedding of pixels ---------------------------------------------------------------------------------------------


def _embed_pixels_triton(
    spec: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    resolutions: Sequence[int],
    eps: float,
) -> Tensor:
    from .kernels.pixels import embed_pixels

    weight, bias = weight.to(spec.dtype).contiguous(), bias.contiguous()
    norm = ln_weight.contiguous(), ln_bias.contiguous()
    return embed_pixels(spec, visible, weight, bias, norm[0], norm[1], tuple(resolutions), eps)


def _embed_pixels_fake(spec: Tensor, visible: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    resolutions = arguments[3]
    positions = (resolutions[-1] // resolutions[0]) ** 2
    return spec.new_empty(visible.shape[0] * visible.shape[1] * positions, weight.shape[0])


def _embed_pixels_backward_triton(
    grad: Tensor,
    spec: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    resolutions: Sequence[int],
    eps: float,
    need_spec: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .kernels.pixels import embed_pixels_backward

    matrix = weight.to(spec.dtype).contiguous()
    *grads, pixels = embed_pixels_backward(
        grad.contiguous(),
        spec,
        visible,
        matrix,
        bias.contiguous(),
        ln_weight.contiguous(),
        tuple(resolutions),
        eps,
        need_spec,
    )
    dweight, dbias, dln_weight, dln_bias = grads
    if need_spec and pixels is not None:
        dspec = _scatter_pixels(pixels, spec, visible, tuple(resolutions))
    else:
        dspec = spec.new_empty(0)
    # Copies: they may be parts of one tensor, and an operator's results must not share memory.
    dweight, dbias = dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)
    return dspec, dweight, dbias, dln_weight.to(ln_weight.dtype, copy=True), dln_bias.clone()


def _scatter_pixels(pixels: Tensor, spec: Tensor, visible: Tensor, resolutions: tuple[int, ...]) -> Tensor:
    """Gradients of the visible patches' pixels, summed over the clones of each clip, in the spectrogram's layout."""
    from .layout import unpatchify

    B, C, T, n_mels = spec.shape
    P = resolutions[-1]
    L, N, K = (T // P) * (n_mels // P), *visible.shape
    flat = pixels.new_zeros(B * L, P * P * C, dtype=torch.float32)
    clip = torch.arange(N, device=spec.device) // (N // max(B, 1)) if B else visible.new_zeros(0)
    place = (clip[:, None] * L + visible).flatten()
    flat.index_add_(0, place, pixels.reshape(N * K, P * P * C).float())
    return unpatchify(flat.reshape(B, L, P * P * C), (T, n_mels), C, resolutions).to(spec.dtype)


def _embed_pixels_backward_fake(
    grad: Tensor,
    spec: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    resolutions: Sequence[int],
    eps: float,
    need_spec: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dspec = spec.new_empty(spec.shape if need_spec else 0)
    c = ln_weight.shape[0]
    dweight, dbias, dln_weight = _like(weight, bias, ln_weight)
    return dspec, dweight, dbias, dln_weight, ln_weight.new_empty(c, dtype=torch.float32)


def _embed_pixels_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    spec, visible, weight, bias, ln_weight, ln_bias, resolutions, eps = inputs
    ctx.save_for_backward(spec, visible, weight, bias, ln_weight)
    ctx.resolutions, ctx.eps, ctx.ln_bias_dtype = resolutions, eps, ln_bias.dtype


def _embed_pixels_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_spec = ctx.needs_input_grad[0]
    dspec, dweight, dbias, dln_weight, dln_bias = _stem_embed_pixels_backward(
        grad, *ctx.saved_tensors, ctx.resolutions, ctx.eps, need_spec, backend=ctx.backend
    )
    dspec = dspec if need_spec else None
    return dspec, None, dweight, dbias, dln_weight, dln_bias.to(ctx.ln_bias_dtype), None, None


_stem_embed_pixels_backward = register(
    OPERATOR,
    "stem_embed_pixels_backward(Tensor grad, Tensor spec, Tensor visible, Tensor weight, Tensor bias, "
    "Tensor ln_weight, int[] resolutions, float eps, bool need_spec, *, "
    'str backend="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    {"triton": _embed_pixels_backward_triton},
    fake=_embed_pixels_backward_fake,
)
_stem_embed_pixels = register(
    OPERATOR,
    "stem_embed_pixels(Tensor spec, Tensor visible, Tensor weight, Tensor bias, Tensor ln_weight, Tensor ln_bias, "
    'int[] resolutions, float eps, *, str backend="auto") -> Tensor',
    {"triton": _embed_pixels_triton},
    fake=_embed_pixels_fake,
    setup_context=_embed_pixels_save,
    backward=_embed_pixels_formula,
    composite=composite.embed_pixels,
)


# --- table of neighbours ---------------------------------------------------------------------------------------------


def _halo_rows_triton(visible: Tensor, places: Tensor, grid: Sequence[int], radius: int) -> Tensor:
    from .kernels.halo import halo_rows

    return halo_rows(visible, places, (grid[0], grid[1]), radius)


def _halo_rows_fake(visible: Tensor, places: Tensor, grid: Sequence[int], radius: int) -> Tensor:
    side = math.isqrt(places.shape[0]) + 2 * radius
    return places.new_empty(visible.shape[0] * visible.shape[1], side * side)


_stem_halo_rows = register(
    OPERATOR,
    'stem_halo_rows(Tensor visible, Tensor places, int[] grid, int radius, *, str backend="auto") -> Tensor',
    {"triton": _halo_rows_triton},
    fake=_halo_rows_fake,
)


# --- LayerNorm of rows -----------------------------------------------------------------------------------------------


def _layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from .kernels.rows import layer_norm

    return layer_norm(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)


def _layer_norm_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.rows import layer_norm_backward

    dx, (dweight, dbias) = layer_norm_backward(grad.contiguous(), x.contiguous(), weight.contiguous(), eps)
    # Copies: they are parts of one tensor, and an operator's results must not share memory.
    return dx, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _layer_norm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _layer_norm_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_stem_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps, backend=ctx.backend), None)


_stem_layer_norm_backward = register(
    OPERATOR,
    "stem_layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps, *, "
    'str backend="auto") -> (Tensor, Tensor, Tensor)',
    {"triton": _layer_norm_backward_triton},
    fake=lambda grad, x, weight, bias, eps: _like(x, weight, bias),
)
_stem_layer_norm = register(
    OPERATOR,
    'stem_layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, *, str backend="auto") -> Tensor',
    {"triton": _layer_norm_triton},
    fake=lambda x, weight, bias, eps: _like(x)[0],
    setup_context=_layer_norm_save,
    backward=_layer_norm_formula,
    composite=composite.layer_norm,
)


# --- conv block ------------------------------------------------------------------------------------------------------


class _BlockWeights(NamedTuple):
    """A conv block's parameters in the order of the operator's list. As the kernels take them: matrices in the
    activations' dtype; vectors and the depthwise taps as they are, the channels of a tap adjacent."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    conv1_weight: Tensor
    conv1_bias: Tensor
    taps: Tensor
    taps_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    @staticmethod
    def of(weights: Sequence[Tensor], dtype: torch.dtype) -> _BlockWeights:
        w = _BlockWeights(*(weight.contiguous() for weight in weights))
        return w._replace(
            taps=w.taps.t().contiguous().t(),
            conv1_weight=w.conv1_weight.to(dtype),
            conv2_weight=w.conv2_weight.to(dtype),
            fc1_weight=w.fc1_weight.to(dtype),
            fc2_weight=w.fc2_weight.to(dtype),
        )


def _conv_block_triton(
    x: Tensor, halo: Tensor, places: Tensor, weights: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.mlp import norm_mlp_residual

    x, w = x.contiguous(), _BlockWeights.of(weights, x.dtype)
    y, middle = _first_half(x, halo, places, w, eps)
    mlp = w.norm2_weight, w.norm2_bias, w.fc1_weight, w.fc1_bias, w.fc2_weight, w.fc2_bias
    return norm_mlp_residual(middle, *mlp, eps), *((y, middle) if keep else _nothing(x))


def _first_half(x: Tensor, halo: Tensor, places: Tensor, w: _BlockWeights, eps: float) -> tuple[Tensor, Tensor]:
    """What the depthwise convolution reads, and the block's middle: the rows after the first residual."""
    from .kernels.conv import conv_linear_residual
    from .kernels.linear import norm_linear

    y = norm_linear(x, w.norm1_weight, w.norm1_bias, w.conv1_weight, w.conv1_bias, eps)
    return y, conv_linear_residual(x, y, halo, places, w.taps, w.taps_bias, w.conv2_weight, w.conv2_bias)


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, x.shape[1]), x.new_empty(0, x.shape[1])


def _conv_block_fake(
    x: Tensor, halo: Tensor, places: Tensor, weights: Sequence[Tensor], eps: float, keep: bool
) -> tuple[Tensor, ...]:
    from .kernels.conv import middle_dtype

    if not keep:
        return *_like(x), *_nothing(x)
    return *_like(x, x), _like(x)[0].to(middle_dtype(x.dtype))


def _conv_block_backward_triton(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    middle: Tensor,
    halo: Tensor,
    places: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    keep: bool,
) -> list[Tensor]:
    from .._triton import product
    from .kernels.conv import depthwise, depthwise_backward_weight
    from .kernels.mlp import norm_mlp_backward
    from .kernels.rows import layer_norm, layer_norm_backward

    grad, x, w = grad.contiguous(), x.contiguous(), _BlockWeights.of(weights, x.dtype)
    if not keep:
        y, middle = _first_half(x, halo, places, w, eps)

    mlp = w.norm2_weight, w.norm2_bias, w.fc1_weight, w.fc1_bias, w.fc2_weight, eps
    dmiddle, *mlp_grads = norm_mlp_backward(grad, middle, *mlp)

    dc2w = product(dmiddle.t(), depthwise(y, halo, places, w.taps, w.taps_bias))
    dz = dmiddle @ w.conv2_weight
    dtaps, dtaps_bias = depthwise_backward_weight(dz, y, halo, places, round(w.taps.shape[1] ** 0.5))
    dy = depthwise(dz, halo, places, w.taps, None, transpose=True)

    dc1w, dc1b = product(dy.t(), layer_norm(x, w.norm1_weight, w.norm1_bias, eps)), dy.sum(0, dtype=torch.float32)
    dx, (dn1w, dn1b, dc2b) = layer_norm_backward(dy @ w.conv1_weight, x, w.norm1_weight, eps, dmiddle)
    grads = [dn1w, dn1b, dc1w, dc1b, dtaps, dtaps_bias, dc2w, dc2b, *mlp_grads]
    # Copies: see above.
    return [dx, *(g.to(weight.dtype, copy=True) for g, weight in zip(grads, weights, strict=True))]


def _conv_block_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, halo, places, weights, ctx.eps, ctx.keep = inputs
    _, *kept = output
    ctx.set_materialize_grads(False)  # no zeros of the size of what is kept
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, *kept, halo, places, *weights)


def _conv_block_formula(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    x, y, middle, halo, places, *weights = ctx.saved_tensors
    dx, *dweights = _stem_conv_block_backward(
        grad, x, y, middle, halo, places, weights, ctx.eps, ctx.keep, backend=ctx.backend
    )
    return dx, None, None, dweights, None, None


_stem_conv_block_backward = register(
    OPERATOR,
    "stem_conv_block_backward(Tensor grad, Tensor x, Tensor y, Tensor middle, Tensor halo, Tensor places, "
    'Tensor[] weights, float eps, bool keep, *, str backend="auto") -> Tensor[]',
    {"triton": _conv_block_backward_triton},
    fake=lambda grad, x, y, middle, halo, places, weights, eps, keep: list(_like(x, *weights)),
)
_stem_conv_block = register(
    OPERATOR,
    "stem_conv_block(Tensor x, Tensor halo, Tensor places, Tensor[] weights, float eps, bool keep, *, "
    'str backend="auto") -> (Tensor, Tensor, Tensor)',
    {"triton": _conv_block_triton},
    fake=_conv_block_fake,
    setup_context=_conv_block_save,
    backward=_conv_block_formula,
    composite=composite.conv_block,
)
