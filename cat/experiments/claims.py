"""The paper's claims as studies: what each trains, what it asks, and how its numbers are read.

``convergence``   does a guide save steps, and does it have to be one that knows the domain?
``distillation``  does the student only copy its guide? Does it need it to the end?
``resolutions``   which resolutions, at equal steps, at equal time, at equal parameters?
``layer``         the block whose CLS token is regularised
``cost``          how much the regularisation weighs
``distance``      l2, l1, cosine, kl
``masks``         masks a clip, and how much they hide
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cat.experiments.study import COST, Arm
from cat.experiments.verdict import Verdict
from cat.model import ModelConfig
from cat.model.encoder import Encoder
from cat.training.recipe import PretrainConfig

Record = Mapping[str, Any]  # what `run_study` returns
SHOWN = ("linear mean", "linear cls", "knn mean")  # probes in tables
MAIN = SHOWN[0]
NONE = "none"  # the arm without a guide


@dataclass(frozen=True)
class Claim:
    """`arms` of the guides' names and the recipe; `read` makes the verdict of what was found.

    ``probes``: how often a run is probed. ``guided``: it needs a guide. ``curves``: the figure shows scores against
    steps, else those of the end.
    """

    arms: Callable[[Sequence[str], PretrainConfig], Iterator[Arm]]
    read: Callable[[Record], Verdict]
    probes: int = 1
    guided: bool = True
    curves: bool = False
    recipe: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


# ---------------------------------------------------------------- what is trained


def _convergence(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    yield Arm(NONE)
    for guide in guides:
        yield Arm(guide, guide=guide)


def _distillation(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    half = recipe.optim.steps // 2
    yield Arm(NONE)
    for guide in guides[:1]:
        yield Arm(guide, guide=guide)
        for schedule, steps, words in (("stop", half, "first half"), ("decay", recipe.optim.steps, "falling to 0")):
            changes = (f"objective.regularisation_schedule={schedule}", f"objective.regularisation_steps={steps}")
            yield Arm(f"{guide}, {words}", changes, guide=guide)


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
    for cost in (0.5, 1.5, COST, 15.0, 50.0):
        yield Arm(f"cost {cost:g}", guide=guides[0], cost=cost)
    yield Arm("sums", ("objective.global_loss_reduction=sum",), guide=guides[0])


def _distance(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    for distance in ("l2", "l1", "cosine", "kl"):
        yield Arm(distance, (f"objective.regularisation_distance={distance}",), guide=guides[0])
    yield Arm("l2, guide projected", ("objective.regularisation_projection=external",), guide=guides[0])


def _masks(guides: Sequence[str], recipe: PretrainConfig) -> Iterator[Arm]:
    masks = recipe.masks
    for number in (1, 2, 4, 8):
        yield Arm(f"{number} masks", (f"masks.num_masks={number}",))
    for ratio in (0.5, 0.65, 0.9):
        yield Arm(f"{masks.num_masks} masks, {100 * ratio:g} % hidden", (f"masks.ratio={ratio}",))


# ---------------------------------------------------------------- how numbers are read


def ends(record: Record, arm: str, task: str, probe: str = MAIN) -> list[float]:
    """Test scores, a seed each."""
    return [run["rows"][-1]["test"][task][probe] for run in record["arms"][arm]["runs"]]


def curve(run: Mapping[str, Any], task: str, probe: str = MAIN) -> tuple[list[float], list[float], list[float]]:
    """Steps, seconds of training, valid scores."""
    rows = run["rows"]
    return [r["step"] for r in rows], [r["seconds"] for r in rows], [r["valid"][task][probe] for r in rows]


def reached(at: Sequence[float], scores: Sequence[float], level: float) -> float | None:
    """Where a curve, straight between its points, first has the score; None where it never does. Before its first
    point it is taken to be there."""
    if scores[0] >= level:
        return at[0]
    for i in range(1, len(at)):
        if scores[i] >= level:
            return at[i - 1] + (at[i] - at[i - 1]) * (level - scores[i - 1]) / (scores[i] - scores[i - 1])
    return None


def percent(scores: Sequence[float]) -> str:
    """Mean and deviation over seeds."""
    spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{100 * statistics.mean(scores):.1f}{spread}"


def _table(
    record: Record, extra: Mapping[str, Callable[[str], str]] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: an arm's test scores, then the bounds'."""
    extra = extra or {}
    tasks = list(record["tasks"])
    header = ["", *(f"{task}, {probe}" for task in tasks for probe in SHOWN), *extra]
    rows = [
        [
            arm,
            *(percent(ends(record, arm, task, p)) for task in tasks for p in SHOWN),
            *(of(arm) for of in extra.values()),
        ]
        for arm in record["arms"]
    ]
    for name, both in record["bounds"].items():
        scores = both["test"]
        cells = [
            scores[t].get(p, scores[t].get(p.split()[0]) if p.endswith("mean") else None) for t in tasks for p in SHOWN
        ]
        rows.append([name, *("" if c is None else f"{100 * c:.1f}" for c in cells), *([""] * len(extra))])
    return header, rows


def _notes(record: Record) -> list[str]:
    seeds = len(next(iter(record["arms"].values()))["runs"])
    return [
        f"test split, %: linear probe of the mean of the patches and of the CLS token, kNN of the mean; mean and "
        f"deviation of {seeds} seeds"
    ]


def _means(record: Record, arm: str) -> dict[str, float]:
    return {task: statistics.mean(ends(record, arm, task)) for task in record["tasks"]}


