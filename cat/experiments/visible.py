"""Does computing visible patches alone change anything?

Shapes: M masks of one clip, T frames, F mel bins, P patch, L patches, K visible ones, D width, p x p positions a patch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat.config import ConfigError
from cat.data import load_manifest, pretrain_batches
from cat.experiments.verdict import Verdict
from cat.figures import visible_grid, write_halo, write_reach
from cat.model import ModelConfig
from cat.training.flops import flops
from cat.training.recipe import PretrainConfig
from cat_kernels import MultiResConv
from cat_kernels.stem.layout import halo_rows, strides

LIMIT = 1e-12  # of the largest value; both sides compute in float64
SPECTROGRAM = "gradient of the spectrogram"


def visible(config: PretrainConfig, out: Path) -> Verdict:
    """The stem on one clip with its masks, over all positions of all clones and over the visible patches alone.

    In float64, with random weights, and by the formula itself what visible tokens depend on: their gradient towards the
    spectrogram, and their change when every masked pixel is replaced by noise. Draws ``figures/reach.png``, that
    gradient, and ``figures/halo.png``, what a patch's depthwise convolutions read, and what is computed a clip.
    """
    model, P = config.model, config.model.patch_size
    if model.stem != "multires":
        raise ConfigError(
            f"model.stem is {model.stem!r}; expected 'multires': a plain patch embedding has no neighbours"
        )
    title, spec_11TF, visible_MK = _clip(config)
    (T, F), (M, K) = spec_11TF.shape[2:], visible_MK.shape
    stems = {name: _stem(model, config.run.seed, name) for name in ("dense", "visible")}
    noise = torch.Generator().manual_seed(config.run.seed)
    incoming_MKD = torch.randn(M, K, model.embed_dim, generator=noise, dtype=torch.float64)
    dense, ours = (_passes(stem, spec_11TF, visible_MK, incoming_MKD) for stem in stems.values())
    rows = {what: _difference(dense[what], ours[what]) for what in dense}

    one_1K = visible_MK[:1]
    inside_TF = torch.from_numpy(visible_grid(one_1K[0].numpy(), T, F, P))
    noisy = torch.where(inside_TF, spec_11TF, torch.randn(spec_11TF.shape, generator=noise, dtype=spec_11TF.dtype))
    with torch.no_grad():
        before, after = (stems["dense"](spec, one_1K) for spec in (spec_11TF, noisy))
    rows["tokens, when every masked pixel is noise"] = _difference([before], [after])
    reach_TF = _passes(stems["dense"], spec_11TF, one_1K, incoming_MKD[:1])[SPECTROGRAM][0][0, 0].abs()
    outside, inside = (int((reach_TF[where] != 0).sum()) for where in (~inside_TF, inside_TF))

    positions = _positions(model, M, K, T * F)
    work = {name: _multiply_adds(stem, spec_11TF, visible_MK) for name, stem in stems.items()}
    pixels = (spec_11TF[0, 0].numpy(), one_1K[0].numpy(), reach_TF.numpy())
    shift = config.features.frame_shift_ms
    write_reach(out / "figures" / "reach.png", *pixels, patch_size=P, frame_shift_ms=shift, title=title)
    write_halo(out / "figures" / "halo.png", _halos(model, one_1K, (T, F)), positions, work)
    seen = f"{M} masks, {K} of {T * F // P**2} patches visible, float64"
    reached = f"{inside} of the {int(inside_TF.sum())} pixels in visible patches have a gradient"
    return _verdict(rows, outside, f"{seen}; {reached}", positions, work)


def _verdict(
    rows: dict[str, tuple[float, float]],
    outside: int,
    seen: str,
    positions: dict[int, tuple[int, int]],
    work: dict[str, int],
) -> Verdict:
    worst = max(largest / scale for largest, scale in rows.values())
    return Verdict(
        passed=worst <= LIMIT and outside == 0,
        text=f"visible patches alone give the dense formula's tokens and gradients to {worst:.1e} of the largest value "
        f"(needed: {LIMIT:g}); {outside} masked pixels reach a visible token (needed: 0)",
        columns=("", "largest difference", "largest value"),
        rows=[(what, f"{largest:.2e}", f"{scale:.2e}") for what, (largest, scale) in rows.items()],
        notes=[
            seen,
            *(
                f"positions of {r} x {r} pixels: {every:,} on all clones, {few:,} in visible patches"
                for r, (every, few) in positions.items()
            ),
            f"multiply-adds, forward: {work['dense'] / 1e9:.3g} G and {work['visible'] / 1e9:.3g} G, "
            f"{work['dense'] / work['visible']:.2f} times fewer",
        ],
        values={"rows": rows, "outside": outside, "positions": positions, "multiply_adds": work},
    )


def _clip(config: PretrainConfig) -> tuple[str, Tensor, Tensor]:
    """Of the run's first clip: its title, the spectrogram (1, 1, T, F) in float64, the visible patches (M, K)."""
    batches = pretrain_batches(config.data, config.features, config.masks, patch_size=config.model.patch_size,
                               seed=config.run.seed, start_step=0, num_steps=1)  # fmt: skip
    batch = next(iter(batches)).with_features(config.features)
    assert batch.spec is not None  # nor in any other pre-training batch
    assert batch.visible is not None
    clip = load_manifest(config.data.train).clips[int(batch.clips[0])]
    title = f"{Path(clip.path).name}" + (f" ({', '.join(clip.labels)})" if clip.labels else "")
    return title, batch.spec[:1].double(), batch.visible[: config.masks.num_masks]


