"""The directory of a run: one writer at a time, what is deleted for a new run in its place, whether its disk will do.

It holds everything about a run: ``config.yaml`` (every field of the recipe), ``metrics.jsonl`` (see
`cat.training.records`), ``failures.jsonl`` (audio that could not be read), ``skipped/`` (see `cat.training.skipped`),
``tensorboard/``, ``loggers.json`` (see `cat.training.sinks`), ``checkpoints/`` (see `cat.checkpoints.store`),
``figures/``, after ``--profile`` ``profile/``, after `cat-audio probe` ``probe.json``, after `cat-audio evaluate`
``evaluation/``, after fine-tuning ``scores.json`` (see `cat.training.finetune`), and while a process works in it
``.lock``. Other files in it are the user's and are left alone.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable
from pathlib import Path

from cat.checkpoints import store as checkpoints
from cat.config import ConfigError, read_yaml
from cat.distributed import current
from cat.files import check_writable, format_bytes, free_space
from cat.locks import LOCK, sole_user
from cat.progress import say
from cat.training.recipe import RunConfig

# What a run writes besides checkpoints and config.yaml. The latter stays until that of the new run replaces it, so that
# a deletion that was interrupted leaves what is still known for a run.
_RECORDS = (
    *("metrics.jsonl", "failures.jsonl", "tensorboard/events.out.tfevents.*", "probe.json", "scores.json"),
    *("events.json", "skipped/step-*.json", "loggers.json"),
    *("profile/trace.json", "figures/loss.png", "figures/patches.png", "figures/embeddings.png", "figures/layers.png"),
    *(f"evaluation/*/{name}" for name in ("evaluation.json", "classes.csv", "clips.csv")),
    *(f"evaluation/*/figures/{name}.png" for name in ("classes", "confusion", "curves", "mistakes")),
)


def sole_writer(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """See `cat.locks.sole_user`. Of several processes that train together the first writes, for all."""
    if not current().main:
        return contextlib.nullcontext()
    return sole_user(run_dir, remedy="wait for it or stop it, or choose another name (run.name=OTHER)")


def files_of_earlier_run(run_dir: Path, *, overwrite: bool) -> list[Path]:
    """The files that a new run here takes the place of.

    Raises: `ConfigError` when there is a run and ``overwrite`` is not given, or something else than a run.
    """
    steps = checkpoints.list_checkpoints(run_dir / "checkpoints")
    if not steps and not _is_config_of_a_run(run_dir / "config.yaml"):
        foreign = sorted(path.name for path in run_dir.iterdir() if path.name not in (LOCK, "profile", "checkpoints"))
        if foreign:
            raise ConfigError(
                f"{run_dir} exists and is not a run directory (it holds {foreign[0]!r}); choose another name "
                "(run.name=OTHER)"
            )
        return []
    if not overwrite:
        raise ConfigError(
            f"{run_dir} already holds a run; go on with it (--resume), replace it (--overwrite) or choose another "
            "name (run.name=OTHER)"
        )
    return [*_records(run_dir), *(path for step in steps for path in step.rglob("*")), run_dir / "config.yaml"]


def delete_run(run_dir: Path) -> None:
    """Delete what a run writes, the checkpoints first: without them nothing looks like a whole run. A symbolic link to
    a directory stays a link."""
    checkpoints.remove_all(run_dir / "checkpoints")
    for path in _records(run_dir):
        path.unlink()
        for folder in path.relative_to(run_dir).parents[:-1]:
            if not (run_dir / folder).is_symlink():
                with contextlib.suppress(OSError):  # not empty
                    (run_dir / folder).rmdir()


def check_disk(run_dir: Path, config: RunConfig, *, needed: int, freed: int, updates: int = 0) -> None:
    """Find now what would else be found at the first checkpoint, after hours: a folder that cannot be written to, or a
    disk that is too small.

    Args:
        needed: bytes of a checkpoint.
        freed: bytes that are there and will be deleted before.
        updates: that the run still makes.

    Raises: OSError.
    """
    folder = run_dir / "checkpoints"
    free = free_space(folder)
    if free is not None and needed > free + freed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint of this model needs {format_bytes(needed)}, and {format_bytes(free + freed)} are free "
            "there; make room, or choose another disk (run.dir=OTHER)",
            str(folder),
        )
    check_writable(folder)
    if free is None:
        return
    kept = config.keep_last + config.keep_best + (updates // config.keep_every if config.keep_every else 0)
    there = total_size(path for step in checkpoints.list_checkpoints(folder) for path in step.rglob("*"))
    if (kept + 1) * needed > free + there:  # a new one is written before an old one goes
        say(
            f"warning: {folder}: there are {format_bytes(free + there)} for checkpoints, and {kept} that are kept "
            f"(run.keep_last, run.keep_best, run.keep_every) and a new one need {format_bytes((kept + 1) * needed)}"
        )


def total_size(paths: Iterable[Path]) -> int:
    """Bytes of files; 0 for what is not there."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def _records(run_dir: Path) -> list[Path]:
    return [path for pattern in _RECORDS for path in run_dir.glob(pattern)]


def _is_config_of_a_run(path: Path) -> bool:
    """Whether a run wrote it: other programs have a config.yaml too. An empty one is what a crash may leave."""
    try:
        found = read_yaml(path)
    except ConfigError:
        return False
    return not found or found.keys() >= {"data", "model", "features", "optim", "run"}
