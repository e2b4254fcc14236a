"""Batches for pre-training and evaluation, prepared by worker processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from cat.data.batch import Batch, Failure
from cat.data.dataset import DataConfig, EvalDataset, PretrainDataset
from cat.data.features import FeatureConfig
from cat.data.guides import Guides
from cat.data.manifest import Manifest, load_manifest
from cat.data.masks import MaskConfig
from cat.data.share import Share
from cat.data.workers import prefetched
from cat.progress import say


class TooManyFailures(RuntimeError):
    """More clips could not be read than the configuration allows."""


def pretrain_batches(
    data: DataConfig,
    features: FeatureConfig,
    masks: MaskConfig | None,
    *,
    patch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    manifest: Manifest | None = None,
    share: Share | None = None,
    waveforms: bool = False,
    guides: Guides | None = None,
    warn: Callable[[str], None] = say,
) -> Iterator[Batch]:
    """Batches of the steps ``start_step`` .. ``start_step + num_steps - 1``: the same ones in whatever run, process or
    number of workers they are asked for.

    A clip that cannot be read gives its place to the next one of the epoch's order that can, with that clip's own
    labels and embedding; it is named in ``Batch.failures``. ``manifest`` saves reading ``data.train`` again. With a
    ``share`` they are the pieces of one process, in place of whole batches.

    With ``waveforms`` (what `DataConfig.features` comes to is the caller's to say) the batches hold waveforms, all of
    ``features.samples`` samples, in place of spectrograms; `Batch.with_features` makes these on whatever device.
    ``guides`` are read with every clip. ``warn`` is told when workers cannot do as they should (see
    `cat.data.workers.prefetched`).
    """
    dataset = PretrainDataset(
        load_manifest(data.train) if manifest is None else manifest,
        data,
        features,
        masks,
        patch_size=patch_size,
        seed=seed,
        share=share,
        waveforms=waveforms,
        guides=guides,
    )
    keys = dataset.share.keys(start_step, num_steps)
    return prefetched(dataset, keys, num_workers=data.num_workers, prefetch=data.prefetch, warn=warn)


def eval_batches(
    manifest: Manifest,
    features: FeatureConfig,
    batch_size: int = 32,
    num_workers: int = 0,
    *,
    rank: int = 0,
    processes: int = 1,
    waveforms: bool = False,
    guides: Guides | None = None,
    warn: Callable[[str], None] = say,
) -> Iterator[Batch]:
    """All clips once, in order, cropped at the centre or padded; the last batch may be smaller.

    A clip that cannot be read is left out and named in ``Batch.failures`` (``Batch.clips`` says which ones are there);
    no batch is empty. RuntimeError if not one clip can be read. ``rank`` and ``processes`` as in `every_clip`,
    ``waveforms``, ``guides`` and ``warn`` as in `pretrain_batches`.
    """
    dataset = EvalDataset(manifest, features, batch_size, waveforms=waveforms, guides=guides)
    return every_clip(dataset, num_workers=num_workers, rank=rank, processes=processes, warn=warn)


class EveryClip(Protocol):
    """A data set whose items are all clips of its manifest, in batches."""

    manifest: Manifest

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Batch: ...


def every_clip(
    dataset: EveryClip, *, num_workers: int, rank: int = 0, processes: int = 1, warn: Callable[[str], None] = say
) -> Iterator[Batch]:
    """The batches of a data set, without empty ones: a failure is told with the next batch, or with the last. Raises
    RuntimeError if not one clip can be read.

    Several ``processes`` take them in turns, this one those of its ``rank``. Of one that can read none of its clips the
    only batch is an empty one: others may read theirs.
    """
    ready: Batch | None = None
    failures: list[Failure] = []
    for batch in prefetched(dataset, range(rank, len(dataset), processes), num_workers=num_workers, warn=warn):
        failures += batch.failures
        if len(batch.clips) == 0:
            continue
        if ready is not None:
            yield ready
        ready, failures = dataclasses.replace(batch, failures=failures), []
    if ready is None and processes == 1:
        raise nothing_readable(dataset.manifest, failures)
    if ready is not None:
        yield dataclasses.replace(ready, failures=ready.failures + failures)
    elif failures:
        yield dataclasses.replace(batch, failures=failures)


def nothing_readable(manifest: Manifest, failures: Sequence[Failure]) -> RuntimeError:
    first = f"; the first: {failures[0].path}: {failures[0].reason}" if failures else ""
    return RuntimeError(f"not one of the {len(manifest)} clips of {manifest.name} could be read{first}")
