"""Guides of a run, live and cached: the same losses wherever an encoder works, clips that it refuses, resuming."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.checkpoints import load_encoder
from cat.checkpoints import store as checkpoints
from cat.commands import main
from cat.config import ConfigError
from cat.data import Batch, Manifest, eval_batches, load_manifest, write_manifest
from cat.data.features import FeatureConfig
from cat.data.guides import CachedRows, Guides
from cat.encoders import FrozenEncoder, build_encoder, live, reading
from cat.encoders.embed import collect_embeddings, write_embeddings
from cat.encoders.jobs import EncoderError
from cat.encoders.live import InEachProcess, Listener, LiveRows, Waves
from cat.model import CAT
from cat.training.pretrain import pretrain, profile
from cat.training.pretraining import Pretraining
from cat.training.recipe import load_recipe
from cat.training.records import read_rows

soundfile = pytest.importorskip("soundfile")

RECIPE = """
model: {channels: [8, 8], embed_dim: 16, depth: 2, num_heads: 2, decoder_dim: 16, decoder_layers: 1, decoder_groups: 2}
objective: {global_loss_reduction: mean}
masks: {num_masks: 2}
features: {frames: 32}
data: {batch_size: 3, num_workers: 0, train: TRAIN}
optim: {lr: 3e-3, warmup_steps: 2, steps: 24}
ema: {start: 0.9, end: 0.99, steps: 20}
run:
  {threads: 1, log_every: 2, checkpoint_every: 50, eval_every: 3, device: cpu, tensorboard: false, figures: false,
   stop_at: 4}
"""
# Hears clips through a convolution, so that padding and neighbours would show; of what is louder than 0.9 nothing.
ENCODERS = """
import torch

class Small:
    sample_rate, min_samples = 8000, 800

    def __init__(self, name, dim, seed):
        self.name, self.dim = name, dim
        self.weight = torch.randn(dim, 1, 200, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def __call__(self, waveform, lengths=None):
        ends = [waveform.shape[1]] * len(waveform) if lengths is None else lengths.tolist()
        rows = []
        for clip, end in zip(waveform, ends):
            heard = torch.nn.functional.conv1d(clip[None, None, :end], self.weight, stride=200)
            rows.append(heard.abs().mean((0, 2)) / float(clip[:end].abs().max() < 0.9))
        return torch.stack(rows)

def small(device):
    return Small("small", 5, 0)

def other(device):
    return Small("other", 3, 1)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guides")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("valid", 3)):
        (folder / split).mkdir()
        for i in range(count):
            wave = 0.1 * random.standard_normal(int(random.integers(3000, 12000)))
            soundfile.write(folder / split / f"{i}.wav", wave, 16000)
    (folder / "encoders.py").write_text(ENCODERS)
    (folder / "minute.yaml").write_text(RECIPE.replace("TRAIN", str(folder / "train")))
    for name, size in (("small", 1), ("other", 4)):
        encoder = build_encoder(f"{folder / 'encoders.py'}:{name}")
        write_embeddings(load_manifest(folder / "train"), encoder, folder / f"{name}.npy", batch_size=size)
    return folder


def live_guide(place: Path, name: str = "small", guide: str = "g") -> str:
    return f"guides.{guide}.encoder={place / 'encoders.py'}:{name}"


def cached_guide(place: Path, name: str = "small", guide: str = "g") -> str:
    return f"guides.{guide}.embeddings={place / f'{name}.jsonl'}"


def run(place: Path, run_dir: Path, *changes: str, resume: bool = False) -> list[dict]:
    pretrain(load_recipe(place / "minute.yaml", changes), run_dir, resume=resume, progress=False)
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] in ("train", "valid")]


def heard_batches(encoder: FrozenEncoder, manifest: Manifest, size: int) -> list[Batch]:
    guides = Guides(waves={"g": Waves(encoder, manifest)})
    return list(eval_batches(manifest, FeatureConfig(frames=32), size, guides=guides))


