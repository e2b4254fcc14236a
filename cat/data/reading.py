"""From a place in an epoch to a waveform: what training on clips, with labels or without, has in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import numpy as np

from cat.data.audio import AudioError, read_crop
from cat.data.batch import Cut, Failure, as_float
from cat.data.features import FeatureConfig
from cat.data.labels import balancing_weights
from cat.data.manifest import Manifest
from cat.data.randomness import Purpose, generator
from cat.data.remote import LIMIT, Cache, RemoteFile
from cat.data.sampling import Order, boundaries
from cat.data.shards.ahead import ReadAhead
from cat.data.text import ManifestError
from cat.files import format_bytes

CROPS = ("random", "center", "start")
FEATURES = ("auto", "gpu", "cpu")
SAMPLERS = ("shuffle", "weighted")
_GIVE_UP_AFTER = 100  # unreadable clips in a row

T = TypeVar("T")


class ReadingConfig(Protocol):
    """The fields that every configuration of data has."""

    @property
    def global_batch(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def prefetch(self) -> int: ...
    @property
    def crop(self) -> str: ...
    @property
    def features(self) -> str: ...
    @property
    def max_failed_share(self) -> float: ...
    @property
    def sampler(self) -> str: ...
    @property
    def epoch_clips(self) -> int | None: ...
    @property
    def shard_window(self) -> int | None: ...


def check_reading(config: ReadingConfig) -> None:
    """Raises ValueError for a value that cannot be."""
    check_choice("crop", config.crop, CROPS)
    check_choice("features", config.features, FEATURES)
    for name, least in (("batch_size", 1), ("num_workers", 0), ("prefetch", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"data.{name} is {getattr(config, name)}; it must be at least {least}")
    if config.global_batch is not None and config.global_batch < 1:
        raise ValueError(
            f"data.global_batch is {config.global_batch}; it must be at least 1, or null for data.batch_size"
        )
    if not 0.0 <= config.max_failed_share <= 1.0:
        raise ValueError(f"data.max_failed_share is {config.max_failed_share}; it is a share, from 0 to 1")
    check_choice("sampler", config.sampler, SAMPLERS)
    if config.epoch_clips is not None and config.epoch_clips < 1:
        raise ValueError(f"data.epoch_clips is {config.epoch_clips}; it must be at least 1, or null for all clips")
    if config.shard_window is not None and config.shard_window < 1:
        raise ValueError(f"data.shard_window is {config.shard_window}; it must be at least 1, or null for all shards")


def sampling_advice(config: ReadingConfig, manifest: Manifest) -> list[str]:
    """What a user of ``data.sampler=weighted``, or of shards behind a URL, may not expect."""
    return [*_weighted_advice(config, manifest), *_remote_advice(config, manifest)]


def _remote_advice(config: ReadingConfig, manifest: Manifest) -> list[str]:
    if manifest.members is None or not manifest.members.shards.far:
        return []
    sizes = [shard.size for shard in manifest.members.shards if isinstance(shard, RemoteFile)]
    limit, window, advice = Cache.of_environment().limit, config.shard_window, []
    if window is None:
        advice.append(
            f"the clips of {manifest.name} are read in any order: every batch asks for as many shards as it has clips, "
            "until all are fetched. data.shard_window=16 takes them from 16 shards at a time"
        )
    needed = sum(sizes) if window is None else sum(sorted(sizes)[-2 * window :])
    if needed > limit:
        advice.append(
            f"the cache may hold {format_bytes(limit)}, and clips are taken from {format_bytes(needed)} at a time: "
            "shards will be fetched again and again. "
            f"Set {LIMIT} to {math.ceil(needed / 1e9)}, or a smaller data.shard_window"
        )
    return advice


def _weighted_advice(config: ReadingConfig, manifest: Manifest) -> list[str]:
    if config.sampler != "weighted":
        return []
    clips, available = len(manifest), int(np.count_nonzero(balancing_weights(manifest)))
    advice = []
    if config.epoch_clips in (None, available):
        advice.append(
            "data.sampler=weighted balances nothing in an epoch that has all clips, none of them twice: set "
            f"data.epoch_clips below {available}"
        )
    if available < clips:
        advice.append(f"{clips - available} of the {clips} clips have no label: data.sampler=weighted never draws them")
    return advice


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"data.{name} is {value!r}; choose one of {', '.join(choices)}")


def order_of(manifest: Manifest, data: ReadingConfig, *, seed: int) -> Order:
    """The clips of all epochs in their order; with ``shard_window`` those of so many shards mixed at a time.

    Raises: ManifestError where there are no shards, or no labels to weight clips by; ValueError for an epoch of more
    clips than there are.
    """
    weights = balancing_weights(manifest) if data.sampler == "weighted" else None
    shards: dict[str, Any] = {}
    if data.shard_window is not None:
        if manifest.members is None:
            raise ManifestError(
                f"data.shard_window is {data.shard_window}, but the clips of {manifest.name} lie in no shards; leave "
                "it out"
            )
        shards = {"shards": boundaries(manifest.members.columns["shard"]), "window": data.shard_window}
    return Order(len(manifest), seed=seed, epoch_clips=data.epoch_clips, weights=weights, **shards)


class FetchAhead:
    """Called with positions of an order, it fetches the shards of the clips half a window behind them, where clips lie
    behind a URL and ``shard_window`` is set."""

    def __init__(self, manifest: Manifest, data: ReadingConfig, order: Order) -> None:
        self._order, self._ahead = order, None
        if data.shard_window is not None and manifest.members is not None and manifest.members.shards.far:
            self._ahead, self._shard = ReadAhead(manifest.members.shards), manifest.members.columns["shard"]
            self._lead = max(1, data.shard_window * len(order) // len(manifest.members.shards) // 2)

    def __call__(self, positions: Iterable[int]) -> None:
        if self._ahead is not None:
            later = (next(self._order.following(position + self._lead, 1)) for position in positions)
            self._ahead.want(int(self._shard[clip]) for _, clip in later)


def first_readable(
    order: Order, position: int, read: Callable[[int, int], T], failures: list[Failure], source: str
) -> T:
    """``read(epoch, clip)`` of the clip at ``position``, or of the epoch's next one that can be read."""
    tried = 0
    for epoch, clip in order.following(position, _GIVE_UP_AFTER):
        try:
            return read(epoch, clip)
        except AudioError as error:
            failures.append(Failure(error.path, error.reason))
            tried += 1
    raise RuntimeError(
        f"{tried} clips in a row could not be used, the last one {failures[-1].path}: {failures[-1].reason}; "
        f"check the paths of {source}"
    )


