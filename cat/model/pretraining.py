"""Pre-training of the Convolutional Audio Transformer (arXiv 2601.21612), from spectrogram to losses.

Read top to bottom: objective, decoder, and `CAT`, which trains a student encoder (`cat.model.encoder`) against its own
moving average.

Shapes: B clips, M masks a clip, N = B * M clip-clones (clip b owns rows b*M .. (b+1)*M - 1), T frames, F mel bins,
P patch, H x W = T/P x F/P patches, L = H * W (patch h*W + w), K visible patches, D embedding width.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cat.model.encoder import Encoder, ModelConfig, for_products, init_linear, low_dtype
from cat.model.regularisation import Regularisation, squared_distance
from cat.parts import part
from cat_kernels import (
    EMA,
    average_targets,
    grouped_conv2d,
    layer_norm_gelu,
    masked_regression_loss,
    restore_tokens,
)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student is trained on: L = L_p + global_weight * L_g + regularisation_weight * L_r, and as many terms
    like the last one as there are other guides (`cat.model.GuideConfig`).

    ``global_loss_reduction`` "sum" is the published recipe: L_g and L_r are *sums* over the clip-clones of the batch,
    while L_p is a mean over masked tokens, so at weight 1 they grow with the batch per GPU. "mean" divides by their
    number. The fields ``regularisation_...`` are those of `Regularisation`, towards the external embeddings that
    the data set's manifest names. ``teacher_top_k``: average the last k blocks into the target, 0 means all.
    ``noise_std``: deviation of the noise that stands for masked patches in the decoder.
    """

    global_weight: float = 1.0
    regularisation_weight: float = 0.0
    regularisation_layer: int = 0
    regularisation_distance: str = "l2"
    regularisation_projection: str = "student"
    regularisation_normalise: bool = False
    regularisation_schedule: str = "constant"
    regularisation_steps: int = 0
    global_loss_reduction: str = "sum"
    teacher_top_k: int = 0
    noise_std: float = 0.01

    def __post_init__(self) -> None:
        try:
            self.regularisation  # noqa: B018
        except ValueError as error:
            raise ValueError(f"regularisation_{error}") from None
        if self.global_loss_reduction not in ("sum", "mean"):
            raise ValueError(f"global_loss_reduction={self.global_loss_reduction!r}; expected 'sum' or 'mean'")
        if self.noise_std < 0:
            raise ValueError(f"noise_std={self.noise_std}; expected a deviation, 0 or more")

    @property
    def regularisation(self) -> Regularisation:
        """The term towards the embeddings that the data set's manifest names."""
        prefix = "regularisation_"
        return Regularisation(**{f.name: getattr(self, prefix + f.name) for f in fields(Regularisation)})

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Objectives of runs that earlier versions wrote, whole, keep the distances that they were trained with."""
        old = values.get("regularisation_distance")
        if old in _EARLIER and "regularisation_projection" not in values and values.keys() >= _FIRST_FIELDS:
            values["regularisation_distance"] = _EARLIER[old]
            warnings.warn(
                f"regularisation_distance={old!r} of an earlier version is {_EARLIER[old]!r} now: {old!r} has become "
                "the released code's",
                stacklevel=2,
            )
        return values


_FIRST_FIELDS = {"global_weight", "regularisation_weight", "regularisation_layer", "teacher_top_k", "noise_std"}
_EARLIER = {"cosine": "bare_cosine", "kl": "kl_from_external"}


# --------------------------------------------------------------------------------------------------------- decoder


class Decoder(nn.Module):
    """Grouped 3x3 convolutions over the patch grid, each with LayerNorm and GELU, then a Linear back to D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backend = config.backend
        widths = [config.embed_dim] + [config.decoder_dim] * config.decoder_layers
        self.convs = nn.ModuleList(
            nn.Conv2d(
                c_in, c_out, config.decoder_kernel, padding=config.decoder_kernel // 2, groups=config.decoder_groups
            )
            for c_in, c_out in itertools.pairwise(widths)
        )
        self.proj = nn.Linear(widths[-1], config.embed_dim)
        init_linear(self.proj)

    def forward(self, grid_NHWD: Tensor) -> Tensor:
        """(N, H, W, D) tokens and noise on the patch grid -> predictions (N, H*W, D)."""
        x = low = grid_NHWD
        for conv in cast(Iterable[nn.Conv2d], self.convs):
            y = grouped_conv2d(low, conv.weight, conv.bias, groups=conv.groups, backend=self.backend)
            residual = x if x.shape == y.shape else None
            x, low = layer_norm_gelu(y, residual, eps=1e-5, low_dtype=low_dtype(y), backend=self.backend)
        return self.proj(low).flatten(1, 2)


