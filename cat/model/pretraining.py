"""Pre-training of the Convolutional Audio Transformer (arXiv 2601.21612), from spectrogram to losses.

Read top to bottom: objective, decoder, and `CAT`, which trains a student encoder (`cat.model.encoder`) against its own
moving average.

Shapes: B clips, M masks a clip, N = B * M clip-clones (clip b owns rows b*M .. (b+1)*M - 1), T frames, F mel bins,
P patch, H x W = T/P x F/P patches, L = H * W (patch h*W + w), K visible patches, D embedding width.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat.model.encoder import Encoder, ModelConfig, for_products, init_linear, low_dtype
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
    """What the student is trained on: L = L_p + global_weight * L_g + regularisation_weight * L_r.

    ``global_loss_reduction`` "sum" is the published recipe: L_g and L_r are *sums* over the clip-clones of the batch,
    while L_p is a mean over masked tokens, so at weight 1 they grow with the batch per GPU. "mean" divides by their
    number. ``regularisation_layer`` d: 0 takes the CLS token of the last block, d > 0 the one that block d's MLP puts
    out. ``regularisation_distance``: "l2" (the paper's s), "l1", "cosine" or "kl", see `DISTANCES`.
    ``regularisation_projection``: "student" projects the CLS token to the external embedding's width D_e, "external"
    the embedding to the model's. ``regularisation_normalise`` scales external embeddings to unit length first: encoders
    differ in it a hundredfold, and the distances with them. ``regularisation_schedule``: the weight is "constant",
    rises from 0 over ``regularisation_steps`` updates ("warmup"), falls to 0 over them ("decay"), or is 0 after them
    ("stop"). ``teacher_top_k``: average the last k blocks into the target, 0 means all.
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
        if self.regularisation_distance not in DISTANCES:
            raise ValueError(
                f"regularisation_distance={self.regularisation_distance!r}; expected one of {sorted(DISTANCES)}"
            )
        if self.regularisation_projection not in ("student", "external"):
            raise ValueError(
                f"regularisation_projection={self.regularisation_projection!r}; expected 'student' or 'external'"
            )
        if self.regularisation_schedule not in SCHEDULES:
            raise ValueError(
                f"regularisation_schedule={self.regularisation_schedule!r}; expected one of {list(SCHEDULES)}"
            )
        scheduled = self.regularisation_schedule != "constant"
        if self.regularisation_steps < scheduled:
            raise ValueError(
                f"regularisation_steps={self.regularisation_steps}; expected the updates that "
                f"regularisation_schedule={self.regularisation_schedule} takes, {int(scheduled)} or more"
            )
        if self.global_loss_reduction not in ("sum", "mean"):
            raise ValueError(f"global_loss_reduction={self.global_loss_reduction!r}; expected 'sum' or 'mean'")
        if self.noise_std < 0:
            raise ValueError(f"noise_std={self.noise_std}; expected a deviation, 0 or more")

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


# regularisation_schedule -> share of the weight in the update that follows ``step`` others, of ``steps``.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "warmup": lambda step, steps: min(1.0, (step + 1) / (steps + 1)),
    "decay": lambda step, steps: max(0.0, 1.0 - step / steps),
    "stop": lambda step, steps: float(step < steps),
}

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


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """s(a, b) = sum_d (a_d - b_d)^2 / sqrt(D), over the last dimension."""
    return (a - b).square().sum(-1) * a.shape[-1] ** -0.5


def kl_divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(softmax(a) | softmax(b)) = sum_d p_d (log p_d - log q_d), over the last dimension."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# regularisation_distance -> distance of a prediction a (..., D) and an external embedding b over the last dimension, as
# released: all but KL are divided by sqrt(D).
DISTANCES = {
    "l2": squared_distance,
    "l1": lambda a, b: (a - b).abs().sum(-1) * a.shape[-1] ** -0.5,
    "cosine": lambda a, b: (1 - F.cosine_similarity(a, b, dim=-1, eps=1e-6)) * a.shape[-1] ** -0.5,
    "kl": kl_divergence,
    # Of version 0.1, for its runs to go on with.
    "bare_cosine": lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1),
    "kl_from_external": lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(-1),
}


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