def without_measure(rows: list[dict]) -> list[dict]:
    """But for what only cached guides have."""
    return [{key: value for key, value in row.items() if key != "regularisation_explained.g"} for row in rows]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    saved = checkpoints.load(checkpoints.newest(run_dir))
    return {f"model.{k}": v for k, v in saved.model.items()} | {f"moments.{k}": v for k, v in saved.optimizer.items()}


# ---------------------------------------------------------------- the same losses


def test_live_and_cached_give_the_same_losses(tmp_path, place):
    """To the last bit where the cache was made of a clip at a time; else to the rounding of batches."""
    cached = run(place, tmp_path / "cached", cached_guide(place))
    assert min(row["regularisation.g"] for row in cached) > 0.01
    cached = without_measure(cached)
    assert run(place, tmp_path / "0", live_guide(place)) == cached
    assert run(place, tmp_path / "2", live_guide(place), "data.num_workers=2") == cached
    assert run(place, tmp_path / "device", live_guide(place), "guides.g.where=device", "data.num_workers=1") == cached


def test_a_guide_is_what_the_objective_describes_under_another_name(tmp_path, place):
    train = [f"data.train={place / 'small.jsonl'}"]
    fields = {"weight": 2, "layer": 1, "distance": "l1", "normalise": "true", "schedule": "decay", "steps": 3}
    flat = run(place, tmp_path / "flat", *train, *(f"objective.regularisation_{k}={v}" for k, v in fields.items()))
    named = run(
        place, tmp_path / "named", *train, cached_guide(place), *(f"guides.g.{k}={v}" for k, v in fields.items())
    )
    assert [row["loss"] for row in named] == [row["loss"] for row in flat]
    for value in ("regularisation", "regularisation_explained", "regularisation_weight"):
        assert [row[f"{value}.g"] for row in named] == [row[value] for row in flat]
    assert {row["regularisation"] for row in named} == {0.0}
    assert [row["regularisation_weight.g"] for row in named] == [row["regularisation_weight"] for row in flat]
    ours, theirs = weights(tmp_path / "named"), weights(tmp_path / "flat")
    renamed = {name.replace("regularisers.g.", "regulariser."): tensor for name, tensor in ours.items()}
    assert renamed.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in renamed.items())


def test_long_clips_come_in_windows(tmp_path, place, monkeypatch):
    """By the training process too, which reads them itself."""
    for i, seconds in enumerate((0.5, 1.5, 2.5, 0.7)):
        wave = 0.1 * np.random.default_rng(i).standard_normal(int(16000 * seconds))
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000)
    monkeypatch.setattr(live, "MOST_SECONDS", 1)
    for module in (live, reading):
        monkeypatch.setattr(module, "WINDOW_SECONDS", 2)
    manifest, spec = load_manifest(tmp_path), f"{place / 'encoders.py'}:small"
    encoder = build_encoder(spec)
    expected = collect_embeddings(manifest, encoder, batch_size=1).rows
    rows = LiveRows(InEachProcess(spec), manifest)
    assert np.array_equal(np.stack([rows(i) for i in range(4)]), expected)
    (batch,) = heard_batches(encoder, manifest, 4)
    assert (batch.heard["g"].lengths > 0).tolist() == [True, False, False, True]
    (batch,) = Listener({"g": encoder}, torch.device("cpu"), torch.float32)(iter([batch]), manifest)
    assert np.array_equal(batch.guides["g"].numpy(), expected)


