"""Files behind URLs: a cache that several processes share, servers that fail, answers that are cut off."""

import contextlib
import http.server
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cat.data import DataConfig, FeatureConfig, load_manifest, pretrain_batches, remote
from cat.data.audio import AudioError, read_audio
from cat.data.manifest import Clip, Manifest
from cat.data.reading import sampling_advice
from cat.data.remote import Cache, RemoteError
from cat.data.shards.tars import index_shards
from cat.data.shards.writing import write_shards

soundfile = pytest.importorskip("soundfile")
fsspec = pytest.importorskip("fsspec")

RATE = 16000
FEATURES = FeatureConfig(frames=32, mel_bins=32)  # 5,360 samples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, small pieces, and no time lost between tries."""
    monkeypatch.setenv("CAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(remote, "PIECE", 20_000)
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    """Three shards of four clips of noise, about 60 kB each."""
    (tmp_path / "audio").mkdir()
    for number in range(12):
        wave = np.random.default_rng(number).integers(-9000, 9000, 6000 + 50 * number).astype(np.int16)
        soundfile.write(tmp_path / "audio" / f"{number:02}.wav", wave, RATE)
    clips = [Clip(f"{number:02}.wav", labels=("ab"[number % 2],)) for number in range(12)]
    write_shards(Manifest(clips, tmp_path / "audio"), tmp_path / "shards", shard_bytes=4 * 14_000)
    return tmp_path / "shards"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges. ``trouble(name, begin) -> what is done instead``, or None."""

    def __init__(self, folder):
        self.folder, self.asked, self.ranges = folder, [], True
        self.trouble = lambda name, begin: None
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/set"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        path = server.folder / name
        if not name:
            links = "".join(f'<a href="{file.name}">{file.name}</a>' for file in server.folder.iterdir())
            return self._answer(200, links.encode(), {"Content-Type": "text/html"})
        if not path.is_file():
            return self._answer(404, b"")
        content = path.read_bytes()
        wanted = self.headers.get("Range", "")
        begin, _, end = wanted.removeprefix("bytes=").partition("-")
        begin = int(begin or 0)
        end = min(int(end) + 1 if end else len(content), len(content))
        if self.command == "GET":
            server.asked.append((name, begin))
        trouble = server.trouble(name, begin) if self.command == "GET" else None
        if isinstance(trouble, int):
            return self._answer(trouble, b"")
        if not wanted or not server.ranges:
            return self._answer(200, content, {"Accept-Ranges": "bytes"} if server.ranges else {})
        part = content[begin:end]
        more = {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        return self._answer(206, part, more, cut=trouble == "cut")

    def _answer(self, code, content, headers=(), cut=False):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError):
                self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(shards):
    pytest.importorskip("aiohttp")
    with Server(shards) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def waves(manifest):
    return [read_audio(manifest.audio(index), RATE) for index in range(len(manifest))]


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def shards_asked(server):
    return sorted({name for name, _ in server.asked if name.endswith(".tar")})


# ---------------------------------------------------------------- a server


def test_clips_from_a_server_and_then_from_the_cache(server, shards):
    manifest = load_manifest(server.url)
    assert server.asked
    assert not shards_asked(server)
    assert_same(waves(manifest), waves(load_manifest(shards)))
    assert shards_asked(server) == ["000000.tar", "000001.tar", "000002.tar"]
    server.asked.clear()
    assert_same(waves(load_manifest(server.url)), waves(manifest))
    assert all((name, begin) == ("shards.index", 0) for name, begin in server.asked)


def test_training_from_a_server_by_several_workers(server, shards):
    data = DataConfig(batch_size=5, num_workers=3)
    options = {"patch_size": 16, "seed": 3, "num_steps": 5}
    found = pretrain_batches(data, FEATURES, None, manifest=load_manifest(server.url), **options)
    wanted = pretrain_batches(data, FEATURES, None, manifest=load_manifest(shards), **options)
    for batch, other in zip(found, wanted, strict=True):
        assert batch.clips.tolist() == other.clips.tolist()
        assert not batch.failures
        np.testing.assert_array_equal(batch.spec, other.spec)
    # Every piece of every shard once: workers wait for what another one fetches.
    pieces = [asked for asked in server.asked if asked[0].endswith(".tar")]
    assert len(pieces) == len(set(pieces))


def test_a_server_that_fails_twice_and_then_works(server, shards):
    failed = []

    def trouble(name, begin):
        if len(failed) < 2 and name.endswith(".tar"):
            failed.append(name)
            return 503
        return None

    server.trouble = trouble
    assert_same(waves(load_manifest(server.url)), waves(load_manifest(shards)))
    assert len(failed) == 2


def test_answers_that_are_cut_off_are_asked_for_again_from_there(server, shards):
    cut = []

    def trouble(name, begin):
        if name == "000001.tar" and begin == 20_000 and len(cut) < 3:
            cut.append(begin)
            return "cut"
        return None

    server.trouble = trouble
    assert_same(waves(load_manifest(server.url)), waves(load_manifest(shards)))
    assert [begin for name, begin in server.asked if name == "000001.tar"].count(0) == 1


def test_a_server_without_ranges(server, shards):
    server.ranges = False
    assert_same(waves(load_manifest(server.url)), waves(load_manifest(shards)))


def test_a_server_that_stays_away_ends_the_run_and_says_why(server, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 3)
    manifest = load_manifest(server.url)
    server.trouble = lambda name, begin: 503
    with pytest.raises(RemoteError, match=r"000000.tar: cannot be read, 3 tries in \d+ s; the last one: .*503"):
        read_audio(manifest.audio(0), RATE)
    data = DataConfig(batch_size=5, num_workers=1)
    with pytest.raises(RemoteError, match="cannot be read, 3 tries"):
        list(pretrain_batches(data, FEATURES, None, patch_size=16, seed=3, num_steps=1, manifest=manifest))
    server.trouble = lambda name, begin: None
    assert len(read_audio(manifest.audio(0), RATE)) == 6000


def test_a_shard_that_the_server_does_not_have_or_has_in_part(server, shards):
    manifest = load_manifest(server.url)
    (shards / "000001.tar").unlink()
    content = (shards / "000002.tar").read_bytes()
    (shards / "000002.tar").write_bytes(content[:30_000])
    reasons = []
    for index in range(12):
        try:
            read_audio(manifest.audio(index), RATE)
        except AudioError as error:
            reasons.append(str(error))
    assert len(reasons) == 8
    assert "000001.tar does not exist" in reasons[0]
    assert f"it has 30000 bytes there, {len(content)} in the index: it is cut off, or another file" in reasons[-1]


def test_what_was_damaged_on_its_way_is_fetched_once_more(server, shards, cache):
    manifest = load_manifest(server.url)
    wanted = waves(manifest)
    [kept] = cache.glob("*/000000.tar.*")
    content = bytearray(kept.read_bytes())
    content[3000] ^= 1
    kept.write_bytes(content)
    assert_same(waves(load_manifest(server.url)), wanted)
    # Damaged where it comes from: the clip fails, after one more try.
    (shards / "000000.tar").write_bytes(content)
    kept.unlink()
    server.asked.clear()
    manifest = load_manifest(server.url)
    for _ in range(3):
        with pytest.raises(AudioError, match="the CRC-32 is"):
            read_audio(manifest.audio(0), RATE)
    assert server.asked.count(("000000.tar", 0)) == 2
    assert len(read_audio(manifest.audio(1), RATE)) == 6050


def test_another_index_is_noticed_and_old_shards_are_not_taken_for_new_ones(server, shards, tmp_path):
    waves(load_manifest(server.url))
    for file in shards.iterdir():
        file.unlink()
    files = Manifest([Clip(f"{number:02}.wav") for number in range(12)][::-1], tmp_path / "audio")
    write_shards(files, shards, shard_bytes=4 * 14_000)
    manifest = load_manifest(server.url)
    assert manifest.clips[0].path == "11.wav"
    assert_same(waves(manifest), waves(files))


def test_an_index_here_of_shards_there(server, shards, tmp_path):
    wanted = waves(load_manifest(shards))
    (shards / "shards.index").unlink()
    index_shards(server.url, tmp_path / "index")
    assert_same(waves(load_manifest(tmp_path / "index")), wanted)
    with pytest.raises(RemoteError, match=r"shards.index does not exist"):
        load_manifest(server.url)
    with pytest.raises(ValueError, match="is not on this machine; say where its index is to be written"):
        index_shards(server.url)


# ---------------------------------------------------------------- other URLs


@pytest.fixture
def memory(shards):
    store = fsspec.filesystem("memory")
    store.put(str(shards), "/set", recursive=True)
    yield "memory://set"
    store.rm("/set", recursive=True)


def test_any_url_of_fsspec(memory, shards):
    assert_same(waves(load_manifest(memory)), waves(load_manifest(shards)))


def test_urls_that_cannot_be(tmp_path):
    with pytest.raises(RemoteError, match=r"nonsense://x/shards\.index: Protocol not known: nonsense"):
        load_manifest("nonsense://x")


# ---------------------------------------------------------------- the cache


def test_the_cache_keeps_its_limit_and_what_was_used_last(memory, cache, monkeypatch):
    manifest = load_manifest(memory)
    size = max(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    monkeypatch.setenv("CAT_CACHE_GB", str((2 * 61_440 + size + 20_000) / 1e9))
    for index in (0, 4, 0, 8, 0):
        read_audio(manifest.audio(index), RATE)
        time.sleep(0.01)
        total = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        assert total <= float(os.environ["CAT_CACHE_GB"]) * 1e9
    assert {path.name.split(".")[0] for path in cache.rglob("*.tar.*")} == {"000000", "000002"}


def test_a_limit_below_one_shard_or_none(memory, monkeypatch):
    manifest = load_manifest(memory)
    monkeypatch.setenv("CAT_CACHE_GB", "1e-5")
    with pytest.raises(RemoteError, match=r"a shard of .* is more than the cache may hold; set CAT_CACHE_GB"):
        read_audio(manifest.audio(0), RATE)
    monkeypatch.setenv("CAT_CACHE_GB", "much")
    with pytest.raises(RemoteError, match="CAT_CACHE_GB is 'much'; expected how many GB"):
        read_audio(manifest.audio(0), RATE)


def test_a_cache_that_cannot_be_written(memory, tmp_path, monkeypatch):
    manifest = load_manifest(memory)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RemoteError, match="CAT_CACHE names another"):
        read_audio(manifest.audio(0), RATE)


def test_a_full_disk_ends_the_run_instead_of_dropping_clips(memory, cache, monkeypatch):
    manifest = load_manifest(memory)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        RemoteError, match=r"No space left on device; the cache \(CAT_CACHE_GB says how much it may hold"
    ):
        read_audio(manifest.audio(0), RATE)
    assert not [*cache.glob("*/*.part")]


def test_one_process_fetches_while_others_wait_and_a_killed_one_is_in_nobodys_way(tmp_path):
    cache, calls = Cache(tmp_path / "cache", 1_000_000), multiprocessing.get_context("fork").Value("i", 0)

    def fill(descriptor):
        with calls:
            calls.value += 1
        time.sleep(0.2)
        os.pwrite(descriptor, b"x" * 100, 0)

    def die(descriptor):
        os.pwrite(descriptor, b"y" * 50, 0)
        os._exit(9)

    def read():
        descriptor = cache.open(Path("set/a.tar"), 100, fill)
        assert os.pread(descriptor, 200, 0) == b"x" * 100

    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=lambda: cache.open(Path("set/a.tar"), 100, die))
    killed.start()
    killed.join()
    assert [path.name for path in (tmp_path / "cache" / "set").iterdir()] == ["a.tar.part"]
    processes = [fork.Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert calls.value == 1
    assert [path.name for path in (tmp_path / "cache" / "set").iterdir()] == ["a.tar"]
    assert (tmp_path / "cache" / "set" / "a.tar").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------- shards in their order


def of_window(manifest, window, **options):
    data = DataConfig(batch_size=2, num_workers=options.pop("num_workers", 0), shard_window=window)
    return pretrain_batches(data, FEATURES, None, patch_size=16, seed=3, manifest=manifest, **options)


def test_shards_one_after_the_other_the_next_one_fetched_meanwhile(memory, shards, cache):
    manifest = load_manifest(memory)
    local = [batch.clips.tolist() for batch in of_window(load_manifest(shards), 1, num_steps=12)]
    found, kept = [], []
    for batch in of_window(manifest, 1, num_steps=6):
        found.append(batch.clips.tolist())
        for _ in range(100):
            kept = sorted(int(path.name[:6]) for path in cache.glob("*/*.tar.*"))
            if len(kept) > len({clip // 4 for clips in found for clip in clips}) or len(kept) == 3:
                break
            time.sleep(0.02)
        if len(found) == 2:  # the first shard is done, no clip of the second one was read
            assert len(kept) == 2
    assert found == local[:6]
    order = [clip // 4 for clips in found for clip in clips]
    assert [order[begin : begin + 4] for begin in (0, 4, 8)] == [[order[begin]] * 4 for begin in (0, 4, 8)]
    assert sorted(order) == sorted(list(range(3)) * 4)
    # From the middle of an epoch, by workers.
    resumed = of_window(manifest, 1, start_step=4, num_steps=8, num_workers=2)
    assert [batch.clips.tolist() for batch in resumed] == local[4:]


def test_a_window_needs_shards(tmp_path, shards):
    files = Manifest([Clip("00.wav")], tmp_path / "audio")
    with pytest.raises(ValueError, match=r"data.shard_window is 2, but the clips of .* lie in no shards; leave it out"):
        next(of_window(files, 2, num_steps=1))
    with pytest.raises(ValueError, match=r"data.shard_window is 0; it must be at least 1, or null"):
        DataConfig(shard_window=0)


def test_advice_for_shards_that_have_to_be_fetched(memory, shards, monkeypatch):
    def advice(manifest, window=None):
        return sampling_advice(DataConfig(shard_window=window), manifest)

    assert advice(load_manifest(shards)) == []
    manifest = load_manifest(memory)
    [one] = advice(manifest)
    assert one.startswith(
        "the clips of memory://set are read in any order: every batch asks for as many shards as it has"
    )
    assert advice(manifest, 2) == []
    monkeypatch.setenv("CAT_CACHE_GB", "0.0001")
    [two] = advice(manifest, 1)
    assert two.startswith(
        "the cache may hold 100 kB, and clips are taken from 123 kB at a time: shards will be fetched"
    )