class CAT(nn.Module):
    """Pre-training: a student that sees a fifth of the patches predicts what its moving average makes of the clip.

    Args:
        config: architecture.
        objective: losses and their weights.
        embedding_dim: width D_e of the external embeddings, or None without representation regularisation.
    """

    def __init__(
        self, config: ModelConfig, objective: ObjectiveConfig | None = None, embedding_dim: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or ObjectiveConfig()
        if self.objective.regularisation_weight and embedding_dim is None:
            raise ValueError(
                f"regularisation_weight={self.objective.regularisation_weight} needs external embeddings, but "
                "embedding_dim is None: give the data set embeddings (`cat-audio embed`), or set the weight to 0"
            )
        for name, value in (
            ("regularisation_layer", self.objective.regularisation_layer),
            ("teacher_top_k", self.objective.teacher_top_k),
        ):
            if not 0 <= value <= config.depth:
                raise ValueError(f"{name}={value}; expected 0 to {config.depth}, the number of blocks")
        self.student = Encoder(config)
        self.decoder = Decoder(config)
        self.regulariser: nn.Linear | None = None
        if embedding_dim:
            widths = (config.embed_dim, embedding_dim)
            self.regulariser = nn.Linear(*(widths if self._projects_student else widths[::-1]))
            init_linear(self.regulariser)
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
    def _projects_student(self) -> bool:
        return self.objective.regularisation_projection == "student"

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

    def encode(self, spec: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """The student on its visible patches: last block's output (N, 1+K, D), and the CLS (N, D) that L_r looks at."""
        with part("stem"):
            x = self.student.embed(spec, visible)
        cls = None
        with part("blocks"):
            low = for_products(x)
            for i, block in enumerate(self.student.blocks, start=1):
                x, low, t = block(x, low)
                if i == self.objective.regularisation_layer:
                    cls = t[:, 0]
        return x, x[:, 0] if cls is None else cls

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
        regularisation_weight: Tensor | None = None,
    ) -> PretrainOutput:
        """Losses of one batch.

        Args:
            spec: (B, 1, T, F) normalised log-mel spectrograms.
            visible: (B*M, K) int64, see `cat.data.masks.inverse_block_masks`.
            embedding: (B, D_e) external embedding of every clip, or None.
            rng: (2,) int64, seed and offset of the noise in the decoder.
            mask_noise: (B*M, L-K, D) noise to use in place of drawn noise, masked patches in ascending order.
            regularisation_weight: 0-dim float32 in place of the objective's, where a schedule moves it.
        """
        P = self.config.patch_size
        grid = (spec.shape[2] // P, spec.shape[3] // P)
        with part("teacher"):
            target_BLD = self.targets(spec)
        x, cls = self.encode(spec, visible)
        with part("decoder"):
            prediction_NLD = self.decode(x, visible, grid, rng, mask_noise)
        with part("loss"):
            return self._losses(x, cls, prediction_NLD, target_BLD, visible, embedding, regularisation_weight)

    def _losses(
        self,
        x: Tensor,
        cls: Tensor,
        prediction_NLD: Tensor,
        target_BLD: Tensor,
        visible: Tensor,
        embedding: Tensor | None,
        weight: Tensor | None,
    ) -> PretrainOutput:
        regression, pred_std, target_std = masked_regression_loss(
            prediction_NLD, target_BLD, visible, backend=self.config.backend
        )

        o = self.objective
        M = visible.shape[0] // max(target_BLD.shape[0], 1)
        reduce = torch.sum if o.global_loss_reduction == "sum" else torch.mean
        target_cls = target_BLD.mean(1).repeat_interleave(M, dim=0)
        global_ = reduce(squared_distance(x[:, 0].float(), target_cls))
        loss = regression + o.global_weight * global_
        regularisation = torch.zeros_like(regression)
        if self.regulariser is not None and o.regularisation_weight:
            if embedding is None:
                raise ValueError("this model has a regularisation term, but the batch has no external embedding")
            if o.regularisation_normalise:
                embedding = F.normalize(embedding.float(), dim=-1)
            cls, external = (
                (self.regulariser(cls), embedding)
                if self._projects_student
                else (cls, self.regulariser(embedding.to(self.regulariser.weight.dtype)))
            )
            distance = DISTANCES[o.regularisation_distance]
            regularisation = reduce(distance(cls.float(), external.float().repeat_interleave(M, dim=0)))
            loss = loss + (o.regularisation_weight if weight is None else weight) * regularisation

        return PretrainOutput(
            loss, regression.detach(), global_.detach(), regularisation.detach(), pred_std, target_std
        )

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
