"""How the numbers of a study are read: as a table, and in words.

Tables are of the test split; curves, and what is derived from them, of the valid split.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cat.experiments.verdict import Verdict

Record = Mapping[str, Any]  # what `cat.experiments.study.run_study` returns
SHOWN = ("linear mean", "linear cls", "knn mean", "knn cls")  # probes in tables
MAIN = SHOWN[0]
DRAWN = (MAIN, "linear cls", "knn cls")  # probes in figures: of the patches, and of the token that is guided
NONE = "none"  # the arm without a guide
SECONDS = "seconds: of training, a run; the median of its seeds"


def ends(record: Record, arm: str, task: str, probe: str = MAIN) -> list[float]:
    """Test scores, a seed each."""
    return [run["rows"][-1]["test"][task][probe] for run in record["arms"][arm]["runs"]]


def curve(run: Mapping[str, Any], task: str, probe: str = MAIN) -> tuple[list[float], list[float]]:
    """Steps, valid scores."""
    return [row["step"] for row in run["rows"]], [row["valid"][task][probe] for row in run["rows"]]


def of_bound(scores: Mapping[str, float], probe: str) -> float | None:
    """What stands for a probe of CAT's tokens: of another encoder that of its only embedding, for their mean."""
    kind, pooling = probe.split()
    return scores.get(probe, scores.get(kind) if pooling == "mean" else None)


def named(record: Record, bound: str) -> str:
    """A guide has the name of its arm."""
    return f"{bound}, itself" if bound in record["guides"] else bound


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


def by_chance(record: Record, task: str, a: Sequence[float], b: Sequence[float]) -> float:
    """How far the means of two arms' test scores lie apart by chance: twice the standard error that the larger
    deviation over seeds gives, with at least a test clip's share for a deviation."""
    deviations = [statistics.stdev(scores) for scores in (a, b) if len(scores) > 1]
    return 2 * max([1 / record["tasks"][task]["test"], *deviations]) * (1 / len(a) + 1 / len(b)) ** 0.5