def test_a_network_with_threads_of_its_own_works_in_workers(tmp_path, place):
    """A session's threads do not come along when the training process forks: every worker has one of its own."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    matrix = onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((160, 4)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["audio", "w"], ["embedding"])],
        "net",
        [helper.make_tensor_value_info("audio", onnx.TensorProto.FLOAT, ["N", 160])],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["N", 4])],
        [matrix],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "net.onnx"
    )
    guide = f"guides.g.encoder=onnx:{tmp_path / 'net.onnx'}?sample_rate=8000"
    rows = [run(place, tmp_path / str(n), guide, f"data.num_workers={n}", "run.threads=2") for n in (0, 2)]
    assert rows[0] == rows[1]


def test_what_travels_to_workers_leaves_the_encoder_behind(place):
    encoder = InEachProcess(f"{place / 'encoders.py'}:small")
    rows = LiveRows(encoder, load_manifest(place / "train"))
    expected = rows(0)
    copied = pickle.loads(pickle.dumps(rows))
    assert copied.encoder._built is None
    assert np.array_equal(copied(0), expected)


# ---------------------------------------------------------------- are they followed?


class CutAtLayer1(CAT):
    def encode(self, spec: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        x, cls = super().encode(spec, visible)
        return x, {layer: token.detach() if layer == 1 else token for layer, token in cls.items()}


def test_guides_whose_head_is_not_wired_are_named(tmp_path, place, monkeypatch):
    """Live ones, and with no embeddings in data.train; looking for them changes no number."""
    monkeypatch.setattr(Pretraining, "network", CutAtLayer1)
    guides = [live_guide(place), "guides.g.layer=1", live_guide(place, "other", "h"), "run.stop_at=2"]
    rows = run(place, tmp_path / "run", *guides)
    (told,) = read_rows(tmp_path / "run" / "metrics.jsonl", "warning")
    assert told["text"].startswith("guides.g: L_r does not reach the student")
    assert run(place, tmp_path / "not", *guides, "run.guidance_share=0") == rows


def test_a_cached_guide_that_is_not_followed_is_named(tmp_path, place):
    """By a run whose data.train names no embeddings."""
    guide = [cached_guide(place), "guides.g.weight=1e-6", "run.guidance_share=0", "optim.lr=1e-9"]
    run(place, tmp_path / "silent", *guide, "run.stop_at=16")
    assert read_rows(tmp_path / "silent" / "metrics.jsonl", "warning") == []
    run(place, tmp_path / "run", *guide, "run.stop_at=16", "run.guidance_share=0.1")
    told = [row["text"] for row in read_rows(tmp_path / "run" / "metrics.jsonl", "warning")]
    assert told[0].startswith("guides.g: ")
    assert "guides.g: the student does not follow the guide" in told[-1]


# ---------------------------------------------------------------- clips that have no embedding


@pytest.mark.parametrize("where", ["worker", "device"])
def test_a_clip_that_the_encoder_refuses_gives_its_place_to_another(tmp_path, place, where):
    folder = tmp_path / "audio"
    folder.mkdir()
    for i, count in enumerate((8000, 1000, 9000, 7000)):  # 62 ms: enough for the student, not for the guide
        soundfile.write(folder / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(count), 16000)
    changes = [f"data.train={folder}", live_guide(place), f"guides.g.where={where}", "data.max_failed_share=0.5"]
    run(place, tmp_path / "run", *changes)
    (failure,) = read_rows(tmp_path / "run" / "failures.jsonl")
    assert failure["path"].endswith("1.wav")
    assert "too short: 500 samples at 8000 Hz, at least 800" in failure["reason"]


def test_an_embedding_that_is_not_finite(tmp_path, place):
    folder = tmp_path / "audio"
    folder.mkdir()
    for i, level in enumerate((0.1, 0.1, 0.95, 0.1)):
        soundfile.write(folder / f"{i}.wav", level * np.sign(np.random.default_rng(i).standard_normal(8000)), 16000)
    changes = [f"data.train={folder}", live_guide(place), "data.max_failed_share=0.5"]
    run(place, tmp_path / "run", *changes)
    (failure,) = read_rows(tmp_path / "run" / "failures.jsonl")
    assert failure["path"].endswith("2.wav")
    assert failure["reason"] == "small gave an embedding that is not finite"
    with pytest.raises(EncoderError, match=r"guides\.g: .*2\.wav: small gave .* not finite; .*guides\.g\.where=worker"):
        run(place, tmp_path / "other", *changes, "guides.g.where=device")


@pytest.mark.parametrize("where", ["worker", "device"])
def test_an_encoder_that_fails_names_the_clip_or_the_way_to_it(tmp_path, place, where):
    code = ENCODERS.replace("rows = []", "rows = []\n        if waveform.shape[1] < 2600: raise KeyError('surprise')")
    (tmp_path / "encoders.py").write_text(code)
    folder = tmp_path / "audio"
    folder.mkdir()
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", np.full(5000, 0.1), 16000)
    told = {
        "worker": r"small failed on .*audio/\d\.wav \(0\.3 s\): 'surprise'",
        "device": r"guides\.g: small failed on a batch of 3 clips: 'surprise' \(guides\.g\.where=worker encodes one",
    }
    changes = [f"data.train={folder}", live_guide(tmp_path), f"guides.g.where={where}", "data.num_workers=1"]
    with pytest.raises(EncoderError, match=told[where]):
        run(place, tmp_path / "run", *changes)


def test_validation_goes_without_a_guide_that_lacks_its_clips(tmp_path, place, capsys):
    valid = f"data.valid={place / 'valid'}"
    rows = run(place, tmp_path / "cached", cached_guide(place), valid)
    assert f"validation goes without the L_r of guides.g: {place / 'small.jsonl'} has no emb" in capsys.readouterr().err
    first = next(row for row in rows if row["kind"] == "valid")
    assert first["regularisation.g"] == 0
    assert first["loss"] == pytest.approx(first["regression"] + first["global"], rel=1e-6)
    rows = run(place, tmp_path / "live", live_guide(place), valid)
    assert min(row["regularisation.g"] for row in rows if row["kind"] == "valid") > 0
    assert run(place, tmp_path / "device", live_guide(place), "guides.g.where=device", valid) == rows
    flat = [f"data.train={place / 'small.jsonl'}", "objective.regularisation_weight=1", valid]
    rows = run(place, tmp_path / "flat", *flat)
    assert f"validation goes without L_r: {place / 'valid'} names no embeddings" in capsys.readouterr().err
    assert next(row for row in rows if row["kind"] == "valid")["regularisation"] == 0


# ---------------------------------------------------------------- resuming


def test_a_run_with_several_guides_goes_on(tmp_path, place):
    changes = [
        *(f"data.train={place / 'other.jsonl'}", "objective.regularisation_weight=0.5"),
        *(live_guide(place, guide="a"), "guides.a.layer=1", "guides.a.schedule=warmup", "guides.a.steps=3"),
        *(cached_guide(place, "other", guide="b"), "guides.b.distance=cosine", "guides.b.projection=external"),
    ]
    whole = run(place, tmp_path / "whole", *changes)
    run(place, tmp_path / "run", *changes, "run.stop_at=2")
    assert run(place, tmp_path / "run", *changes, resume=True) == whole
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    shapes = {name: tuple(t.shape) for name, t in ours.items() if name.startswith("model.regul") and "weight" in name}
    assert shapes == {
        "model.regulariser.weight": (3, 16),
        "model.regularisers.a.weight": (5, 16),
        "model.regularisers.b.weight": (16, 3),
    }
    row = whole[0]
    assert row["loss"] == pytest.approx(
        row["regression"] + row["global"] + 0.5 * row["regularisation"]
        + row["regularisation_weight.a"] * row["regularisation.a"] + row["regularisation.b"],
        rel=1e-5,
    )  # fmt: skip
    assert load_encoder(tmp_path / "run")[1].step == 4
    assert json.loads((checkpoints.newest(tmp_path / "run") / "state.json").read_text())["config"]["guides"]["a"]


def test_another_encoder_does_not_go_on(tmp_path, place):
    run(place, tmp_path / "run", live_guide(place), "run.stop_at=1")

    def refused(message: str, *changes: str) -> None:
        with pytest.raises(ConfigError, match=message):
            run(place, tmp_path / "run", *changes, resume=True)

    refused(r"guides\.g is another one .*the encoder was small \(\w{12}\), now other \(", live_guide(place, "other"))
    refused(r"guides\.g is another one .*the encoder was small \(\w{12}\), now other \(", cached_guide(place, "other"))
    refused(r"guides\.g\.weight was 1\.0, now 2\.0", live_guide(place), "guides.g.weight=2")
    refused(r"guides\.h\.weight was None, now 1\.0", live_guide(place), live_guide(place, guide="h"))
    refused(r"guides\.g\.weight was 1\.0, now None")
    changed = tmp_path / "encoders.py"
    changed.write_text(ENCODERS.replace('"small", 5, 0', '"small", 5, 7'))
    refused(r"the encoder was small \(\w{12}\), now small \(", live_guide(tmp_path))
    changed.write_text(ENCODERS)  # the same one from another place
    run(place, tmp_path / "run", live_guide(tmp_path), "guides.g.where=device", "run.stop_at=2", resume=True)


def test_a_run_goes_on_with_its_guide_cached(tmp_path, place, capsys):
    whole = run(place, tmp_path / "whole", live_guide(place))
    run(place, tmp_path / "run", live_guide(place), "run.stop_at=2")
    pretrain(load_recipe(place / "minute.yaml", [cached_guide(place)]), tmp_path / "run", resume=True)
    assert "guides.g.where was worker and is now cached: losses will agree up to rounding" in capsys.readouterr().err
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] in ("train", "valid")]
    assert without_measure(rows) == whole
    assert ["regularisation_explained.g" in row for row in rows] == [False, False, True, True]


def test_other_cached_embeddings_do_not_go_on(tmp_path, place):
    manifest, encoder = load_manifest(place / "train"), build_encoder(f"{place / 'encoders.py'}:small")
    write_embeddings(manifest, encoder, tmp_path / "small.npy", batch_size=1)
    run(place, tmp_path / "run", cached_guide(tmp_path), "run.stop_at=1")
    assert run(place, tmp_path / "run", cached_guide(place), "run.stop_at=2", resume=True)[-1]["step"] == 2  # moved
    encoder.weight += 1
    write_embeddings(manifest, encoder, tmp_path / "small.npy", batch_size=1)
    with pytest.raises(ConfigError, match=r"guides\.g is another one .*the rows are others"):
        run(place, tmp_path / "run", cached_guide(tmp_path), resume=True)


# ---------------------------------------------------------------- errors


def test_clips_are_known_by_where_they_lie(tmp_path, place):
    (tmp_path / "link").symlink_to(place / "train")
    rows = CachedRows(str(place / "small.jsonl"), load_manifest(tmp_path / "link"))
    known = np.load(place / "small.npy")
    assert np.array_equal(np.stack([rows(i) for i in range(6)]), known)
    some = tmp_path / "some.jsonl"
    write_manifest(load_manifest(place / "train").take(np.array([4, 1])), some)
    rows = CachedRows(str(place / "small.jsonl"), load_manifest(some))
    assert np.array_equal(np.stack([rows(0), rows(1)]), known[[4, 1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["guides.g.encoder=nowhere"], "encoder 'nowhere' is neither one of"),
        (["guides.g.weight=1"], "guides.g: encoder=None and embeddings=None; expected one of them"),
        (["guides.g.encoder=random", "guides.g.embeddings=a.jsonl"], "encoder='random' and embeddings='a.jsonl'"),
        (["guides.g.encoder=random", "guides.g.weight=0"], "guides.g: weight=0.0; expected a number above 0"),
        (["guides.g.encoder=random", "guides.g.layer=3"], "guides.g.layer=3; expected 0 to 2, the number of blocks"),
        (
            ["guides.g.encoder=random", "guides.g.schedule=stop"],
            "guides.g: steps=0; expected the updates that",
        ),
        (["guides.g.encoder=random", "guides.g.wieght=2"], "the nearest known one is 'guides.g.weight'"),
        (["guides.g.encoder=random", "guides.g.where=gpu"], "guides.g.where is gpu; expected one of auto, worker, dev"),
        (["guides.keys.encoder=random"], "guides.keys: not a name for a guide"),
        (["guides=random"], "guides is 'random'"),
        (["guides.g.embeddings={place}/train"], "{place}/train names no embeddings; expected the manifest that"),
        (
            ["guides.g.embeddings={place}/small.jsonl", "data.train={place}"],
            "has no embeddings of 3 of the 9 clips of {place}, the first {place}/valid/0.wav: run `cat-audio embed`",
        ),
    ],
)
def test_command_errors(tmp_path, place, capsys, changes, message):
    changes = [change.format(place=place) for change in changes]
    assert main(["pretrain", str(place / "minute.yaml"), f"run.dir={tmp_path}", "run.name=run", *changes]) == 1
    captured = capsys.readouterr()
    assert message.format(place=place) in captured.err
    assert "guides" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- in the training process


def test_a_profile_has_the_time_of_guides(tmp_path, place):
    changes = [live_guide(place), "guides.g.where=device", "run.stop_at=24"]
    assert profile(load_recipe(place / "minute.yaml", changes), tmp_path, steps=1).parts["guides"] > 0


class Stream:
    """A GPU's stream, and what happens on it, written down."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.events = log, 0

    def record_event(self) -> int:
        self.events += 1
        return self.events

    def wait_event(self, event: int) -> None:
        self.log.append(f"wait for {event}")