def _in_words(record: Record, arm: str, other: str) -> str:
    """By how much an arm is ahead of another, task by task, and how sure that is."""
    parts = []
    for task in record["tasks"]:
        a, b = ends(record, arm, task), ends(record, other, task)
        gap = statistics.mean(a) - statistics.mean(b)
        sure = ""
        if len(a) > 1 and len(b) > 1:
            error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
            sure = f" ± {100 * error:.1f}"
        parts.append(f"{task} {100 * gap:+.1f}{sure}")
    return f"{arm} against {other}: {', '.join(parts)} points"


def _read_convergence(record: Record) -> Verdict:
    """Steps to the valid score that training without a guide ends at, as a ratio."""
    tasks = list(record["tasks"])

    def level(task: str) -> float:
        return statistics.mean(curve(run, task)[2][-1] for run in record["arms"][NONE]["runs"])

    def faster(arm: str, task: str) -> str:
        found = [reached(*_steps_and_scores(run, task), level(task)) for run in record["arms"][arm]["runs"]]
        known = [record["steps"][-1] / steps for steps in found if steps]
        if len(known) < len(found):
            return f"{len(known)} of {len(found)} get there"
        return f"{statistics.mean(known):.1f}x" + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")

    extra = {f"{task}, fewer steps": (lambda arm, task=task: faster(arm, task)) for task in tasks}
    header, rows = _table(record, extra)
    guided = [arm for arm in record["arms"] if arm != NONE]
    words = ". ".join(_in_words(record, arm, NONE) for arm in guided)
    notes = [*_notes(record), f"fewer steps: to the valid score at which {NONE} ends; the paper says 5x on AudioSet"]
    ahead = _means(record, guided[0]).values(), _means(record, NONE).values()
    return Verdict(sum(ahead[0]) > sum(ahead[1]), f"{words}.", header, rows, notes)


def _steps_and_scores(run: Mapping[str, Any], task: str) -> tuple[list[float], list[float]]:
    steps, _, scores = curve(run, task)
    return steps, scores


def _read_distillation(record: Record) -> Verdict:
    header, rows = _table(record)
    guide = next(arm["guide"] for arm in record["arms"].values() if arm["guide"])
    own = {task: record["bounds"][guide]["test"][task]["linear"] for task in record["tasks"]}
    student = _means(record, guide)
    beaten = [task for task in own if student[task] > own[task]]
    text = f"the student beats its guide on {', '.join(beaten) or 'no task'}"
    text += "".join(f"; {task} {100 * student[task]:.1f} against {100 * own[task]:.1f}" for task in own)
    others = [arm for arm in record["arms"] if arm.startswith(f"{guide},")]
    text += ". " + ". ".join(_in_words(record, arm, guide) for arm in others)
    return Verdict(True, f"{text}.", header, rows, _notes(record))


def _read_resolutions(record: Record) -> Verdict:
    tasks = list(record["tasks"])
    least = min(run["rows"][-1]["seconds"] for arm in record["arms"].values() for run in arm["runs"])

    def at_time(arm: str, task: str) -> str:
        found = [_interpolated(*curve(run, task)[1:], least) for run in record["arms"][arm]["runs"]]
        known = [score for score in found if score is not None]
        return percent(known) if len(known) == len(found) else "not probed by then"

    def seconds(arm: str) -> str:
        return f"{statistics.median(run['rows'][-1]['seconds'] for run in record['arms'][arm]['runs']):.0f}"

    extra: dict[str, Callable[[str], str]] = {
        "parameters": lambda arm: f"{record['arms'][arm]['parameters'] / 1e6:.2f} M",
        "seconds": seconds,
    }
    extra |= {f"{task}, valid, at equal time": (lambda arm, task=task: at_time(arm, task)) for task in tasks}
    header, rows = _table(record, extra)
    totals = {arm: sum(_means(record, arm).values()) for arm in record["arms"]}
    best = sorted(totals, key=lambda arm: -totals[arm])
    notes = [*_notes(record), f"equal time: {least:.0f} s of training, what the fastest arm takes for all steps"]
    text = (
        f"at equal steps, mean over tasks: {', '.join(f'{arm} {100 * totals[arm] / len(tasks):.1f}' for arm in best)}."
    )
    return Verdict(True, text, header, rows, notes)


def _interpolated(at: Sequence[float], scores: Sequence[float], where: float) -> float | None:
    if where < at[0]:
        return None
    for i in range(1, len(at)):
        if at[i] >= where:
            return scores[i - 1] + (scores[i] - scores[i - 1]) * (where - at[i - 1]) / (at[i] - at[i - 1])
    return scores[-1]


def _read_ends(record: Record) -> Verdict:
    header, rows = _table(record)
    tasks = list(record["tasks"])
    best = {task: max(record["arms"], key=lambda arm: _means(record, arm)[task]) for task in tasks}
    text = "best: " + ", ".join(f"{task} {arm} ({percent(ends(record, arm, task))})" for task, arm in best.items())
    return Verdict(True, f"{text}.", header, rows, _notes(record))


SHORT: Mapping[str, Mapping[str, Any]] = {
    "features": {"frames": 128},
    "optim": {"steps": 300},
    "ema": {"steps": 300},
}
LONGER: Mapping[str, Mapping[str, Any]] = {**SHORT, "features": {"frames": 192}}  # 24 patches of 32 x 32
CLAIMS: dict[str, Claim] = {
    "convergence": Claim(_convergence, _read_convergence, probes=6, curves=True),
    "distillation": Claim(_distillation, _read_distillation, probes=6, curves=True),
    "resolutions": Claim(_resolutions, _read_resolutions, probes=3, guided=False, recipe=LONGER),
    "layer": Claim(_layer, _read_ends, recipe=SHORT),
    "cost": Claim(_cost, _read_ends, recipe=SHORT),
    "distance": Claim(_distance, _read_ends, recipe=SHORT),
    "masks": Claim(_masks, _read_ends, guided=False, recipe=SHORT),
}