def _table(
    record: Record, extra: Mapping[str, Callable[[str, str], str]] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows, a task after the other: the arms' test scores, then the bounds'. `extra`: of task and arm."""
    extra = extra or {}
    header = ["task", "arm", *SHOWN, *extra]
    rows = []
    for task in record["tasks"]:
        for arm in record["arms"]:
            scores = [percent(ends(record, arm, task, probe)) for probe in SHOWN]
            rows.append([task, arm, *scores, *(of(task, arm) for of in extra.values())])
        for name, both in record["bounds"].items():
            cells = [of_bound(both["test"][task], probe) for probe in SHOWN]
            scores = ["" if c is None else f"{100 * c:.1f}" for c in cells]
            rows.append([task, named(record, name), *scores, *[""] * len(extra)])
    return header, rows


def _notes(record: Record) -> list[str]:
    seeds = [len(arm["runs"]) for arm in record["arms"].values()]
    spread = f"mean and deviation of {max(seeds)} seeds" if max(seeds) > 1 else "of one seed"
    if min(seeds) == 1 < max(seeds):
        spread += ", one seed where there is no deviation"
    return [f"test split, %: linear probe and kNN of the mean of the patches and of the CLS token; {spread}"]


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


def read_convergence(record: Record) -> Verdict:
    """Steps to the valid score that training without a guide ends at, as a ratio."""

    def faster(probe: str, task: str, arm: str) -> str:
        level = statistics.mean(curve(run, task, probe)[1][-1] for run in record["arms"][NONE]["runs"])
        if record["bounds"]["untrained"]["valid"][task][probe] >= level:
            return "untrained is there"
        found = [reached(*curve(run, task, probe), level) for run in record["arms"][arm]["runs"]]
        known = [record["steps"][-1] / steps for steps in found if steps]
        if not known:
            return "never"
        spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
        missed = "" if len(known) == len(found) else f", {len(known)} of {len(found)}"
        return f"{statistics.mean(known):.1f}x{spread}{missed}"

    extra = {f"fewer steps ({probe})": functools.partial(faster, probe) for probe in SHOWN}
    header, rows = _table(record, extra)
    guided = [arm for arm in record["arms"] if arm != NONE]
    words = ". ".join(_in_words(record, arm, NONE) for arm in guided)
    notes = [
        *_notes(record),
        f"fewer steps: to the valid score at which {NONE} ends on average, and in how many seeds, where not in all; "
        "its own row is what chance gives; the paper says 5x on AudioSet",
    ]
    ahead = _means(record, guided[0]).values(), _means(record, NONE).values()
    return Verdict(sum(ahead[0]) > sum(ahead[1]), f"{words}.", header, rows, notes)


def read_distillation(record: Record) -> Verdict:
    """On which tasks the patches of a student know more than its guide's embeddings."""
    header, rows = _table(record)
    parts = []
    for guide in (arm["guide"] for name, arm in record["arms"].items() if name == arm["guide"]):
        own = {task: record["bounds"][guide]["test"][task]["linear"] for task in record["tasks"]}
        student = _means(record, guide)
        beaten = [task for task in own if student[task] > own[task]]
        scores = "".join(f"; {task} {100 * student[task]:.1f} against {100 * own[task]:.1f}" for task in own)
        parts.append(f"the student of {guide} beats it on {', '.join(beaten) or 'no task'}{scores}")
    parts += [
        _in_words(record, arm, found["guide"])
        for arm, found in record["arms"].items()
        if arm != found["guide"] and found["guide"]
    ]
    return Verdict(True, f"{'. '.join(parts)}.", header, rows, _notes(record))


def read_resolutions(record: Record) -> Verdict:
    tasks = list(record["tasks"])
    least = min(_median_seconds(record, arm) for arm in record["arms"])

    def at_time(task: str, arm: str) -> str:
        share = least / _median_seconds(record, arm)  # of the updates; every one takes as long
        found = [_at_share(*curve(run, task), share) for run in record["arms"][arm]["runs"]]
        known = [score for score in found if score is not None]
        return percent(known) if len(known) == len(found) else "not probed by then"

    extra: dict[str, Callable[[str, str], str]] = {
        "valid, at equal time": at_time,
        "parameters": lambda task, arm: f"{record['arms'][arm]['parameters'] / 1e6:.2f} M",
        "seconds": functools.partial(_seconds, record),
    }
    header, rows = _table(record, extra)
    seeds = {
        arm: [statistics.mean(scores) for scores in zip(*(ends(record, arm, task) for task in tasks), strict=True)]
        for arm in record["arms"]
    }
    best = sorted(seeds, key=lambda arm: -statistics.mean(seeds[arm]))
    notes = [*_notes(record), f"equal time: {least:.0f} s of training, what the fastest arm takes for all steps"]
    text = f"at equal steps, mean over tasks: {', '.join(f'{arm} {percent(seeds[arm])}' for arm in best)}."
    return Verdict(True, text, header, rows, notes)


def _seconds(record: Record, task: str, arm: str) -> str:
    """Of training, a run's; the same on every task."""
    return f"{_median_seconds(record, arm):.0f}"


def _median_seconds(record: Record, arm: str) -> float:
    """One run that a busy machine held up does not count."""
    return statistics.median(run["rows"][-1]["seconds"] for run in record["arms"][arm]["runs"])


def _at_share(steps: Sequence[float], scores: Sequence[float], share: float) -> float | None:
    """The score after a share of all steps, straight between probes; None before the first one."""
    where = share * steps[-1]
    return None if where < steps[0] else float(np.interp(where, steps, scores))


def read_ends(record: Record) -> Verdict:
    """The best arm of every task, by the patches and by the token, and which of the others may be as good."""
    header, rows = _table(record, {"seconds": functools.partial(_seconds, record)})
    text = "; ".join(
        f"best by {probe}: {', '.join(_best(record, task, probe) for task in record['tasks'])}" for probe in SHOWN[:2]
    )
    return Verdict(True, f"{text}.", header, rows, [*_notes(record), SECONDS])


def _best(record: Record, task: str, probe: str) -> str:
    scores = {arm: ends(record, arm, task, probe) for arm in record["arms"]}
    best, *others = sorted(scores, key=lambda arm: -statistics.mean(scores[arm]))
    alike = [
        arm
        for arm in others
        if statistics.mean(scores[best]) - statistics.mean(scores[arm])
        <= by_chance(record, task, scores[best], scores[arm])
    ]
    also = f" (by chance before {' | '.join(alike)})" if alike else ""
    return f"{task} {best} {percent(scores[best])}{also}"


def read_length(record: Record) -> Verdict:
    """Which of the runs, the shortest first, pass the mean and deviation of the log-mel spectrogram."""
    header, rows = _table(record, {"seconds": functools.partial(_seconds, record)})
    parts = []
    for task in record["tasks"]:
        level = record["bounds"]["log-mel statistics"]["test"][task]["linear"]
        above = [arm for arm in record["arms"] if _means(record, arm)[task] > level]
        parts.append(f"{task}: {above[0] if above else 'no run'} passes the log-mel statistics ({100 * level:.1f})")
    return Verdict(True, f"{'; '.join(parts)}.", header, rows, [*_notes(record), SECONDS])
