"""Encoders in ONNX and TFLite files: what goes in, which tensor comes out, what is said of misfits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat.commands import main
from cat.config import ConfigError
from cat.data.features import FeatureConfig, log_mel
from cat.encoders import FrozenEncoder, build_encoder
from cat.encoders.graphs import GraphError
from cat.encoders.mel import MelConfig, mel_filters, mel_spectrogram

WEIGHTS = np.random.default_rng(0).standard_normal((160, 6)).astype(np.float32)
MEL = "input=log-mel&mel.bins=8&mel.n_fft=128&mel.window=100&mel.hop=40"


def wave(samples: int, seed: int = 0, clips: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


def save_onnx(path, nodes, input_shape, weights=None, outputs=("scores",), kind=None):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes],
        "network",
        [helper.make_tensor_value_info("audio", kind or onnx.TensorProto.FLOAT, input_shape)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def product(path, input_shape):
    """audio @ WEIGHTS, the tensor "embedding", and a score of it, the only output."""
    nodes = [
        ("MatMul", ["audio", "weights"], ["embedding"], {}),
        ("ReduceSum", ["embedding"], ["scores"], {"keepdims": 0}),
    ]
    return save_onnx(path, nodes, input_shape, {"weights": WEIGHTS})


def means(path, shape, axes):
    """The means of a spectrogram over these axes."""
    nodes = [("ReduceMean", ["audio"], ["scores"], {"axes": axes, "keepdims": 0})]
    return save_onnx(path, nodes, shape)


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_a_waveform_is_heard_in_pieces_and_a_tensor_inside_is_read(tmp_path, batch):
    """Whether the file leaves the number of pieces open or not; the last piece ends with the clip."""
    path = product(tmp_path / "net.onnx", [batch, 160])
    encoder = build_encoder(f"onnx:{path}?sample_rate=8000&output=embedding&hop=80&scale=2")
    assert isinstance(encoder, FrozenEncoder)
    assert (encoder.sample_rate, encoder.dim, encoder.piece) == (8000, 6, 160)
    clips, lengths = wave(500, clips=2), torch.tensor([500, 100])
    long, short = clips[0].numpy(), np.tile(clips[1, :100].numpy(), 2)[:160]
    starts = [0, 80, 160, 240, 320, 340]
    expected = np.stack([np.mean([2 * long[s : s + 160] @ WEIGHTS for s in starts], axis=0), 2 * short @ WEIGHTS])
    found = encoder(clips, lengths)
    torch.testing.assert_close(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(clips[1:, :100])[0], found[1], rtol=1e-5, atol=1e-6)
    padded = build_encoder(f"onnx:{path}?sample_rate=8000&output=embedding&short=zeros")(clips[1:, :100])
    torch.testing.assert_close(padded[0].numpy(), clips[1, :100].numpy() @ WEIGHTS[:100], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "shape", "axes"),
    [("B1TF", ["N", 1, 9, 8], [1, 2]), ("BTF1", [1, 9, 8, 1], [1, 3]), ("BF1T", ["N", 8, 1, 9], [2, 3]),
     ("TF", [9, 8], [0])],
)  # fmt: skip
def test_log_mel_in_the_order_of_the_file_s_axes(tmp_path, layout, shape, axes):
    path = means(tmp_path / "net.onnx", shape, axes)
    encoder = build_encoder(f"onnx:{path}?sample_rate=8000&layout={layout}&hop=3&{MEL}")
    clip = wave(100 + 20 * 40)[0]  # 21 frames
    config = MelConfig(bins=8, n_fft=128, window=100, hop=40)
    frames = mel_spectrogram(clip, config, 8000)
    assert frames.shape == (21, 8)
    expected = torch.stack([frames[s : s + 9].mean(0) for s in (0, 3, 6, 9, 12)]).mean(0)
    torch.testing.assert_close(encoder(clip[None])[0], expected, rtol=1e-4, atol=1e-4)


def test_kaldi_s_features_of_the_whole_clip(tmp_path):
    path = means(tmp_path / "net.onnx", ["N", "T", 128], [1])
    encoder = build_encoder(f"onnx:{path}?sample_rate=16000&input=fbank")
    clip = wave(400 + 160 * 30)
    expected = log_mel(clip, FeatureConfig(frames=31))[0, 0].mean(0)
    torch.testing.assert_close(encoder(clip)[0], expected, rtol=1e-4, atol=1e-4)
    assert encoder(wave(100)).isfinite().all()


def test_axes_of_the_output(tmp_path):
    """D in the middle, time behind it: (B, D, T)."""
    path = save_onnx(tmp_path / "net.onnx", [("Abs", ["audio"], ["scores"], {})], ["N", 4, "T"])
    spec = f"onnx:{path}?sample_rate=8000&{MEL.replace('bins=8', 'bins=4')}&layout=BFT"
    clip = wave(2000)
    frames = mel_spectrogram(clip[0], MelConfig(bins=4, n_fft=128, window=100, hop=40), 8000).abs()
    found = build_encoder(f"{spec}&output_layout=BDT")(clip)[0]
    torch.testing.assert_close(found, frames.mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(GraphError, match=r"shape \(1, 4, .*not BD1?; expected output_layout"):
        build_encoder(f"{spec}&output_layout=BD")


def test_settings_stand_beside_the_file_and_may_be_changed_behind_it(tmp_path):
    path = product(tmp_path / "net.onnx", ["N", 160])
    (tmp_path / "net.onnx.yaml").write_text("sample_rate: 8000\noutput: embedding\n")
    encoder, other = build_encoder(f"onnx:{path}"), build_encoder(f"onnx:{path}?sample_rate=4000")
    assert (encoder.sample_rate, other.sample_rate, encoder.dim) == (8000, 4000, 6)
    before = encoder.name
    assert build_encoder(f"onnx:{path}").name == before
    (tmp_path / "net.onnx.yaml").write_text("sample_rate: 8000\noutput: embedding\nhop: 80\n")
    assert build_encoder(f"onnx:{path}").name != before  # embeddings by these settings are others


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ("", ConfigError, r"net.onnx.yaml, or behind the '\?': sample_rate is missing"),
        ("sample_rate=8000&pice=3", ConfigError, "unknown key 'pice'; the nearest known one is 'piece'"),
        (
            "sample_rate=8000&output=pooled",
            GraphError,
            r"no tensor 'pooled'; expected output=NAME, .*\(scores\).*embedding",
        ),
        ("sample_rate=8000&piece=80", GraphError, "piece is 80, but the file takes 160"),
        ("sample_rate=8000&hop=200&piece=160", ConfigError, "hop is 200 and piece 160"),
        ("sample_rate=8000&layout=BTT", GraphError, "has the shape .* which is not BTT; expected layout"),
        ("sample_rate=8000&input=log-mel&layout=BF", ConfigError, "layout is 'BF'; expected letters of BTF1"),
        (
            "sample_rate=8000&input=log-mel&layout=BTF",
            GraphError,
            "has the shape .* which is not BTF with 128 mel bins",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, error, message):
    path = product(tmp_path / "net.onnx", ["N", 160])
    with pytest.raises(error, match=message):
        build_encoder(f"onnx:{path}?{changes}" if changes else f"onnx:{path}")


def test_files_that_are_no_networks(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no network at all")
    with pytest.raises(GraphError, match=r"bad.onnx: not a readable ONNX file"):
        build_encoder(f"onnx:{tmp_path / 'bad.onnx'}?sample_rate=8000")
    with pytest.raises(FileNotFoundError, match=r"none.onnx: no such file"):
        build_encoder(f"onnx:{tmp_path / 'none.onnx'}?sample_rate=8000")
    whole = save_onnx(
        tmp_path / "q.onnx", [("Identity", ["audio"], ["scores"], {})], ["N", 160], kind=onnx.TensorProto.UINT8
    )
    with pytest.raises(GraphError, match=r"input audio is tensor\(uint8\); expected tensor\(float\)"):
        build_encoder(f"onnx:{whole}?sample_rate=8000")


# ---------------------------------------------------------------- TFLite


def save_tflite(path) -> None:
    """audio (?, 160) times WEIGHTS, "embedding"; less than 0 made 0, "scores", the only output."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'cat-kernels[tflite]'")
    flatbuffers = pytest.importorskip("flatbuffers")

    def tensor(name, shape, buffer, signature=None):
        made = schema.TensorT()
        made.name, made.shape, made.buffer, made.shapeSignature = name, shape, buffer, signature
        made.type = schema.TensorType.FLOAT32
        return made

    def operator(code, inputs, outputs, kind=schema.BuiltinOptions.NONE, options=None):
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = code, inputs, outputs
        made.builtinOptionsType, made.builtinOptions = kind, options
        return made

    def code(builtin):
        made = schema.OperatorCodeT()
        made.builtinCode = made.deprecatedBuiltinCode = builtin
        made.version = 1
        return made

    empty, weights = schema.BufferT(), schema.BufferT()
    weights.data = np.frombuffer(np.ascontiguousarray(WEIGHTS.T).tobytes(), np.uint8)
    graph = schema.SubGraphT()
    graph.tensors = [
        tensor("audio", [1, 160], 0, [-1, 160]),
        tensor("weights", [6, 160], 1),
        tensor("embedding", [1, 6], 0, [-1, 6]),
        tensor("scores", [1, 6], 0, [-1, 6]),
    ]
    full = schema.BuiltinOptions.FullyConnectedOptions
    graph.operators = [
        operator(0, [0, 1, -1], [2], full, schema.FullyConnectedOptionsT()),
        operator(1, [2], [3]),
    ]
    graph.inputs, graph.outputs = [0], [3]
    model = schema.ModelT()
    model.version, model.subgraphs, model.buffers = 3, [graph], [empty, weights]
    model.operatorCodes = [code(schema.BuiltinOperator.FULLY_CONNECTED), code(schema.BuiltinOperator.RELU)]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))


