"""``--plan``: what a run needs and how long it takes, before anything is started; and whether it could start.

The recipe, its data, the disk and the run directory are looked at as a start does, one step is traced without a GPU
(`cat.training.plan.traced`), and the arithmetic (`cat.training.plan.estimate`) is shown line by line. Nothing is
written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from cat.checkpoints import store as checkpoints
from cat.config import ConfigError
from cat.data import Manifest, load_manifest, open_embeddings
from cat.data.guides import CachedRows
from cat.data.share import share_out
from cat.files import free_space
from cat.training.directory import files_of_earlier_run, total_size
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.finetuning import read_splits
from cat.training.plan.estimate import Case, checkpoint_bytes, estimated, most_clips
from cat.training.plan.hardware import Machines
from cat.training.plan.reading import read_some
from cat.training.plan.told import Plan, gib, number
from cat.training.plan.traced import trace
from cat.training.recipe import PretrainConfig

ASSUMED_DIM = 512  # of embeddings that are not there yet: CLAP's
ENOUGH = 0.9  # of the cores, that data workers may take


def make_plan(
    config: PretrainConfig | FinetuneConfig,
    machines: Machines,
    run_dir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Plan:
    """The plan of a run on these machines. Of a recipe without data (``data.train``) what depends on them is left out.

    Raises: `ConfigError` for a number of processes that does not fit; `cat.data.ManifestError`,
    `cat.training.plan.traced.TraceError`.
    """
    run_dir = Path(run_dir or config.run_dir)
    share = share_out(
        config.data.update_clips,
        config.data.batch_size,
        processes=machines.processes,
        paired=isinstance(config, FinetuneConfig) and config.augment.mixup > 0,
    )
    train, valid = _data(config)
    problems: list[str] = list(_directory(run_dir, resume=resume, overwrite=overwrite))
    notes: list[str] = []
    dims: dict[str, int] = {}
    if isinstance(config, PretrainConfig):
        dims = _dims(config, train, problems, notes)
    if config.run.cuda_graph and (machines.processes > 1 or share.pieces > 1):
        problems.append("run.cuda_graph=true records a step of one process on one piece; use run.cuda_graph=false")
    if config.model.kernels not in ("auto", "triton"):
        notes.append(f"model.kernels={config.model.kernels} takes more memory and time than this plan, of auto, says")
    if config.run.parallel == "fsdp" and machines.processes > 1:
        notes.append("run.parallel=fsdp takes less memory and sends more than this plan, of ddp, says")
    precision = "bf16" if config.run.precision == "auto" else config.run.precision
    newest = checkpoints.newest(run_dir) if resume else None
    on_gpu = config.data.features != "cpu"
    case = Case(
        config=config,
        machines=machines,
        share=share,
        traced=trace(config, clips=share.size, processes=machines.processes, precision=precision, dims=dims),
        precision=precision,
        begun=checkpoints.read_state(newest)["step"] if newest else 0,
        clips=None if train is None else config.data.epoch_clips or len(train),
        valid=0 if valid is None else len(valid),
        reading=None if train is None else read_some(train, config.features, crop=config.data.crop, on_gpu=on_gpu),
    )
    free = free_space(run_dir / "checkpoints")
    plan = estimated(case, free)
    problems += _too_much(case, plan, free, run_dir)
    notes += _worth_a_look(case, plan, free)
    return dataclasses.replace(plan, problems=tuple(problems), notes=tuple(notes))


def _data(config: PretrainConfig | FinetuneConfig) -> tuple[Manifest | None, Manifest | None]:
    """The clips to train on and to choose the model by."""
    if isinstance(config, FinetuneConfig):
        splits = read_splits(config)
        return splits.train, splits.valid
    data = config.data
    return (load_manifest(data.train) if data.train else None), (load_manifest(data.valid) if data.valid else None)


def _dims(config: PretrainConfig, train: Manifest | None, problems: list[str], notes: list[str]) -> dict[str, int]:
    """Widths of the external embeddings, by guide."""
    dims: dict[str, int] = {}
    if config.objective.regularisation_weight:
        store = None if train is None else open_embeddings(train)
        if train is not None and store is None:
            problems.append(
                f"objective.regularisation_weight={config.objective.regularisation_weight} needs embeddings, and "
                f"{config.data.train} names none; make them with cat-audio embed, or set the weight to 0"
            )
        dims[""] = store.dim if store is not None else ASSUMED_DIM
    for name, guide in config.guides.items():
        cached = bool(guide.embeddings) and train is not None
        dims[name] = CachedRows(str(guide.embeddings), train).store.dim if cached and train else ASSUMED_DIM
        if not guide.embeddings:
            notes.append(f"guides.{name} encodes while it trains, which takes time and memory that is not in the plan")
    return dims


def _directory(run_dir: Path, *, resume: bool, overwrite: bool) -> Iterator[str]:
    if run_dir.exists() and not resume:
        try:
            files_of_earlier_run(run_dir, overwrite=overwrite)
        except ConfigError as error:
            yield str(error)


def _too_much(case: Case, plan: Plan, free: int | None, run_dir: Path) -> Iterator[str]:
    machines = case.machines
    needed, there = plan["memory of a GPU"]["in all"], machines.card.memory_GiB * 2**30
    if needed > there:
        most = most_clips(case)
        remedy = f"data.batch_size={most} fits" if most else "not even one clip fits; choose a smaller model"
        yield f"a GPU needs {gib(needed)} and {machines.gpu} has {machines.card.memory_GiB} GiB: {remedy}"
    size = checkpoint_bytes(case)
    old = total_size(path for step in checkpoints.list_checkpoints(run_dir / "checkpoints") for path in step.rglob("*"))
    if free is not None and size > free + old:
        yield f"a checkpoint has {gib(size)}, and {gib(free + old)} are free in {run_dir}; make room, or set run.dir"
    if case.reading and not case.reading.measured and case.reading.failures:
        yield f"none of the clips that were looked at can be read; the first: {case.reading.failures[0]}"
    if not case.steps:
        yield f"there is nothing left to train: step {case.begun} of {case.config.end}"


def _worth_a_look(case: Case, plan: Plan, free: int | None) -> Iterator[str]:
    machines, data, share = case.machines, case.config.data, case.share
    if share.size < data.batch_size and share.pieces == machines.processes:
        yield (
            f"a GPU computes {share.size} clips at once, of data.batch_size={data.batch_size}; "
            f"data.global_batch={data.batch_size * machines.processes} fills them all, and is another recipe "
            "(optim.lr, optim.steps)"
        )
    cores = machines.cores or os.cpu_count() or 1
    needed = plan["loader of a node"]["cores"]
    if needed > ENOUGH * cores:
        where = "given" if machines.cores else "of this machine; give those of a node as cores=N"
        yield f"the loader needs {number(needed)} cores of a node, of {cores} ({where}): GPUs would wait for data"
    workers = machines.gpus * data.num_workers
    if needed > workers:
        each = -(-int(needed / ENOUGH + 1) // machines.gpus)
        yield f"{workers} data workers cannot feed the GPUs of a node; data.num_workers={each} can"
    if case.clips and share.clips > case.clips:
        yield f"an update has {share.clips} clips and an epoch {case.clips}: some are in it twice"
    if case.reading and case.reading.measured and case.reading.failures:
        first = case.reading.failures[0]
        yield f"{len(case.reading.failures)} of the clips that were looked at cannot be read; the first: {first}"
    if not case.clips:
        yield "data.train is not given: manifest, embeddings and reading were not looked at"
    kept = plan["disk"]["checkpoints"]
    if free is not None and kept > free:
        yield f"{gib(kept)} of checkpoints are more than is free; keep fewer (run.keep_last, keep_best, keep_every)"
