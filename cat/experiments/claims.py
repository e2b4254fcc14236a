"""The paper's claims as studies: what each asks and trains.

``convergence``   does a guide save steps, and does it have to be one that knows the domain?
``distillation``  does the student only copy its guide? Does it need it to the end?
``resolutions``   which resolutions, at equal steps, at equal time, at equal parameters?
``layer``         the block whose CLS token is regularised
``cost``          how much the regularisation weighs
``distance``      l2, l1, cosine, kl
``masks``         masks a clip, and how much they hide
``length``        what a quarter and a half of the updates are worth
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cat.experiments.readings import (
    NONE,
    Record,
    read_convergence,
    read_distillation,
    read_ends,
    read_length,
    read_resolutions,
)
from cat.experiments.study import COST, Arm, evenly
from cat.experiments.verdict import Verdict
from cat.model import ModelConfig
from cat.model.encoder import Encoder
from cat.training.recipe import PretrainConfig


@dataclass(frozen=True)
class Claim:
    """`arms` of the guides' names and the recipe; `read` makes the verdict of what was found.

    ``probes``: after which shares of its updates a run is probed. ``guided``: it needs a guide. ``curves``: the figure
    shows scores against steps, else those of the end.
    """

    arms: Callable[[Sequence[str], PretrainConfig], Iterator[Arm]]
    read: Callable[[Record], Verdict]
    probes: tuple[float, ...] = (1.0,)
    guided: bool = True
    curves: bool = False
    recipe: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def _convergence(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    yield Arm(NONE)
    for guide in guides:
        yield Arm(guide, guide=guide)


def _distillation(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    half = recipe.optim.steps // 2
    yield Arm(NONE)
    for guide in guides:
        yield Arm(guide, guide=guide)
    stopped = ("objective.regularisation_schedule=stop", f"objective.regularisation_steps={half}")
    yield Arm(f"{guides[0]}, first half", stopped, guide=guides[0])


def _resolutions(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    """Each stem with the recipe's blocks, and with wider ones that bring it to the largest's parameters.

    The paper has {4,8,16,32} lose for the length of its sequence, a quarter of the others'. Two arms take that apart:
    {4,8,32} has the short sequence without the fourth resolution; with four times the frames of the same sound
    {4,8,16,32} has the others' length. (To keep the others' stride, patches would overlap, and what is hidden in one
    would be seen in the next.)
    """
    model = recipe.model
    c0, c1, width = *model.channels, model.embed_dim
    stems: dict[tuple[int, ...], tuple[int, ...]] = {
        (4,): (), (8,): (), (16,): (), (4, 8): (c1,), (4, 16): (c1,), (8, 16): (c1,), (4, 8, 16): (c0, c1),
        (2, 4, 8, 16): (c0, c1, width), (4, 8, 16, 32): (c0, c1, width),
    }  # fmt: skip
    models = [dataclasses.replace(model, resolutions=r, channels=channels) for r, channels in stems.items()]
    largest = max(map(_parameters, models))
    for stem in models:
        name = "{" + ",".join(map(str, stem.resolutions)) + "}"
        changes = (f"model.resolutions={list(stem.resolutions)}", f"model.channels={list(stem.channels)}")
        yield Arm(name, changes)
        if ratio := _ratio_for(largest, stem):
            yield Arm(f"{name}, equal parameters", (*changes, f"model.mlp_ratio={ratio!r}"))
    four = (f"model.resolutions={list(models[-1].resolutions)}", f"model.channels={list(models[-1].channels)}")
    shift, frames = recipe.features.frame_shift_ms / 4, recipe.features.frames * 4
    yield Arm("{4,8,16,32}, long sequence", (*four, f"features.frame_shift_ms={shift}", f"features.frames={frames}"))
    yield Arm("{4,8,32}", ("model.resolutions=[4,8,32]", f"model.channels={list(model.channels)}"))


def _ratio_for(parameters: int, model: ModelConfig) -> float | None:
    """The mlp_ratio that brings an encoder to so many parameters, to a hidden unit in each block; None where it has
    them."""
    # hidden units cost 2 D + 1 parameters in each block
    more = round((parameters - _parameters(model)) / (model.depth * (2 * model.embed_dim + 1)))
    return (model.embed_dim * model.mlp_ratio + more) / model.embed_dim if more else None


def _parameters(model: ModelConfig) -> int:
    return sum(p.numel() for p in Encoder(model).parameters())


def _layer(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    for layer in (*range(1, recipe.model.depth + 1), 0):
        name = f"block {layer}" if layer else "output"
        yield Arm(name, (f"objective.regularisation_layer={layer}",), guide=guides[0])


def _cost(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    yield Arm(NONE)
    for cost in (0.5, COST, 15.0, 50.0):
        yield Arm(f"cost {cost:g}", guide=guides[0], cost=cost)
    yield Arm("sums", ("objective.global_loss_reduction=sum",), guide=guides[0])


def _distance(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    for distance in ("l2", "l1", "cosine", "kl"):
        yield Arm(distance, (f"objective.regularisation_distance={distance}",), guide=guides[0])
    yield Arm("l2, guide projected", ("objective.regularisation_projection=external",), guide=guides[0])


def _masks(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    masks = recipe.masks
    for number in (1, 2, 4, 8):
        yield Arm(f"{number} mask{'s' * (number > 1)}", (f"masks.num_masks={number}",))
    for ratio in (0.5, 0.65, 0.9):
        yield Arm(f"{masks.num_masks} masks, {100 * ratio:g} % hidden", (f"masks.ratio={ratio}",))


def _length(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    """Whole runs, each with schedules of its own."""
    for steps in (recipe.optim.steps // 4, recipe.optim.steps // 2, recipe.optim.steps):
        yield Arm(f"{steps} updates", (f"optim.steps={steps}", f"ema.steps={steps}"))


# A guide shows by then: after 250 updates in the nearest neighbours of the CLS token, after 500 in its linear probe.
SHORT: Mapping[str, Mapping[str, Any]] = {"optim": {"warmup_steps": 50, "steps": 400}, "ema": {"steps": 400}}
# 12 patches of 32 x 32 and 768 of 4 x 4, which take most of the study's time even so; one mask, as good as four here
# (docs/evidence/masks.md).
SMALLER: Mapping[str, Mapping[str, Any]] = {
    **SHORT,
    "features": {"frames": 192, "mel_bins": 64},
    "model": {"mel_bins": 64},
    "masks": {"num_masks": 1},
    "data": {"batch_size": 8},
}
# That of recipes/quickstart.yaml.
BRIEF: Mapping[str, Mapping[str, Any]] = {
    "data": {"batch_size": 8},
    "optim": {"lr": 2e-3, "warmup_steps": 25, "steps": 800},
    "ema": {"steps": 800},
}
CLAIMS: dict[str, Claim] = {
    "convergence": Claim(_convergence, read_convergence, probes=evenly(6), curves=True),
    "distillation": Claim(_distillation, read_distillation, probes=evenly(6), curves=True),
    # Early, so that what takes up to four times as long as the fastest arm has a score at equal time.
    "resolutions": Claim(_resolutions, read_resolutions, probes=(0.25, 1.0), guided=False, recipe=SMALLER),
    "layer": Claim(_layer, read_ends, recipe=SHORT),
    "cost": Claim(_cost, read_ends, recipe=SHORT),
    "distance": Claim(_distance, read_ends, recipe=SHORT),
    "masks": Claim(_masks, read_ends, guided=False, recipe=SHORT),
    "length": Claim(_length, read_length, probes=evenly(4), guided=False, curves=True, recipe=BRIEF),
}