def test_a_network_in_a_file_embeds_in_several_processes(tmp_path):
    """Made with one thread, it has none that another process would wait for."""
    soundfile = pytest.importorskip("soundfile")
    for index in range(4):
        soundfile.write(tmp_path / f"{index}.wav", wave(900, seed=index)[0].numpy(), 8000)
    spec = f"onnx:{product(tmp_path / 'net.onnx', ['N', 160])}?sample_rate=8000&output=embedding"
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.npy"
        words = ["--encoder", spec, "-o", str(out), "--batch-size", "2", "--jobs", str(jobs), "--quiet"]
        assert main(["embed", str(tmp_path), *words]) == 0
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()


def test_a_tflite_file_gives_its_output_or_a_tensor_inside(tmp_path):
    path = tmp_path / "net.tflite"
    save_tflite(path)
    clips = wave(400, clips=2)
    pieces = [clips.numpy()[:, start : start + 160] @ WEIGHTS for start in (0, 160, 240)]
    inside = build_encoder(f"tflite:{path}?sample_rate=8000&output=embedding")(clips)
    torch.testing.assert_close(inside.numpy(), np.mean(pieces, axis=0), rtol=1e-4, atol=1e-5)
    scores = build_encoder(f"tflite:{path}?sample_rate=8000")(clips)
    torch.testing.assert_close(scores.numpy(), np.maximum(pieces, 0).mean(axis=0), rtol=1e-4, atol=1e-5)
    with pytest.raises(GraphError, match=r"no tensor 'x'; expected output=NAME, .*\(scores\)"):
        build_encoder(f"tflite:{path}?sample_rate=8000&output=x")
    (tmp_path / "cut.tflite").write_bytes(path.read_bytes()[:200])
    with pytest.raises(GraphError, match=r"cut.tflite: ai-edge-litert cannot run it"):
        build_encoder(f"tflite:{tmp_path / 'cut.tflite'}?sample_rate=8000")
    (tmp_path / "bad.tflite").write_bytes(b"no network")
    with pytest.raises(GraphError, match="not a TFLite file"):
        build_encoder(f"tflite:{tmp_path / 'bad.tflite'}?sample_rate=8000")


