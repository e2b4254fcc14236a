"""`MultiResConv`: the multi-resolution convolution stem of the Convolutional Audio Transformer, as a module."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import _checks as check
from ..backends import OPERATORS, BackendError, resolve
from .fused import compute_dtype, multires_conv_triton, why_not_fused
from .reference import multires_conv_dense
from .visible import multires_conv_visible
from .weights import StemWeights
from .whole import multires_conv_whole

OPERATOR = "MultiResConv"


class MultiResConv(StemWeights):
    """Multi-resolution convolution stem: spectrogram -> one token per patch (arXiv 2601.21612).

    Args:
        resolutions: pixels per position r_0 < ... < r_{n-1} at every stage, each a multiple of the one before; the last
            one is the patch size P.
        channels: width of every stage but the last (n - 1 of them); the last stage has ``embed_dim``.
        embed_dim: token width D.
        in_chans: input channels.
        depth: conv blocks per stage (the last stage has none).
        mlp_ratio: hidden width of a block's MLP over its width.
        kernel_size: depthwise kernel, odd.
        backend: "visible" computes visible patches only (exact); "triton" does so in fused kernels (CUDA tensors;
            widths that are multiples of 16; float32, bfloat16 or float16); "dense" is the formula over all positions of
            all clones (the oracle); "auto" takes "triton" where it can run and "visible" elsewhere. State dicts are the
            same for every backend.
        recompute: keep less for the backward and compute it again ("triton" only): of every conv block the input, not
            the rows in front of the depthwise convolution and of the MLP.
    """

    def __init__(
        self,
        resolutions: tuple[int, ...] = (4, 8, 16),
        channels: tuple[int, ...] = (256, 384),
        embed_dim: int = 768,
        in_chans: int = 1,
        depth: int = 2,
        mlp_ratio: float = 4.0,
        kernel_size: int = 5,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        resolutions, channels = tuple(resolutions), tuple(channels)
        _check_settings(resolutions, channels, kernel_size, backend)
        super().__init__(resolutions, channels, embed_dim, in_chans, depth, mlp_ratio, kernel_size)
        self.backend = backend
        self.recompute = recompute

    def forward(self, spec: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens of all patches, or of the visible ones.

        Args:
            spec: (B, in_chans, T, F) spectrogram, floating point; T and F multiples of the patch size P.
            visible: (B*M, K) int64 patch indices h*W + w (W = F/P), distinct within a row, in any order; clip b owns
                rows b*M .. (b+1)*M - 1. None: every patch is visible, in order.

        Returns:
            (B, L, D) with L = T/P * F/P, or (B*M, K, D): row k of a clone is the token of its k-th visible patch.

        Raises:
            ValueError: shapes that do not fit (T or F no multiple of P, rows of ``visible`` no multiple of B, ...).
            TypeError: ``visible`` is not int64, ``spec`` is not floating point.
            IndexError: a patch index outside 0 .. L-1 (on the CPU; looking at the values would make a GPU wait).
        """
        self._check_input(spec, visible)
        backend = self._backend(spec)
        if backend == "triton":
            return multires_conv_triton(self, spec, visible, recompute=self.recompute)
        if backend == "dense":
            return multires_conv_dense(self, spec, visible)
        if visible is None and torch.compiler.is_exporting():
            visible = self._all_patches(spec)  # a grid of a single clip would fix the batch: its strides are others
        return multires_conv_whole(self, spec) if visible is None else multires_conv_visible(self, spec, visible)

    def _all_patches(self, spec: Tensor) -> Tensor:
        B, _, T, n_mels = spec.shape
        L = (T // self.patch_size) * (n_mels // self.patch_size)
        return torch.arange(L, device=spec.device).expand(B, L)

    def _backend(self, spec: Tensor) -> str:
        backend = resolve(OPERATOR, self.backend, spec.device.type)
        reason = why_not_fused(self, compute_dtype(spec)) if backend == "triton" else None
        if reason is None:
            return backend
        if self.backend == "auto":
            return "visible"
        raise BackendError(f"backend='triton' cannot run {OPERATOR}: {reason}; use backend='visible' or 'auto'")

    def _check_input(self, spec: Tensor, visible: Tensor | None) -> None:
        check.check_tensor(OPERATOR, "spec", spec, "(B, in_chans, T, F)")
        check.check_size(OPERATOR, "spec", 1, spec, self.in_chans, "in_chans")
        P, (B, _, T, n_mels) = self.patch_size, spec.shape
        if T == 0 or n_mels == 0 or T % P or n_mels % P:
            raise ValueError(
                f"{OPERATOR}: spec has T={T} frames and F={n_mels} mel bins; both must be positive multiples of the "
                f"patch size {P}: pad or crop it"
            )
        if visible is None:
            return
        check.check_visible(OPERATOR, visible, "spec", spec)
        check.check_clones(OPERATOR, "visible", visible.shape[0], "spec", B)
        L = (T // P) * (n_mels // P)
        if not 1 <= visible.shape[1] <= L:
            raise ValueError(
                f"{OPERATOR}: visible lists {visible.shape[1]} patches a row; expected 1 to {L}, the patches of a "
                f"{T} x {n_mels} spec"
            )
        if not torch.compiler.is_compiling():
            check.check_visible_values(OPERATOR, visible, L, distinct=True)

    def extra_repr(self) -> str:
        return (
            f"resolutions={self.resolutions}, channels={self.channels}, embed_dim={self.embed_dim}, "
            f"backend={self.backend!r}"
        )


def _check_settings(resolutions: tuple[int, ...], channels: tuple[int, ...], kernel_size: int, backend: str) -> None:
    if not resolutions or any(r < 1 for r in resolutions):
        raise ValueError(f"resolutions={resolutions}; expected one or more positive integers, e.g. (4, 8, 16)")
    for fine, coarse in itertools.pairwise(resolutions):
        if coarse <= fine or coarse % fine:
            raise ValueError(
                f"resolutions={resolutions}: {coarse} is not a larger multiple of {fine}; expected e.g. (4, 8, 16)"
            )
    if len(channels) != len(resolutions) - 1:
        raise ValueError(
            f"channels={channels} names {len(channels)} widths for resolutions={resolutions}; expected "
            f"{len(resolutions) - 1}, one for every resolution but the last, which has embed_dim"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}; expected a positive odd number, e.g. 5")
    if backend != "auto" and backend not in OPERATORS[OPERATOR]:
        raise ValueError(f"backend={backend!r}; expected 'auto', 'triton', 'visible' or 'dense'")
