"""How many clips a core reads, decodes, resamples and hands over, against how many a GPU takes.

    python -m benchmarks.loader            # 8 clips of ten seconds in every format; a minute of one core

CPU time of the reading process, not wall time: what one core does, whoever else uses the machine. Files lie in the
system's page cache, so that decoding is measured and not a disk. "files" and "shards" are read as data workers do, into
waveforms for the GPU; from shards with their checksum. "shards, fetched" come from a server on this machine, as in a
first epoch (where aiohttp is installed; the server's time is not counted). "files, worker" are batches handed over
by a data worker, the time of both processes. "miniaudio" decodes alone, without checks. Parity: the samples of "files".
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.predicted_step import AFTER
from benchmarks.results import Key, Parity, Results
from benchmarks.runner import say, setup
from cat.data import DataConfig, FeatureConfig, Manifest, load_manifest
from cat.data.clips import Clip
from cat.data.dataset import PretrainDataset
from cat.data.shards.writing import write_shards
from cat.data.workers import prefetched

SECONDS, HANDED = 10, 24
# Suffix, sampling rate and channels of the files, and whether workers make the features.
FORMATS = {
    "WAV, 16 kHz": ("wav", 16_000, 1, False),
    "FLAC, 16 kHz": ("flac", 16_000, 1, False),
    "MP3, 16 kHz": ("mp3", 16_000, 1, False),
    "WAV, 44.1 kHz stereo": ("wav", 44_100, 2, False),
    "FLAC, 44.1 kHz stereo": ("flac", 44_100, 2, False),
    "MP3, 44.1 kHz stereo": ("mp3", 44_100, 2, False),
    "WAV, 16 kHz, features by workers": ("wav", 16_000, 1, True),
}
Waves = list[np.ndarray]
Provider = tuple[Callable[[], Waves], Callable[[], float]]  # what reads all clips, and a clock of the processes that do


def demand() -> float:
    """Clips a second that the predicted pre-training step on an H200 takes."""
    predicted = json.loads(AFTER.read_text())
    return predicted["shape"]["clips"] / predicted["parts"]["step"]["ms"] * 1e3


# ---------------------------------------------------------------- what is read


def write_clips(folder: Path, clips: int, suffix: str, rate: int, channels: int) -> Manifest:
    """Pink noise that swells and fades, 16 bits: FLAC makes half of it, as of recordings."""
    import soundfile

    folder.mkdir()
    for number in range(clips):
        random = np.random.default_rng(number)
        spectrum = np.fft.rfft(random.standard_normal((channels, SECONDS * rate)))
        spectrum /= np.sqrt(np.maximum(1, np.arange(spectrum.shape[1])))
        wave = np.fft.irfft(spectrum, SECONDS * rate) * (1.2 + np.sin(np.arange(SECONDS * rate) / rate))
        path = folder / f"{number}.{suffix}"
        soundfile.write(path, (0.2 * wave / np.abs(wave).max()).T, rate, None if suffix == "mp3" else "PCM_16")
    return Manifest([Clip(f"{number}.{suffix}") for number in range(clips)], folder)


def dataset(manifest: Manifest, features: bool) -> PretrainDataset:
    data = DataConfig(batch_size=len(manifest))
    return PretrainDataset(manifest, data, FeatureConfig(), None, patch_size=16, seed=0, waveforms=not features)


def read(batches: PretrainDataset) -> Waves:
    batch = batches[0]
    if batch.failures:
        raise RuntimeError(f"{batch.failures[0].path}: {batch.failures[0].reason}")
    content = batch.waveform if batch.waveform is not None else batch.spec
    assert content is not None
    return [content.numpy()]


def through_worker(batches: PretrainDataset) -> Waves:
    """Many times, so that starting the worker does not count."""
    for batch in prefetched(batches, [0] * HANDED, num_workers=1):
        content = batch.waveform if batch.waveform is not None else batch.spec
    return [content.numpy()]


def by_miniaudio(manifest: Manifest) -> Waves:
    import miniaudio

    waves = [miniaudio.flac_read_file_s16(str(manifest.path(index))).samples for index in range(len(manifest))]
    return [np.frombuffer(wave, np.int16) for wave in waves]


def own_time() -> float:
    return time.process_time()


def time_with_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + usage.ru_utime + usage.ru_stime


def fetched(url: str, features: bool) -> Waves:
    """The index and the shards, into an empty cache."""
    return read(dataset(load_manifest(url), features))


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """In a process of its own. It knows no ranges, so that a shard comes in one answer."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(folder, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, connection: Any) -> None:
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        connection.send(serving.server_port)
        serving.serve_forever()


