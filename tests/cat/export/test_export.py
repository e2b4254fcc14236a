"""Exported models: equal to eager at any length and batch, with metadata, written whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from cat.checkpoints import save_tensors  # noqa: E402
from cat.commands import main  # noqa: E402
from cat.config import to_mapping  # noqa: E402
from cat.data import FeatureConfig  # noqa: E402
from cat.data.features import log_mel  # noqa: E402
from cat.export import LogMel, export, load_exportable, metadata_of  # noqa: E402
from cat.export.check import eager, run_onnx, run_program  # noqa: E402
from cat.model import Classifier, Encoder, HeadConfig, ModelConfig  # noqa: E402

MODEL = ModelConfig(
    resolutions=(4, 8), channels=(8,), embed_dim=16, depth=1, num_heads=2, mel_bins=32, decoder_dim=16,
    decoder_groups=4,
)  # fmt: skip
FEATURES = FeatureConfig(frames=48, mel_bins=32)
P = MODEL.patch_size
TEN_LENGTHS = (1, 2, 3, 5, 8, 13, 31, 100, 313, 768)  # rows of 80 ms: to a minute, all that the positions cover


def checkpoint(path: Path, head: HeadConfig | None = None, padding: str = "mask") -> Path:
    torch.manual_seed(0)
    config = {"model": to_mapping(MODEL), "features": to_mapping(FEATURES)}
    model: torch.nn.Module = Encoder(MODEL)
    if head is not None:
        model = Classifier(MODEL, head, 3)
        model.head.linear.weight.data.normal_()  # scores that differ
        names = {"classes": ["/m/1", "/m/2", "/m/3"], "class_names": ["Dog", "Chat", "Krähe"]}
        task = "events" if head.kind == "frames" else "single-label"
        config |= {"task": task, "data": {"padding": padding}, "head": to_mapping(head), **names}
    save_tensors(path, model.state_dict(), config=config, step=7)
    return path


def waveform(clips: int, samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(samples)) + 0.02


def largest(found, expected) -> float:
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    checkpoint(folder / "encoder.safetensors")
    checkpoint(folder / "fill.safetensors", HeadConfig(), padding="fill")
    checkpoint(folder / "events.safetensors", HeadConfig("frames", "attention", "bce"))
    return folder


@pytest.fixture(scope="module")
def encoder_file(folder) -> Path:
    export(load_exportable(folder / "encoder.safetensors"), folder / "encoder.onnx")
    return folder / "encoder.onnx"


@pytest.fixture(scope="module")
def events_file(folder) -> Path:
    assert main(["export", str(folder / "events.safetensors"), str(folder / "events.onnx"), "--waveform"]) == 0
    return folder / "events.onnx"


@pytest.fixture(scope="module")
def fill_file(folder) -> Path:
    export(load_exportable(folder / "fill.safetensors"), folder / "fill.pt2", waveform=True)
    return folder / "fill.pt2"


def test_spectrograms_of_ten_lengths(folder, encoder_file):
    exportable, run = load_exportable(folder / "encoder.safetensors"), run_onnx(encoder_file)
    for number, rows in enumerate(TEN_LENGTHS):
        spec = torch.randn(1 + number % 3 if rows < 700 else 1, 1, rows * P, MODEL.mel_bins)
        assert largest(run(spec), eager(exportable, spec)) < 2e-5, rows


def test_waveforms_of_ten_lengths(folder, events_file):
    exportable, run = load_exportable(folder / "events.safetensors"), run_onnx(events_file)
    for number, rows in enumerate(TEN_LENGTHS):
        # From a single frame on; ends anywhere in a row of patches; the last is all that the positions cover.
        samples = 400 if rows == 1 else 400 + 160 * (rows * P - 1) - 77 * number if rows < 700 else 983_439
        wave = waveform(1 + number % 3 if rows < 700 else 1, samples)
        assert largest(run(wave), eager(exportable, wave)) < 1e-4, samples


def test_the_program_gives_the_same(folder, fill_file):
    """A clip shorter than `features.frames` is filled up to them with zeros that this classifier sees."""
    exportable, run = load_exportable(folder / "fill.safetensors"), run_program(fill_file)
    for clips, samples in ((1, 400), (3, 4000), (1, 48 * 160), (2, 48_000), (1, 983_439)):
        wave = waveform(clips, samples)
        assert largest(run(wave), eager(exportable, wave)) < 1e-4, samples
    classifier, spec = exportable.model, log_mel(waveform(1, 4000), FEATURES)
    assert spec.shape[2] == FEATURES.frames
    scores = classifier.probabilities(classifier(spec).clip)
    assert largest(run(waveform(1, 4000)), [scores.detach()]) < 1e-5


def test_the_program_runs_where_this_package_is_not(fill_file):
    code = (
        "import sys, torch\n"
        f"scores, = torch.export.load({str(fill_file)!r}).module()(torch.zeros(1, 4000))\n"
        "assert scores.shape == (1, 3) and not {'cat', 'cat_kernels'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"window": "povey", "preemphasis": 0.0},
        {"sample_rate": 8000, "low_freq": 50.0, "high_freq": -200.0},
        {"frame_length_ms": 32.0, "frame_shift_ms": 12.5, "window": "hamming", "mean": 1.0, "std": 0.25},
    ],
    ids=str,
)
def test_features_in_the_graph_are_log_mel(changed):
    features = FeatureConfig(**{"frames": 104, **changed})
    wave = waveform(2, features.samples - 3 * features.frame_shift)  # three frames of padding
    expected = log_mel(wave, features)
    error = (LogMel(features, 8)(wave) - expected).abs() * 2 * features.std
    assert error.max() < 3e-3  # nats; what `benchmarks.fbank` allows anywhere
    assert error.mean() < 1e-5


def test_the_graph_has_no_operator_of_ours(encoder_file, events_file):
    for file in (encoder_file, events_file):
        model = onnx.load(str(file))
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert not model.functions


def test_metadata(encoder_file, events_file, fill_file):
    props = ort.InferenceSession(str(events_file)).get_modelmeta().custom_metadata_map
    assert props["class_names"] == '["Dog", "Chat", "Kr\\u00e4he"]'
    about = metadata_of(events_file)
    assert about["class_names"] == ["Dog", "Chat", "Krähe"]
    assert (about["classes"], about["task"], about["input"]) == (["/m/1", "/m/2", "/m/3"], "events", "waveform")
    assert (about["sample_rate"], about["patch_size"], about["step"]) == (16000, 8, 7)
    assert about["features"] == to_mapping(FEATURES)
    assert about["outputs"] == ["scores", "frame_scores"]
    assert metadata_of(encoder_file)["outputs"] == ["clip", "cls", "frames", "patches"]
    assert metadata_of(fill_file)["padding"] == "fill"
    session = ort.InferenceSession(str(encoder_file))
    assert session.get_inputs()[0].shape == ["batch", 1, "frames", 32]
    assert [output.shape for output in session.get_outputs()][2] == ["batch", "rows", 16]


def test_int8(folder, capsys):
    """Eight bits for the encoder's matrices; features of eight bits would be wrong."""
    out = folder / "int8.onnx"
    assert main(["export", str(folder / "fill.safetensors"), str(out), "--waveform", "--quantise"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert metadata_of(out)["quantised"] == "int8, dynamic"
    nodes = onnx.load(str(out)).graph.node
    assert [n.op_type for n in nodes if any(name.startswith("log_mel.") for name in n.input)] == ["MatMul"] * 2
    assert "MatMulInteger" in {node.op_type for node in nodes}
    exportable, wave = load_exportable(folder / "fill.safetensors"), waveform(3, 9000)
    assert largest(run_onnx(out)(wave), eager(exportable, wave)) < 0.02


def test_the_encoder_of_a_classifier(folder):
    exportable = load_exportable(folder / "events.safetensors", encoder=True)
    assert exportable.about["kind"] == "encoder"
    assert torch.equal(exportable.model.cls, load_exportable(folder / "events.safetensors").model.encoder.cls)


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("out", "options", "sentence"),
    [
        ("x.torchscript", [], "expected a name that ends in .onnx or .pt2"),
        ("x.pt2", ["--quantise"], "what is quantised is an ONNX file"),
    ],
)
def test_a_name_that_says_nothing(folder, out, options, sentence, capsys):
    assert main(["export", str(folder / "encoder.safetensors"), str(folder / out), *options]) == 1
    assert sentence in capsys.readouterr().err
    assert not (folder / out).exists()


def test_not_a_checkpoint(folder, tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    for source in (tmp_path / "a.safetensors", tmp_path / "nowhere", tmp_path):
        assert main(["export", str(source), str(tmp_path / "x.onnx")]) == 1
        told = capsys.readouterr().err
        assert str(source) in told
        assert "fault of cat-audio" not in told
    assert not (tmp_path / "x.onnx").exists()


def test_a_file_of_somebody_else_stays(folder, tmp_path, capsys):
    for name, content in (("x.onnx", b"theirs"), ("x.pt2", b"PK\x05\x06" + bytes(18))):
        (tmp_path / name).write_bytes(content)
        assert main(["export", str(folder / "encoder.safetensors"), str(tmp_path / name)]) == 1
        assert "--overwrite" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content


def test_own_files_are_replaced_and_the_checkpoint_never(folder, encoder_file, fill_file, tmp_path, capsys):
    from cat.commands.export import _is_exported

    assert _is_exported(encoder_file)
    assert _is_exported(fill_file)
    (tmp_path / "x.onnx").hardlink_to(folder / "encoder.safetensors")
    assert main(["export", str(folder / "encoder.safetensors"), str(tmp_path / "x.onnx"), "--overwrite"]) == 1
    assert "that is never done" in capsys.readouterr().err


def test_a_graph_that_differs_is_not_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cat.export.write._gather_tokens", lambda tokens, visible, positions, cls, select, *, backend: (
        torch.nn.functional.pad(tokens, (0, 0, 1, 0))
    ))  # fmt: skip
    assert main(["export", str(folder / "encoder.safetensors"), str(tmp_path / "x.pt2")]) == 1
    assert "x.pt2 is not written: the exported graph differs from the model by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra(folder, tmp_path):
    code = (
        "import sys\nsys.modules['onnxscript'] = None\nfrom cat.commands import main\n"
        f"sys.exit(main(['export', {str(folder / 'encoder.safetensors')!r}, {str(tmp_path / 'x.onnx')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'cat-kernels[export]'" in done.stderr
    assert "Traceback" not in done.stderr