def test_a_gpu_encodes_a_batch_ahead_and_hands_over_its_rows(place, monkeypatch):
    """On a stream of its own; the update's waits for the rows of its batch, and not for the next one's."""
    manifest, log = load_manifest(place / "train"), []
    encoder = build_encoder(f"{place / 'encoders.py'}:small")
    listener = Listener({"g": encoder}, torch.device("cpu"), torch.float32)
    listener._stream, updates = Stream(log), Stream(log)
    listened = listener._listened
    monkeypatch.setattr(listener, "_listened", lambda *args: log.append("encode") or listened(*args))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: updates)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda rows, stream: log.append(f"keep for {stream is updates}"))
    inside = []

    @contextlib.contextmanager
    def stream(entered):
        inside.append(entered is listener._stream)
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    for number, batch in enumerate(listener(iter(heard_batches(encoder, manifest, 2)), manifest), start=1):
        assert np.array_equal(batch.guides["g"].numpy(), np.load(place / "small.npy")[2 * number - 2 : 2 * number])
        log.append(f"update {number}")
    ready = [[f"wait for {i}", "keep for True", f"update {i}"] for i in (1, 2, 3)]
    assert log == ["encode", "encode", *ready[0], "encode", *ready[1], *ready[2]]
    assert inside == [True] * 3


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_on_a_gpu_rows_are_those_of_the_cpu(place, dtype, tolerance):
    cuda, manifest = torch.device("cuda"), load_manifest(place / "train")
    expected = collect_embeddings(manifest, build_encoder("random")).rows
    encoder = build_encoder("random", device=cuda)
    batches = Listener({"g": encoder}, cuda, dtype)(iter(heard_batches(encoder, manifest, 2)), manifest)
    rows = torch.cat([batch.guides["g"] for batch in batches])
    assert (rows.device.type, rows.dtype) == ("cuda", torch.float32)
    np.testing.assert_allclose(rows.cpu().numpy(), expected, atol=tolerance)