def training_cut(
    manifest: Manifest,
    clip: int,
    features: FeatureConfig,
    *,
    seed: int,
    epoch: int,
    crop: str,
    roll: bool,
    gain: bool,
    min_samples: int,
) -> Cut:
    """A clip cropped, rolled and made louder or softer, as (seed, epoch, clip) say."""
    # All are drawn whether used or not, so that one option does not change another's numbers.
    random = generator(seed, Purpose.WAVEFORM, epoch, clip)
    place, turn, factor = random.random(), random.random(), random.beta(10, 10) + 0.5
    cut = read_cut(manifest, clip, features, crop, place=place, min_samples=min_samples)
    wave, rolled = cut.wave, 0
    if roll:
        rolled = int(turn * len(wave))
        wave = np.roll(wave, rolled)
    if gain:
        wave = as_float(wave) * np.float32(factor)
    return Cut(clip, wave, epoch, cut.first, rolled)


def read_cut(
    manifest: Manifest, clip: int, features: FeatureConfig, crop: str, *, place: float = 0.5, min_samples: int
) -> Cut:
    """A clip, and of one longer than ``features.frames`` the part that ``crop`` says; ``place``: where the random one
    begins, as a share of the positions there are."""
    wave, first = read_crop(
        manifest.audio(clip),
        features.sample_rate,
        max_samples=features.samples,
        start={"random": place, "center": 0.5, "start": 0.0}[crop],
        min_samples=min_samples,
        allow_int16=True,
    )
    return Cut(clip, wave, first=first)
