"""Pages for a browser: written whole or not at all, and hearing what Python hears."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import itertools
import json
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")

from cat.commands import main  # noqa: E402
from cat.data import FeatureConfig  # noqa: E402
from cat.data.audio import read_audio  # noqa: E402
from cat.export import find_runtime  # noqa: E402
from cat.export.check import Difference  # noqa: E402
from cat.export.web import runtime as runtimes  # noqa: E402
from cat.export.web.site import HERE  # noqa: E402
from cat.model import HeadConfig  # noqa: E402
from cat.prediction import CATClassifier, EventFinder, EventSettings, Plan, Windower  # noqa: E402
from cat.prediction.classifier import as_windows  # noqa: E402
from cat.prediction.events import ended, settings_of, write_settings  # noqa: E402
from cat.prediction.stream import Clock, EventStream  # noqa: E402
from cat_kernels.mel.reference import FbankSettings, fbank_reference  # noqa: E402
from tests.browser import browser  # noqa: E402
from tests.cat.export.test_export import FEATURES, checkpoint  # noqa: E402

CLASSES = ("/m/1", "/m/2", "/m/3")
SETTINGS = {
    "/m/1": EventSettings(0.6, 0.3, 3, 0.16, 0.1),
    "/m/2": EventSettings(0.5, None, 1, 0.0, 0.0),
    "/m/3": EventSettings(0.7, 0.5, 5, 0.3, 0.25),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    for name, head in {"events": HeadConfig("frames", "attention", "bce"), "clips": HeadConfig("clip", "mean")}.items():
        (folder / name).mkdir()
        checkpoint(folder / name / "model.safetensors", head)
        write_settings(folder / name / "events.json", SETTINGS, {})
    checkpoint(folder / "encoder.safetensors")
    return folder


# ---------------------------------------------------------------- what it computes, without a browser


def in_node(files: list[str], script: str, given: object, tmp_path: Path) -> object:
    """What a script makes of ``given``, with the page's own code before it."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    code = "\n".join((HERE / file).read_text() for file in files)
    (tmp_path / "given.json").write_text(json.dumps(given))
    program = f"{code}\nconst given = require('./given.json');\nconsole.log(JSON.stringify((() => {{ {script} }})()));"
    (tmp_path / "program.js").write_text(program)
    done = subprocess.run(["node", "program.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("frames", [True, False])
def test_events_are_those_of_python(tmp_path, frames):
    """In the same order, to the bit, in pieces of any size; of rows, and of a clip head's windows."""
    random = np.random.default_rng(0)
    features = FeatureConfig(frames=48, mel_bins=32)
    plan = Plan(features, 8, 6, 3, 1)
    timing = plan if frames else Clock(0.24, 0.12)
    # Neighbours are alike, so that events are longer than a row.
    scores = np.stack([np.convolve(column, np.ones(4) / 2, "same") for column in random.normal(size=(3, 400))], axis=1)
    scores = (1 / (1 + np.exp(-scores))).astype(np.float32)
    finder = EventFinder(CLASSES, SETTINGS, timing)
    edges = [0, 1, 2, 40, 41, 200, 400]
    pieces = [scores[a:b] for a, b in itertools.pairwise(edges)]
    expected = [event for piece in pieces for event in finder.feed(piece)] + finder.finish(31.7)
    given = {
        "settings": [vars(SETTINGS[label]) for label in CLASSES],
        "timing": {"step": timing.step, "lead": 0.0 if frames else 0.12},
        "pieces": [piece.tolist() for piece in pieces],
    }
    script = """
      const finder = new EventFinder(given.settings, given.timing);
      return [...given.pieces.flatMap((piece) => finder.feed(piece)), ...finder.finish(31.7)];"""
    found = in_node(["events.js"], script, given, tmp_path)
    told = [(CLASSES[e["column"]], e["onset"], e["offset"], e["score"], e["number"]) for e in found]
    assert told == [(e.label, e.onset, e.offset, e.score, e.number) for e in expected]
    assert len(told) > 30
    assert {e.label for e in expected} == {*CLASSES}


@pytest.mark.parametrize("samples", [399, 400, 401, 5000, 7920, 7921, 30_000, 100_003])
def test_windows_are_those_of_python(tmp_path, samples):
    plan = Plan(FeatureConfig(frames=48, mel_bins=32), 8, 6, 2, 3)
    wave = np.arange(samples, dtype=np.float32)
    windower = Windower(plan)
    edges = [0, min(1, samples), min(4567, samples), samples]
    pieces = [wave[a:b] for a, b in itertools.pairwise(edges)]
    windows = [window for piece in pieces for window in windower.feed(piece)] + list(windower.finish())
    expected = [[w.start, w.begin, w.end, len(w.waves[0]), float(w.waves[0][0])] for w in windows]
    given = {"samples": plan.samples, "row": plan.row, "rows": 6, "hop": 2, "lookahead": 3, "patch": 8}
    given |= {"frameLength": 400, "frameShift": 160, "edges": edges}
    script = """
      const windower = new Windower(given), found = [];
      const wave = Float32Array.from({ length: given.edges.at(-1) }, (_, i) => i);
      const keep = (all) => { for (const w of all) found.push([w.start, w.begin, w.end, w.wave.length, w.wave[0]]); };
      given.edges.slice(1).forEach((end, i) => keep(windower.feed(wave.subarray(given.edges[i], end))));
      keep(windower.finish());
      return found;"""
    assert in_node(["windows.js"], script, given, tmp_path) == expected


@pytest.mark.parametrize(
    ("source", "target", "limit"),
    [(44_100, 16_000, 3e-3), (48_000, 16_000, 3e-6), (8_000, 16_000, 3e-6), (16_000, 16_000, 0)],
)
def test_the_resampler_is_near_soxr(tmp_path, source, target, limit):
    """Of noise, which has all frequencies: the two differ between pass band and Nyquist frequency alone, and by the
    0.1 % by which soxr falls towards 7.3 kHz from 44.1 to 16 kHz (ours: 1e-7)."""
    wave = np.random.default_rng(0).normal(size=source // 4).astype(np.float32) * 0.1
    expected = soxr.resample(wave, source, target)[: len(wave) * target // source]
    script = """
      const whole = new Resampler(given.source, given.target), pieces = new Resampler(given.source, given.target);
      const wave = Float32Array.from(given.wave);
      const all = [...whole.feed(wave), ...whole.finish()], again = [];
      for (let at = 0; at < wave.length; at += 777) again.push(...pieces.feed(wave.subarray(at, at + 777)));
      again.push(...pieces.finish());
      return { all, same: all.length === again.length && all.every((x, i) => x === again[i]) };"""
    given = {"source": source, "target": target, "wave": wave.tolist()}
    found = in_node(["resampler.js"], script, given, tmp_path)
    assert found["same"]
    error = np.array(found["all"], np.float32) - expected
    spectrum, scale = (np.abs(np.fft.rfft(x * np.hanning(len(x)))) for x in (error, expected))
    passed = int(0.9 * min(source, target) / target * len(spectrum))
    assert spectrum[:passed].max() <= limit * scale[:passed].mean()
    assert np.sqrt(np.mean(error**2)) < 0.01 * expected.std()


@pytest.mark.parametrize(
    ("subtype", "channels", "form"),
    [("PCM_U8", 1, "WAV"), ("PCM_16", 2, "WAV"), ("PCM_24", 1, "WAVEX"), ("PCM_32", 1, "WAV"), ("FLOAT", 3, "WAV"),
     ("DOUBLE", 1, "WAV"), ("ULAW", 1, "WAV")],
)  # fmt: skip
def test_wav_files_are_read_as_python_reads_them(tmp_path, subtype, channels, form):
    wave = np.random.default_rng(0).uniform(-1, 1, size=(500, channels))
    soundfile.write(tmp_path / "x.wav", wave, 22_050, subtype=subtype, format=form)
    whole = (tmp_path / "x.wav").read_bytes()
    script = """
      const read = (list) => { const found = wavOf(new DataView(Uint8Array.from(list).buffer));
        return found && [found.rate, [...found.wave]]; };
      return [read(given), read(given.slice(0, given.length - 100)), read(given.slice(0, 30))];"""
    found, cut, header = in_node(["sound.js"], script, list(whole), tmp_path)
    assert header is None
    if subtype == "ULAW":  # the browser's own decoder has it
        assert found is None
        return
    expected = read_audio(tmp_path / "x.wav", 22_050)
    assert found[0] == 22_050
    np.testing.assert_allclose(np.array(found[1], np.float32), expected, rtol=0, atol=1e-7 if channels > 1 else 0)
    assert cut[1] == found[1][: len(cut[1])]
    assert 0 < len(cut[1]) < 500


@pytest.mark.parametrize(
    ("name", "options"), [("x.flac", {}), ("x.ogg", {"format": "OGG", "subtype": "VORBIS"}), ("x.mp3", {})]
)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_the_rate_of_other_files(tmp_path, name, options, rate):
    soundfile.write(tmp_path / name, sound(rate, 0.5), rate, **options)
    head = list((tmp_path / name).read_bytes()[:4000])
    tagged = [*b"ID3\x04\0\0\0\0\0\x0a", *bytes(10), *head]
    script = "return given.map((list) => rateOf(new DataView(Uint8Array.from(list).buffer)));"
    found = in_node(["sound.js"], script, [head, tagged if name == "x.mp3" else head, [1, 2], head[:20]], tmp_path)
    assert found[:3] == [rate, rate, 48_000]


# ---------------------------------------------------------------- what is written


def fake_package(path: Path, *, leave_out: str = "", name: str = "onnxruntime-web") -> Path:
    (path / "dist").mkdir(parents=True)
    for file in set(runtimes.FILES.values()) - {leave_out}:
        (path / "dist" / file).write_text(f"// {file}")
    (path / "package.json").write_text(json.dumps({"name": name, "version": "9.8.7"}))
    return path


@pytest.fixture
def quick(monkeypatch) -> None:
    """Without a graph, which takes seconds: what is written is a file of its checkpoint's name."""

    def export(exportable, path, **options):
        path.write_bytes(str(exportable.path).encode() * 1000)
        return Difference((1,), 0.0, 0.0, 1.0, 0.0)

    monkeypatch.setattr("cat.export.web.site.export", export)


def write(checkpoint: Path, out: Path, package: Path) -> int:
    return main(["export", str(checkpoint), "--web", str(out), "--runtime", str(package)])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_older_page_is_replaced_and_nothing_else(folder, tmp_path, capsys, quick, monkeypatch):
    package, out = fake_package(tmp_path / "package"), tmp_path / "page"
    assert write(folder / "clips", out, package) == 0
    told = capsys.readouterr().out
    assert f"{out / 'index.html'}: open it in a browser" in told
    assert f"event settings: {folder / 'clips' / 'events.json'}" in told
    first, page = names(out), (out / "index.html").read_text()
    assert page.count("{{") == 0
    assert str(folder) not in page  # nothing of the machine that made it
    assert {"index.html", "runtime/LICENSE", "runtime/ThirdPartyNotices.txt"} < first
    assert first - {"index.html", "runtime/LICENSE", "runtime/ThirdPartyNotices.txt"} == set(scripts_of(page))

    # Stopped before the page itself is written: the old page still has all that it names.
    with monkeypatch.context() as patch:
        patch.setattr("cat.export.web.site._page", lambda *_: 1 / 0)
        assert write(folder / "events", out, package) == 1
    assert (out / "index.html").read_text() == page
    assert first <= names(out)
    assert write(folder / "events", out, package) == 0
    assert {name for name in names(out) if name.endswith(".js")} == set(scripts_of((out / "index.html").read_text()))

    (out / "mine.txt").write_text("x")
    before = {name: (out / name).read_bytes() for name in names(out)}
    assert write(folder / "clips", out, package) == 1
    assert "mine.txt for one; it is left alone" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def scripts_of(page: str) -> list[str]:
    config = json.loads(page.partition('id="config">')[2].partition("</script>")[0])
    return [name for names in config["parts"].values() for name in names]


def test_a_file_of_many_parts(folder, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("cat.export.web.site.PART", 20_000)
    assert write(folder / "clips", tmp_path / "page", fake_package(tmp_path / "package")) == 0
    assert len([name for name in scripts_of((tmp_path / "page" / "index.html").read_text()) if "model-" in name]) > 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{clips}"], "expected one of OUT, a file that ends in .onnx or .pt2, and --web DIR"),
        (["{clips}", "x.onnx", "--web", "{new}"], "expected one of OUT"),
        (["{clips}", "x.onnx", "--runtime", "{package}"], "is what runs a page"),
        (["{encoder}", "--web", "{new}", "--runtime", "{package}"], "is an encoder, and the page tells classes"),
        (["{clips}", "--web", "{file}"], "is not a folder; give --web the name of one that is new or empty"),
        (["{clips}", "--web", "{full}"], "did not write, a.txt for one; it is left alone"),
        (["{clips}", "--web", "{new}", "--runtime", "{nowhere}"], "nowhere: No such file or directory"),
        (["{clips}", "--web", "{new}", "--runtime", "{file}"], "cannot be read as a .tgz"),
        (
            ["{clips}", "--web", "{new}", "--runtime", "{full}"],
            "is not the npm package onnxruntime-web: it has no dist",
        ),
        (["{clips}", "--web", "{new}", "--runtime", "{other}"], "is not the npm package onnxruntime-web; expected"),
        (["{clips}", "--web", "{new}", "--runtime", "{part}"], "it has no dist/ort-wasm-simd-threaded.wasm; expected"),
    ],
)
def test_what_goes_wrong(folder, tmp_path, capsys, quick, arguments, sentence):
    (tmp_path / "file").write_text("not a package")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    places = {name: tmp_path / name for name in ("new", "file", "full", "nowhere")}
    places |= {"clips": folder / "clips", "encoder": folder / "encoder.safetensors"}
    places["package"] = fake_package(tmp_path / "package")
    places["other"] = fake_package(tmp_path / "other", name="onnxruntime-node")
    places["part"] = fake_package(tmp_path / "part", leave_out="ort-wasm-simd-threaded.wasm")
    assert main(["export", *(argument.format(**places) for argument in arguments)]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def packed(package: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(package, "package")
    return file.getvalue()


def npm(folder: Path, script: str) -> None:
    """A stand-in for npm, which finds the folder that it is to pack into as its last argument."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\nfor out; do :; done\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_npm_brings_the_package_once(tmp_path, monkeypatch):
    package = tmp_path / "package.tgz"
    package.write_bytes(packed(fake_package(tmp_path / "package")))
    npm(tmp_path / "bin", f'cp {package} "$out/onnxruntime-web-{runtimes.VERSION}.tgz"; echo x >> {tmp_path}/asked')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="is not that package as published"):
        find_runtime()
    monkeypatch.setattr(runtimes, "INTEGRITY", runtimes._integrity(package))
    for _ in range(2):
        found = find_runtime()
        assert (found.version, found.files["mjs"]) == ("9.8.7", b"// ort-wasm-simd-threaded.mjs")
        assert b"MIT License" in found.licences["LICENSE"]
    assert (tmp_path / "asked").read_text() == "x\nx\n"  # of what was refused, and once
    # What is kept is damaged: brought again.
    kept = tmp_path / "cache" / "cat-audio" / "npm" / f"onnxruntime-web-{runtimes.VERSION}.tgz"
    kept.write_bytes(kept.read_bytes()[:100])
    assert find_runtime().version == "9.8.7"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [("echo no network >&2; exit 1", r"npm could not bring .*\(no network\)"), (None, "there is no npm here")],
)
def test_no_npm_or_no_network(tmp_path, monkeypatch, script, sentence):
    (tmp_path / "empty").mkdir()
    if script is not None:
        npm(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", str(tmp_path / ("empty" if script is None else "bin")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=sentence) as error:
        find_runtime()
    assert "give --runtime FILE, which `npm pack onnxruntime-web@" in str(error.value)


# ---------------------------------------------------------------- in a browser

DECIBELS = 2 * FEATURES.std * 10 / np.log(10)  # of one, normalised
KEEP = """
  globalThis.windows = [];
  document.addEventListener("heard", ({ detail }) => windows.push({
    ...detail, rows: detail.rows.map((row) => [...row]), spectrogram: [...detail.spectrogram], clip: [...detail.clip],
  }));"""


def sound(rate: int, seconds: float, channels: int = 1) -> np.ndarray:
    """Chirps over a little noise; of several channels each is louder than the one before."""
    t = np.arange(int(rate * seconds)) / rate
    noise = 0.003 * np.random.default_rng(rate).normal(size=len(t))
    wave = 0.3 * np.sin(2 * np.pi * (300 * t + 250 * t**2)) * (np.sin(2 * np.pi * 0.7 * t) > 0) + noise
    return np.stack([wave * (channel + 1) / channels for channel in range(channels)], axis=1)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sounds")
    made = {
        "at_its_rate.wav": ((16_000, 3.21), {"subtype": "PCM_16"}),
        "short.wav": ((16_000, 0.07), {"subtype": "FLOAT"}),
        "stereo.flac": ((44_100, 2.5, 2), {"subtype": "PCM_24"}),
        "other.wav": ((48_000, 2.5), {"subtype": "PCM_16"}),
        "vorbis.ogg": ((22_050, 2.0), {}),
        "layer3.mp3": ((44_100, 2.0), {}),
        "too_short.wav": ((16_000, 0.02), {"subtype": "PCM_16"}),
    }
    for name, (size, options) in made.items():
        soundfile.write(folder / name, sound(*size), size[0], **options)
    (folder / "text.wav").write_text("no sound")
    soundfile.write(folder / "slow.wav", np.zeros(500), 10)
    soundfile.write(folder / "nan.wav", np.full(9000, np.nan), 16_000, subtype="FLOAT")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module", params=["events", "clips"])
def site(request, folder, tmp_path_factory) -> tuple[Path, Path]:
    """A page with the real runtime, and its checkpoint."""
    try:
        find_runtime()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp(request.param) / "a page"
    assert main(["export", str(folder / request.param), "--web", str(out)]) == 0
    return out, folder / request.param


def expected_of(model: Path, file: Path) -> tuple[dict[str, float], list[tuple[str, float, float]], np.ndarray]:
    """What Python hears: scores, events, and the formula's spectrogram in float64, of which Python's own in float32 are
    up to 0.0025 dB off in the quietest bands."""
    classifier = CATClassifier.from_pretrained(model)
    wave = read_audio(file, 16_000)
    scores = classifier(wave, 16_000).scores[0].tolist()
    settings, _ = settings_of(classifier.info.path, classifier.classes)
    stream = EventStream(classifier, settings, classifier.plan())
    events = [(e.label, e.onset, e.offset) for e in ended([*stream.feed(wave), *stream.finish()])]
    heard = 1 + (len(wave) - 400) // 160
    seen = []
    for window in as_windows([wave], classifier.plan()):
        frames = min((window.end - window.start) * 8, heard - window.start * 8)
        wave_n = torch.from_numpy(window.waves[0]).double()
        spectrogram_TF = fbank_reference(
            (wave_n - wave_n.mean())[None],
            None,
            FbankSettings(num_mel_bins=32),
            target_length=frames,
            mean=FEATURES.mean,
            std=FEATURES.std,
        )[0].numpy()
        seen.append(spectrogram_TF[(window.begin - window.start) * 8 :])
    return dict(zip(classifier.classes, scores, strict=True)), events, np.concatenate(seen)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's address at a static file server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_a_browser_hears_what_python_hears(site, sounds, tmp_path):
    """Opened as a file or from a server: scores, events, features. Decoders of lossy files differ."""
    page_folder, model = site
    opened = contextlib.nullcontext(f"{page_folder.as_uri()}/") if model.name == "events" else served(page_folder)
    with opened as address, browser(tmp_path / "profile") as page:
        page.open(f"{address}index.html")
        page.wait("document.body?.dataset.state === 'ready'", timeout=120)
        page.evaluate(KEEP)

        for name, tolerance in {
            "at_its_rate": 1e-5,
            "short": 1e-5,
            "other": 1e-3,
            "stereo": 2e-3,
            "vorbis": 5e-3,
            "layer3": 0.05,
        }.items():
            page.evaluate("windows.length = 0; document.body.dataset.state = 'given'")
            page.give_file("#file", sounds[name])
            page.wait("['done', 'error'].includes(document.body.dataset.state)")
            row = json.loads(page.evaluate("document.getElementById('save').dataset.row"))
            scores, events, spectrogram = expected_of(model, sounds[name])
            assert row["path"] == sounds[name].name
            found = {one["label"]: one["score"] for one in row["scores"]}
            assert found == pytest.approx(scores, abs=tolerance), name
            if tolerance > 1e-3:
                continue
            told = [(e["label"], e["onset"], e["offset"]) for e in row["events"]]
            assert [label for label, *_ in told] == [label for label, *_ in events], name
            assert np.array([t[1:] for t in told]) == pytest.approx(np.array([e[1:] for e in events]), abs=1e-3)
            heard = page.evaluate("windows.flatMap((w) => w.spectrogram)")
            heard = np.array(heard, np.float32).reshape(-1, 32)
            assert heard.shape == spectrogram.shape
            decibels = np.abs(heard - spectrogram) * DECIBELS
            assert decibels.max() < (1e-3 if tolerance < 1e-4 else 0.5), name

        for name, sentence in {
            "text": "text.wav: this browser cannot decode it; expected a sound file",
            "too_short": "0.020 s is too short: expected 0.025 s or more",
            "slow": "sample rate 10 Hz: too far from 16000 Hz to resample",
            "nan": "nan.wav: some of its samples are NaN or infinite",
        }.items():
            page.evaluate("document.body.dataset.state = 'given'")
            page.give_file("#file", sounds[name])
            page.wait("document.body.dataset.state === 'error'")
            assert sentence in page.evaluate("document.getElementById('status').textContent")
    assert page.console == []
    assert [url for url in page.requests if not url.startswith((address, "blob:", "data:"))] == []


@pytest.mark.slow
def test_a_browser_listens(site, sounds, tmp_path):
    """To a microphone that plays a file: events are told while it goes on, each in one row."""
    page_folder, _ = site
    device = f"--use-file-for-fake-audio-capture={sounds['other']}"
    options = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", device)
    with browser(tmp_path / "profile", *options) as page:
        page.open((page_folder / "index.html").as_uri())
        page.wait("document.body?.dataset.state === 'ready'", timeout=120)
        page.evaluate(KEEP)
        page.evaluate("document.getElementById('listen').click()")
        page.wait("windows.length > 8")
        assert page.evaluate("document.getElementById('listen').textContent") == "Stop listening"
        page.evaluate("document.getElementById('listen').click()")
        page.wait("document.body.dataset.state === 'done'")
        row = json.loads(page.evaluate("document.getElementById('save').dataset.row"))
        rows = page.evaluate("document.getElementById('events').childElementCount")
        loudest = page.evaluate("Math.max(...windows.at(-1).spectrogram)")
    assert row["path"] == "microphone"
    assert row["seconds"] > 0.5
    assert rows == len(row["events"])
    assert all(e["offset"] > e["onset"] for e in row["events"])
    assert loudest > 0  # the chirp: silence is far below
    assert page.console == []
