"""Representation regularisation: what the CLS token is pulled towards, and how hard.

A *guide* is a frozen encoder whose embedding of a clip the student's CLS token learns to tell. Each has a Linear of its
own in `cat.model.CAT`, a weight, a layer and a distance.

Shapes: N clip-clones, D embedding width of the model, D_e of the guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Regularisation:
    """One term L_r: a sum or mean (``objective.global_loss_reduction``) over clip-clones of a distance to a guide.

    ``layer`` d: 0 takes the CLS token of the last block, d > 0 the one that block d's MLP puts out. ``distance``: "l2"
    (the paper's s), "l1", "cosine" or "kl", see `DISTANCES`. ``projection``: "student" projects the CLS token to the
    guide's width, "external" the embedding to the model's. ``normalise`` scales embeddings to unit length first:
    encoders differ in it a hundredfold, and the distances with them. ``schedule``: the weight is "constant", rises from
    0 over ``steps`` updates ("warmup"), falls to 0 over them ("decay"), or is 0 after them ("stop").
    """

    weight: float = 1.0
    layer: int = 0
    distance: str = "l2"
    projection: str = "student"
    normalise: bool = False
    schedule: str = "constant"
    steps: int = 0

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise ValueError(f"distance={self.distance!r}; expected one of {sorted(DISTANCES)}")
        if self.projection not in ("student", "external"):
            raise ValueError(f"projection={self.projection!r}; expected 'student' or 'external'")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}; expected one of {list(SCHEDULES)}")
        if self.steps < self.scheduled:
            raise ValueError(
                f"steps={self.steps}; expected the updates that schedule={self.schedule} takes, "
                f"{int(self.scheduled)} or more"
            )

    @property
    def scheduled(self) -> bool:
        return self.schedule != "constant"

    def linear(self, embed_dim: int, dim: int) -> nn.Linear:
        """What brings the CLS token to the guide's width ``dim``, or the guide's embeddings to the model's."""
        return nn.Linear(embed_dim, dim) if self.projection == "student" else nn.Linear(dim, embed_dim)

    def distances(self, linear: nn.Linear, cls_ND: Tensor, embedding: Tensor, clones: int) -> Tensor:
        """(N,): of the CLS tokens from the embeddings (N / clones, D_e) of their clips."""
        if self.normalise:
            embedding = F.normalize(embedding.float(), dim=-1)
        told, known = (
            (linear(cls_ND), embedding)
            if self.projection == "student"
            else (cls_ND, linear(embedding.to(linear.weight.dtype)))
        )
        return DISTANCES[self.distance](told.float(), known.float().repeat_interleave(clones, dim=0))


@dataclass(frozen=True)
class GuideConfig(Regularisation):
    """A guide besides the one whose embeddings ``data.train`` names.

    Its embeddings come from one of two places. ``encoder``: an encoder as `cat.encoders.build_encoder` takes it, which
    encodes every clip, whole, whenever it is drawn. ``embeddings``: the manifest that ``cat-audio embed`` wrote of the
    same clips. ``where`` a live encoder runs: in every data "worker", on the CPU; in the training process on the run's
    "device"; "auto": there on a GPU, and by the workers of a run on the CPU.
    """

    encoder: str | None = None
    embeddings: str | None = None
    where: Literal["auto", "worker", "device"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight <= 0:
            raise ValueError(f"weight={self.weight}; expected a number above 0, or the guide left out")
        if bool(self.encoder) == bool(self.embeddings):
            raise ValueError(
                f"encoder={self.encoder!r} and embeddings={self.embeddings!r}; expected one of them: a live encoder's "
                "name, or a manifest that `cat-audio embed` wrote"
            )


def check_guide_names(names: Iterable[str]) -> None:
    """Raises: ValueError for one that a part of a model cannot have."""
    for name in names:
        if not name.isidentifier() or hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()):
            raise ValueError(f"guides.{name}: not a name for a guide; expected a word of its own, such as {name}_guide")


# schedule -> share of the weight in the update that follows ``step`` others, of ``steps``.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "warmup": lambda step, steps: min(1.0, (step + 1) / (steps + 1)),
    "decay": lambda step, steps: max(0.0, 1.0 - step / steps),
    "stop": lambda step, steps: float(step < steps),
}


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """s(a, b) = sum_d (a_d - b_d)^2 / sqrt(D), over the last dimension."""
    return (a - b).square().sum(-1) * a.shape[-1] ** -0.5


def kl_divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(softmax(a) | softmax(b)) = sum_d p_d (log p_d - log q_d), over the last dimension."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# distance of a prediction a (..., D) and an external embedding b over the last dimension, as released: all but KL are
# divided by sqrt(D).
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": squared_distance,
    "l1": lambda a, b: (a - b).abs().sum(-1) * a.shape[-1] ** -0.5,
    "cosine": lambda a, b: (1 - F.cosine_similarity(a, b, dim=-1, eps=1e-6)) * a.shape[-1] ** -0.5,
    "kl": kl_divergence,
    # Of version 0.1, for its runs to go on with.
    "bare_cosine": lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1),
    "kl_from_external": lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(-1),
}