def _stem(model: ModelConfig, seed: int, backend: str) -> MultiResConv:
    """With random weights, biases and norms too: nothing shall agree because it is zero."""
    generator = torch.Generator().manual_seed(seed)
    stem = MultiResConv(model.resolutions, model.channels, model.embed_dim, backend=backend).double()
    with torch.no_grad():
        for p in stem.parameters():
            width = p[0].numel() if p.ndim > 1 else 25
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * width**-0.5)
    return stem


def _passes(stem: MultiResConv, spec: Tensor, visible_MK: Tensor, incoming: Tensor) -> dict[str, list[Tensor]]:
    spec = spec.clone().requires_grad_()
    tokens = stem(spec, visible_MK)
    grads = torch.autograd.grad(tokens, [spec, *stem.parameters()], incoming)
    return {"tokens": [tokens.detach()], SPECTROGRAM: [grads[0]], "gradient of the weights": list(grads[1:])}


def _multiply_adds(stem: MultiResConv, spec: Tensor, visible_MK: Tensor) -> int:
    """Of a forward."""
    spec, visible_MK, there = spec.to("meta"), visible_MK.to("meta"), copy.deepcopy(stem).to("meta")
    return flops(lambda: there(spec, visible_MK)) // 2


def _difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference, and the largest value."""
    pairs = list(zip(expected, got, strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs)


def _positions(model: ModelConfig, M: int, K: int, pixels: int) -> dict[int, tuple[int, int]]:
    """Pixels a side of a position -> how many of them are computed: on all clones, in visible patches."""
    return {r: (M * pixels // r**2, M * K * (model.patch_size // r) ** 2) for r in model.resolutions}


def _halos(model: ModelConfig, visible_1K: Tensor, size: Sequence[int]) -> dict[int, Any]:
    """Pixels a side of a position -> what the 5 x 5 taps of one patch's positions read there, (side, side): 2 the patch
    itself, 1 a visible neighbour, 0 zeros in place of a masked position or of what lies beyond the border. Of all
    patches the one with the most even neighbourhood; from the table that the stem itself reads by."""
    P, radius = model.patch_size, 2
    grid = (size[0] // P, size[1] // P)
    found, chosen = {}, 0
    for i, r in enumerate(model.resolutions[:-1]):
        S = (P // r) ** 2
        rows = halo_rows(visible_1K, grid, strides(model.resolutions)[:i:-1], radius)
        nothing = visible_1K.numel() * S
        own = rows // S == torch.arange(len(rows))[:, None]
        kinds = own.int() + (rows != nothing).int()
        if i == 0:
            share = (kinds == 1).sum(1) / (kinds != 2).sum(1)
            chosen = int((share - 0.5).abs().argmin())
        side = P // r + 2 * radius
        found[r] = kinds[chosen].reshape(side, side).numpy()
    return found