# ---------------------------------------------------------------- measuring


def providers(name: str, files: Manifest, place: Path, url: str | None) -> Iterator[tuple[str, Provider]]:
    suffix, rate, _, features = FORMATS[name]
    yield "files", (functools.partial(read, dataset(files, features)), own_time)
    shards = write_shards(files, place / "shards").manifest
    yield "shards", (functools.partial(read, dataset(shards, features)), own_time)
    if url is not None:
        yield "shards, fetched", (functools.partial(fetched, f"{url}/{place.name}/shards", features), own_time)
    yield "files, worker", (functools.partial(through_worker, dataset(files, features)), time_with_children)
    if importlib.util.find_spec("miniaudio") and suffix == "flac" and rate == 16_000:
        yield "miniaudio", (functools.partial(by_miniaudio, files), own_time)


def measure(name: str, clips: int, rounds: int, root: Path, url: str | None, results: Results) -> None:
    suffix, rate, channels, _ = FORMATS[name]
    place = root / str(len(list(root.iterdir())))
    place.mkdir()
    files = write_clips(place / "files", clips, suffix, rate, channels)
    size = sum(files.path(index).stat().st_size for index in range(clips)) / clips
    key = Key(benchmark="loader", mode=name, dtype="int16", shape={"clips": clips, "seconds": SECONDS})
    candidates = dict(providers(name, files, place, url))
    order = candidates["files"][0]()
    wanted = {"miniaudio": None}
    times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for round_number in range(rounds + 1):
        for candidate, (call, clock) in candidates.items():
            shutil.rmtree(os.environ["CAT_CACHE"], ignore_errors=True)
            begun = clock()
            waves = call()
            if round_number:  # the first one warms up
                times[candidate].append((clock() - begun) * 1e3 / clips / (HANDED if "worker" in candidate else 1))
            elif candidate not in wanted:
                wanted[candidate] = max(float(np.abs(a - b).max()) for a, b in zip(waves, order, strict=True))
    for candidate, found in times.items():
        error = wanted[candidate]
        work = {"bytes_a_clip": size, "clips_a_second": 1e3 / float(np.median(found)), "demand": demand()}
        results.add(key, candidate, found, None if error is None else Parity(error, 0.0), work=work)
        say(f"{name}, {candidate}: {np.median(found):.3g} ms a clip, {work['clips_a_second']:.0f} clips/s a core")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8, help="in a batch (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="of every candidate, in turn (default 5)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--out", type=Path, help="result file to write")
    options = parser.parse_args()
    setup(torch.device("cpu"), 1)
    results = Results()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        root = Path(temporary, "data")
        root.mkdir()
        os.environ["CAT_CACHE"] = f"{temporary}/cache"
        url = None
        if importlib.util.find_spec("aiohttp"):
            url = stack.enter_context(server(root))
        else:
            results.notes.append("loader: shards behind a URL were not measured: aiohttp is not installed")
        for name in options.formats:
            measure(name, options.clips, options.rounds, root, url, results)
            if options.out:
                results.write(options.out, torch.device("cpu"))
    for row in results.rejected:
        say(f"rejected: {row['mode']}, {row['provider']}: {row['reason']}")
    say(f"an H200 takes {demand():.0f} clips/s (predicted step)")
    return 1 if results.rejected else 0


if __name__ == "__main__":
    sys.exit(main())