# ---------------------------------------------------------------- log-mel


@pytest.mark.slow  # importing librosa takes 4 s
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": "htk", "norm": "none", "low": 125.0, "high": 7500.0, "power": 1.0}, {"center": True, "log": "db"}],
)
def test_mel_spectrograms_are_librosa_s(options):
    librosa = pytest.importorskip("librosa")
    config = MelConfig(bins=40, n_fft=512, hop=160, **options)
    clip = wave(8000)[0]
    mel = librosa.feature.melspectrogram(
        y=clip.numpy(), sr=16000, n_fft=512, hop_length=160, n_mels=40, center=config.center, pad_mode="constant",
        fmin=config.low, fmax=config.high or None, power=config.power, htk=config.scale == "htk",
        norm=None if config.norm == "none" else "slaney",
    )  # fmt: skip
    mel = np.log10(np.maximum(mel, 1e-10)) * 10 if config.log == "db" else np.log(np.maximum(mel, 1e-10))
    torch.testing.assert_close(mel_spectrogram(clip, config, 16000).numpy(), mel.T, rtol=1e-3, atol=1e-3)


def test_frames_of_a_window_shorter_than_its_transform_begin_where_they_say():
    config = MelConfig(bins=64, n_fft=512, window=400, hop=160, scale="htk", norm="none", offset=1e-3, power=1.0)
    clip = torch.zeros(400 + 160)
    clip[400] = 1.0  # behind the first frame, and inside the second
    first, second = mel_spectrogram(clip, config, 16000)
    torch.testing.assert_close(first, torch.full((64,), 1e-3).log(), rtol=1e-3, atol=1e-3)
    assert second.max() > first.max() + 1


def test_triangles_straight_in_mel_sum_to_one_between_the_first_and_last_peak():
    config = MelConfig(bins=20, n_fft=512, low=125.0, high=7500.0, scale="htk", norm="none", triangles="mel")
    filters = mel_filters(config, 16000)
    peaks = filters.argmax(dim=1)
    torch.testing.assert_close(filters[:, peaks[0] + 1 : peaks[-1]].sum(0).mean(), torch.tensor(1.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"window": 3000}, "window is 3000; expected 0 to n_fft"),
        ({"low": 500.0, "high": 400.0}, "expected low below high"),
        ({"floor": 0.0}, "silence has no logarithm"),
        ({"std": 0.0}, "std is 0"),
        ({"hop": 0}, "hop is 0"),
    ],
)
def test_impossible_spectrograms(bad, message):
    with pytest.raises(ValueError, match=message):
        MelConfig(**bad)
    with pytest.raises(ValueError, match="expected them within 0 to 4000"):
        mel_filters(MelConfig(high=7500.0), 8000)