# -------------------------------------------------------------------------------------------------------- training


# Of block outputs that wait in `CAT.targets`: the base model's at 96 clips in bf16 are 0.83 GB. Little beside what the
# student keeps for backward, which is not there yet.
WAITING_BYTES = 1 << 30


class PretrainOutput(NamedTuple):
    """Losses of one step, 0-dim float32 tensors; only ``loss`` carries a gradient."""

    loss: Tensor
    regression: Tensor  # L_p
    global_: Tensor  # L_g, not weighted
    regularisation: Tensor  # L_r, not weighted; 0 without an external embedding
    pred_std: Tensor  # deviation of predictions and targets over tokens, mean over D: collapse shows here first
    target_std: Tensor
    guides: tuple[Tensor, ...] = ()  # L_r of every other guide, not weighted, in the order of `CAT.regularisers`

    @property
    def numbers(self) -> list[Tensor]:
        """All of them."""
        return [*self[:-1], *self.guides]


class CAT(nn.Module):
    """Pre-training: a student that sees a fifth of the patches predicts what its moving average makes of the clip.

    Args:
        config: architecture.
        objective: losses and their weights.
        embedding_dim: width D_e of the external embeddings, or None without representation regularisation.
        guides: other guides, by names that `check_guide_names` lets pass, with the widths of their embeddings.
    """

    def __init__(
        self,
        config: ModelConfig,
        objective: ObjectiveConfig | None = None,
        embedding_dim: int | None = None,
        guides: Mapping[str, tuple[Regularisation, int]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or ObjectiveConfig()
        if self.objective.regularisation_weight and embedding_dim is None:
            raise ValueError(
                f"regularisation_weight={self.objective.regularisation_weight} needs external embeddings, but "
                "embedding_dim is None: give the data set embeddings (`cat-audio embed`), or set the weight to 0"
            )
        # All that L_r is made of; the one that the objective describes has no name.
        self.terms = {"": self.objective.regularisation} if self.objective.regularisation_weight else {}
        self.terms |= {name: guide for name, (guide, _) in (guides or {}).items()}
        for name, value in (
            ("regularisation_layer", self.objective.regularisation_layer),
            ("teacher_top_k", self.objective.teacher_top_k),
            *((f"guides.{name}.layer", guide.layer) for name, (guide, _) in (guides or {}).items()),
        ):
            if not 0 <= value <= config.depth:
                raise ValueError(f"{name}={value}; expected 0 to {config.depth}, the number of blocks")
        self.student = Encoder(config)
        self.decoder = Decoder(config)
        self.regulariser: nn.Linear | None = None
        if embedding_dim:
            self.regulariser = self.objective.regularisation.linear(config.embed_dim, embedding_dim)
            init_linear(self.regulariser)
        # After all else, so that a guide more leaves the other weights as they were.
        self.regularisers = nn.ModuleDict(
            {name: guide.linear(config.embed_dim, dim) for name, (guide, dim) in (guides or {}).items()}
        )
        for linear in cast(Iterable[nn.Linear], self.regularisers.values()):
            init_linear(linear)
        self.teacher = deepcopy(self.student).requires_grad_(False).eval()
        # In a tuple: no submodule, and so not in the state dict.
        self._low: tuple[Encoder, ...] = ()
        self._ema: EMA | None = None
        self.register_load_state_dict_post_hook(_round_loaded_teacher)

    def train(self, mode: bool = True) -> CAT:
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def acting_teacher(self) -> Encoder:
        """The teacher that computes: the average itself, or its copy in low precision."""
        return self._low[0] if self._low else self.teacher

    def lower_teacher(self, dtype: torch.dtype) -> None:
        """Let the teacher compute with weights that are rounded once, when they are averaged, not at every use.

        For training under autocast to ``dtype``: what that would round is kept rounded, and the results are the same.
        The average stays in float32, and so does the state dict. Call it when the model is on its device.
        """
        low: list[Any] = [module.weight for module in self.teacher.modules() if _multiplies(module)]
        low += [module.bias for module in self.teacher.blocks.modules() if isinstance(module, nn.Linear)]
        memo = {id(tensor): tensor for tensor in (*self.teacher.parameters(), *self.teacher.buffers())}
        memo |= {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in low}
        self._low, self._ema = (deepcopy(self.teacher, memo),), None

    def ema(self) -> EMA:
        """What moves the teacher after the student; made on the device where the model is when first asked for."""
        if self._ema is None:
            self.teacher.positions = self.acting_teacher.positions = self.student.positions  # the same, always
            masters = self.teacher if self._low else None
            self._ema = EMA(self.acting_teacher, self.student, masters=masters, backend=self.config.backend)
        return self._ema

    @torch.no_grad()
    def targets(self, spec: Tensor) -> Tensor:
        """Y (B, L, D) float32: the teacher's MLP outputs, instance-normalised over L, averaged, then LayerNorm."""
        teacher, depth = self.acting_teacher, self.config.depth
        x = teacher.embed(spec)
        low = for_products(x)
        used = self.objective.teacher_top_k or depth
        total: Tensor | None = None
        waiting: list[Tensor] = []
        for i, block in enumerate(teacher.blocks, start=1):
            x, low, t = block(x, low)
            if i > depth - used:
                waiting.append(t[:, 1:])
            if i == depth or len(waiting) == _averaged_at_once(used, t):
                last = used if i == depth else None
                with part("targets"):
                    total = average_targets(waiting, partial=total, num_layers=last, backend=self.config.backend)
                waiting = []
        assert total is not None  # depth >= used >= 1
        return total

    def encode(self, spec: Tensor, visible: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The student on its visible patches: last block's output (N, 1+K, D), and by their layers the CLS tokens
        (N, D) that L_r looks at."""
        with part("stem"):
            x = self.student.embed(spec, visible)
        layers = {term.layer for term in self.terms.values()}
        cls = {}
        with part("blocks"):
            low = for_products(x)
            for i, block in enumerate(self.student.blocks, start=1):
                x, low, t = block(x, low)
                if i in layers:
                    cls[i] = t[:, 0]
        return x, {0: x[:, 0], **cls}

    def decode(
        self, x: Tensor, visible: Tensor, grid: tuple[int, int], rng: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Predictions (N, L, D) from the student's output; ``noise`` (N, L-K, D) replaces what ``rng`` would draw."""
        H, W = grid
        noise_std = self.objective.noise_std if noise is None else 0.0
        tokens_NLD = restore_tokens(x[:, 1:], visible, H * W, rng, noise_std=noise_std, backend=self.config.backend)
        if noise is not None:
            masked = masked_indices(visible, H * W)[:, :, None].expand(noise.shape)
            tokens_NLD = tokens_NLD.scatter(1, masked, noise.to(tokens_NLD.dtype))
        return self.decoder(tokens_NLD.unflatten(1, (H, W)))

    def forward(
        self,
        spec: Tensor,
        visible: Tensor,
        embedding: Tensor | None = None,
        *,
        rng: Tensor,
        mask_noise: Tensor | None = None,
        guides: Mapping[str, Tensor | None] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        parts: float = 1.0,
    ) -> PretrainOutput:
        """Losses of one batch. In eval mode a term of L_r without embeddings is left out; in training it is an error.

        Args:
            spec: (B, 1, T, F) normalised log-mel spectrograms.
            visible: (B*M, K) int64, see `cat.data.masks.inverse_block_masks`.
            embedding: (B, D_e) external embedding of every clip, or None.
            rng: (2,) int64, seed and offset of the noise in the decoder.
            mask_noise: (B*M, L-K, D) noise to use in place of drawn noise, masked patches in ascending order.
            guides: the same of the other guides, by name.
            weights: of the terms that have a schedule, by name ("": the objective's), 0-dim float32.
            parts: as how many batches like this one the whole batch counts. Losses that are sums are multiplied by it,
                so that the mean over all parts of any loss, and of its gradient, is that of the whole batch.
        """
        P = self.config.patch_size
        grid = (spec.shape[2] // P, spec.shape[3] // P)
        with part("teacher"):
            target_BLD = self.targets(spec)
        x, cls = self.encode(spec, visible)
        with part("decoder"):
            prediction_NLD = self.decode(x, visible, grid, rng, mask_noise)
        with part("loss"):
            embeddings = {"": embedding, **(guides or {})}
            return self._losses(x, cls, prediction_NLD, target_BLD, visible, embeddings, weights or {}, parts)

    def _losses(
        self,
        x: Tensor,
        cls: dict[int, Tensor],
        prediction_NLD: Tensor,
        target_BLD: Tensor,
        visible: Tensor,
        embeddings: Mapping[str, Tensor | None],
        weights: Mapping[str, Tensor],
        parts: float,
    ) -> PretrainOutput:
        regression, pred_std, target_std = masked_regression_loss(
            prediction_NLD, target_BLD, visible, backend=self.config.backend
        )

        o = self.objective
        M = visible.shape[0] // max(target_BLD.shape[0], 1)

        def reduce(losses_N: Tensor) -> Tensor:
            if o.global_loss_reduction == "mean":
                return losses_N.mean()
            return losses_N.sum() if parts == 1 else losses_N.sum() * parts

        target_cls = target_BLD.mean(1).repeat_interleave(M, dim=0)
        global_ = reduce(squared_distance(x[:, 0].float(), target_cls))
        loss = regression + o.global_weight * global_
        zero = torch.zeros_like(regression)
        pulls: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            embedding = embeddings.get(name)
            if embedding is None and self.training:
                of = f"guides.{name}" if name else "this model"
                raise ValueError(f"{of} has a regularisation term, but the batch has no external embedding for it")
            if embedding is not None:
                pulls[name] = reduce(term.distances(self._linear(name), cls[term.layer], embedding, M))
                loss = loss + weights.get(name, term.weight) * pulls[name]
        shown = {name: pull.detach() for name, pull in pulls.items()}
        others = tuple(shown.get(name, zero) for name in self.regularisers)
        return PretrainOutput(
            loss, regression.detach(), global_.detach(), shown.get("", zero), pred_std, target_std, others
        )

    def _linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.regularisers[name] if name else self.regulariser)

    def update_teacher(self, decay: float | Tensor) -> None:
        """teacher = decay * teacher + (1 - decay) * student, in float32."""
        self.ema().update(decay)


def _averaged_at_once(blocks: int, t: Tensor) -> int:
    """How many blocks' outputs wait to be averaged together, so that the sum is not read and written for each: all, or
    four where they are too large to wait. By sizes alone: every rank does the same."""
    return blocks if blocks * t.numel() * t.element_size() <= WAITING_BYTES else 4


def _round_loaded_teacher(model: CAT, _: Any) -> None:
    if model._low:
        model.ema().refresh()


def _multiplies(module: nn.Module) -> bool:
    """Whether its weight is the matrix of a product: not a norm's, nor a depthwise convolution's taps."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def visible_to_mask(visible_NK: Tensor, L: int) -> Tensor:
    """(N, L) bool, True where a patch is masked."""
    mask = torch.ones(visible_NK.shape[0], L, dtype=torch.bool, device=visible_NK.device)
    return mask.scatter(1, visible_NK, False)


def masked_indices(visible_NK: Tensor, L: int) -> Tensor:
    """(N, L-K) int64: the masked patches in ascending order."""
    mask = visible_to_mask(visible_NK, L)
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : L - visible_NK.shape[1]]
