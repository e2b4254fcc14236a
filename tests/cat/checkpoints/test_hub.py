"""Folders for the hub: the same model back, strictly, by our own code and by transformers', with and without `cat`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cat import CATClassifier, CATEncoder, load_encoder
from cat.checkpoints import CheckpointError, ClassifierInfo, load_classifier, store
from cat.checkpoints.hub import EncoderConfig, Origin
from cat.config import ConfigError
from cat.data.features import FeatureConfig
from cat.model import Classifier, Encoder, HeadConfig, ModelConfig

ROOT = Path(__file__).parents[3]
MODEL = ModelConfig(channels=(8, 16), embed_dim=32, depth=2, num_heads=2, decoder_dim=32, kernels="reference")
PATCH = dataclasses.replace(MODEL, stem="patch", resolutions=(16,), channels=())
FEATURES = FeatureConfig(frames=64)


def build(model: ModelConfig = MODEL, pooling: str = "both") -> CATEncoder:
    torch.manual_seed(0)
    return CATEncoder(EncoderConfig(model, FEATURES, pooling))


def clips() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(n, generator=generator) for n in (3000, 9000, 10480)]


@pytest.fixture
def folder(tmp_path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, file: str = "config.json", **values) -> None:
    old = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in {**old, **values}.items() if v is not ...}))


def contents(folder: Path) -> dict[str, object]:
    """Of safetensors the tensors: their metadata has no order."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): tensors(path) or path.read_bytes() for path in files}


def tensors(path: Path) -> dict[str, bytes]:
    loaded = load_file(path) if path.suffix == ".safetensors" else {}
    return {name: tensor.numpy().tobytes() for name, tensor in loaded.items()}


def run_without(hidden: tuple[str, ...], code: str) -> None:
    """In an interpreter that cannot import the modules ``hidden``."""
    start = f"import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n"
    done = subprocess.run([sys.executable, "-c", start + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_folder_gives_the_same_model_back(folder):
    expected, found = build()(clips(), 16000), CATEncoder.from_pretrained(folder)
    assert found.config == dataclasses.replace(build().config, model=dataclasses.replace(MODEL, kernels="auto"))
    torch.testing.assert_close(found(clips(), 16000).patches, expected.patches)
    assert CATEncoder.from_pretrained(str(folder), pooling="cls", revision="main").dim == 32
    encoder, info = load_encoder(folder)  # as any other checkpoint
    assert torch.equal(encoder.cls, found.encoder.cls)
    assert (info.model, info.features) == (found.config.model, FEATURES)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_a_folder_written_again_is_the_same(folder, tmp_path):
    (folder / "README.md").write_text("# My own words\n")
    CATEncoder.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_runs_and_files_are_taken_too(tmp_path):
    encoder = build().encoder
    config = {"model": dataclasses.asdict(MODEL), "features": dataclasses.asdict(FEATURES)}
    tensors = {f"student.{name}": tensor for name, tensor in encoder.state_dict().items()}
    store.save(tmp_path / "run" / "checkpoints", step=7, model=tensors, optimizer={}, config=config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
    expected = build(pooling="mean")(clips(), 16000).clip
    for path in (tmp_path / "run", checkpoint, checkpoint / "model.safetensors"):
        assert torch.equal(CATEncoder.from_pretrained(path)(clips(), 16000).clip, expected)
    with pytest.raises(CheckpointError, match=r"no tensors teacher.\*"):
        CATEncoder.from_pretrained(tmp_path / "run", weights="teacher")


def classifier() -> CATClassifier:
    torch.manual_seed(0)
    head, classes, names = HeadConfig(loss="bce"), ("/m/1", "/m/2"), ("Dog", "Cät")
    config = {"data": {"train": "/home/me/train.jsonl"}, "encoder": "/home/me/runs/tiny"}
    info = ClassifierInfo(Path("x"), 3, "multi-label", classes, names, MODEL, head, FEATURES, "mask", config)
    return CATClassifier(Classifier(MODEL, head, 2).eval(), info)


def test_a_classifier_is_one_for_all_readers(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path / "model")
    expected = model(clips(), 16000).scores
    found = CATClassifier.from_pretrained(tmp_path / "model", device="cpu")
    assert torch.equal(found(clips(), 16000).scores, expected)
    loaded, info = load_classifier(tmp_path / "model")
    for read in (found.info, info):
        assert (read.classes, read.class_names, read.padding, read.task) == (
            model.info.classes, model.info.class_names, "mask", "multi-label",
        )  # fmt: skip
    assert torch.equal(loaded.head.linear.weight, model.model.head.linear.weight)
    encoder = CATEncoder.from_pretrained(tmp_path / "model")
    assert torch.equal(encoder.encoder.cls, model.model.encoder.cls)
    card = (tmp_path / "model" / "README.md").read_text()
    for words in (
        'pipeline_tag: "audio-classification"', "2 classes: `Dog`, `Cät`.", "on `train.jsonl`. Begun with", "`tiny`"
    ):  # fmt: skip
        assert words in card
    found.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


def test_a_classifier_of_something_else(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is an encoder and has no classes"):
        CATClassifier.from_pretrained(folder)
    classifier().save_pretrained(tmp_path / "classes")
    head = {"head": {"kind": "frames", "pooling": "attention", "loss": "bce"}}
    for values, error, words in (
        ({"classes": ["a"]}, ConfigError, "1 classes with 2 names"),
        ({"classes": ["a"], "class_names": ["a"]}, CheckpointError, "head.linear.weight is .*expected"),
        (head, CheckpointError, "missing .first: head.attention.weight"),
        ({"task": "singing"}, ConfigError, "task is 'singing'"),
        ({"padding": "none"}, ConfigError, "padding"),
        ({"head": {"knid": "clip"}}, ConfigError, "head.knid"),
    ):
        before = (tmp_path / "classes" / "config.json").read_bytes()
        change(tmp_path / "classes", **values)
        with pytest.raises(error, match=words):
            CATClassifier.from_pretrained(tmp_path / "classes")
        (tmp_path / "classes" / "config.json").write_bytes(before)


# ------------------------------------------------------------------------------------------------ strict


def test_a_key_that_nobody_knows_is_named(folder):
    change(folder, poolings="mean")
    with pytest.raises(ConfigError, match=r"config.json: .*poolings.*pooling"):
        CATEncoder.from_pretrained(folder)


def test_what_transformers_adds_is_no_unknown_key(folder):
    change(folder, transformers_version="5.0", dtype="float32")
    CATEncoder.from_pretrained(folder)


@pytest.mark.parametrize(("values", "error", "words"), [
    ({"features": ...}, ConfigError, "features is missing"),
    ({"model": ...}, ConfigError, "model is missing"),
    ({"model": {}}, CheckpointError, "tensors do not fit the model"),
    ({"model": {"depth": 3, "channels": [8, 16], "embed_dim": 32, "num_heads": 2}}, CheckpointError, "missing"),
    ({"model": {"depth": 2, "channels": [8, 16], "embed_dim": 64, "num_heads": 2}}, CheckpointError, "another shape"),
    ({"model": {"depht": 2}}, ConfigError, "model.depht.*model.depth"),
    ({"pooling": "max"}, ConfigError, "pooling must be one of mean, cls, both; got 'max'"),
    ({"format_version": 2}, ConfigError, "format_version is 2; this version reads 1"),
    ({"format_version": ...}, ConfigError, "format_version is None"),
    ({"model_type": "bert"}, CheckpointError, "model_type 'bert'; expected 'cat-audio'"),
])  # fmt: skip
def test_a_configuration_of_something_else(folder, values, error, words):
    change(folder, **values)
    with pytest.raises(error, match=words):
        CATEncoder.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_configuration_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CATEncoder.from_pretrained(folder)


def test_tensors_too_few_and_too_many_are_named(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, changed in (
        ("encoder.norm.bias", {k: v for k, v in tensors.items() if k != "encoder.norm.bias"}),
        ("encoder.other", {**tensors, "encoder.other": torch.zeros(1)}),
        ("head.linear.bias", {**tensors, "head.linear.bias": torch.zeros(1)}),  # and no classifier's configuration
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"1 (missing|unknown) \(first: {name}\)"):
            CATEncoder.from_pretrained(folder)


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model.safetensors.*pickles such as pytorch_model.bin are not read"):
        CATEncoder.from_pretrained(folder)


def test_nothing_of_the_users_is_written_over(folder, tmp_path, monkeypatch):
    before = contents(tmp_path)
    for path in (folder, folder / "README.md"):
        with pytest.raises(FileExistsError, match="expected a new or empty folder"):
            build().save_pretrained(path)
    (tmp_path / "empty").mkdir()
    build().save_pretrained(tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(folder)
    monkeypatch.setattr("cat.checkpoints.hub.shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        build().save_pretrained(tmp_path / "other")
    assert {name for name in contents(tmp_path) if not name.startswith("empty")} == set(before)
    with pytest.raises(ValueError, match=r"license is 'mit', but the model came with a model card, .*README"):
        CATEncoder.from_pretrained(folder).save_pretrained(tmp_path / "other", license="mit")
    with pytest.raises(ValueError, match="config is not the model's own"):
        build().save_pretrained(tmp_path / "other", config={"a": 1})


# ------------------------------------------------------------------------------------------------ the card


def test_the_card_says_what_the_checkpoint_does(tmp_path):
    trained = {
        "data": {"train": "/home/me/secret/fsd50k.jsonl", "batch_size": 12},
        "optim": {"lr": 0.001, "betas": [0.9, 0.95]},
        "ema": {"start": 0.998},
        "run": {"seed": 3, "dir": "/home/me/runs"},
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    scores = {"step": 70, "valid": {"accuracy": 0.5}, "test": {"accuracy": 0.256789, "unreadable": 0}}
    (tmp_path / "run" / "scores.json").write_text(json.dumps(scores))
    evaluated = {"checkpoint": {"step": 70}, "data": {"source": "/home/me/birds.jsonl"}, "metrics": {"mAP": 0.75}}
    (tmp_path / "run" / "evaluation" / "birds").mkdir(parents=True)
    (tmp_path / "run" / "evaluation" / "birds" / "evaluation.json").write_text(json.dumps(evaluated))
    cards = {}
    for step in (70, 80):
        origin = Origin(trained, step, tmp_path / "run" / "checkpoints" / f"step-000000{step}" / "model.safetensors")
        torch.manual_seed(0)
        encoder = CATEncoder(EncoderConfig(MODEL, FEATURES), encoder=Encoder(MODEL), origin=origin)
        encoder.save_pretrained(tmp_path / f"{step}", license="cc-by-4.0")
        cards[step] = (tmp_path / f"{step}" / "README.md").read_text()
    card = cards[70]
    yaml = pytest.importorskip("yaml")
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["library_name"]) == ("cc-by-4.0", "cat-kernels")
    assert "Trained on `fsd50k.jsonl`." in card
    assert "home" not in card
    for row in ("| optim.lr | `0.001` |", "| ema.start | `0.998` |", "| step | `70` |", "| run.seed | `3` |"):
        assert row in card
    assert "| `test` | `accuracy` | 0.2568 |" in card
    assert "| `birds.jsonl` | `mAP` | 0.75 |" in card
    assert "accuracy" not in cards[80]  # another checkpoint of the run has other scores
    assert "None were found" in cards[80]


def test_a_card_invents_nothing(folder):
    card = (folder / "README.md").read_text()
    assert "license:" not in card
    for words in ("does not say what it was trained on", "has named none", "The checkpoint has none."):
        assert words in card


# ------------------------------------------------------------------------------------------------ the hub


class StandIn:
    """In place of huggingface_hub.HfApi."""

    def __init__(self, **options):
        StandIn.calls = [("token", options)]

    def create_repo(self, **options):
        StandIn.calls.append(("create", options))
        return type("Repo", (), {"repo_id": options["repo_id"]})

    def upload_folder(self, **options):
        StandIn.calls.append(("upload", options, contents(Path(options["folder_path"]))))
        return "https://hub/commit"


def test_pushing_uploads_a_folder(folder, tmp_path, monkeypatch):
    hub_mixin = pytest.importorskip("huggingface_hub.hub_mixin")
    monkeypatch.setattr(hub_mixin, "HfApi", StandIn)
    model = CATEncoder.from_pretrained(folder)
    assert isinstance(model, hub_mixin.PyTorchModelHubMixin)
    assert model.push_to_hub("me/cat", private=True, token="t") == "https://hub/commit"
    (_, made), (_, upload, files) = StandIn.calls[1:]
    assert made == {"repo_id": "me/cat", "private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/cat"
    assert files == contents(folder)
    address = build().save_pretrained(tmp_path / "b", push_to_hub=True, repo_id="me/b", license="mit")
    assert address == "https://hub/commit"
    assert StandIn.calls[-1][2] == contents(tmp_path / "b")
    assert b'license: "mit"' in StandIn.calls[-1][2]["README.md"]


def test_a_name_on_the_hub_is_downloaded(folder, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"]))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    model = CATEncoder.from_pretrained("me/cat", revision="v1", pooling="cls")
    assert torch.equal(model.encoder.cls, build().encoder.cls)
    assert model.dim == 32
    assert {name for _, name, _ in asked} == {"config.json", "model.safetensors"}
    assert {(repo, revision) for repo, _, revision in asked} == {("me/cat", "v1")}
    change(folder, poolings=1)
    with pytest.raises(ConfigError, match="poolings"):
        CATEncoder.from_pretrained("me/cat", revision="v1")


@pytest.mark.parametrize("name", ["me/not-there", "runs/a/b/c", "../nothing"])
def test_a_name_that_is_nowhere(name, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=f"{name} does not exist here, and could not be had from the hub; expected"
    ):
        CATEncoder.from_pretrained(name)


def test_folders_need_no_huggingface_hub(folder, tmp_path):
    code = f"""
from cat import CATEncoder
model = CATEncoder.from_pretrained({str(folder)!r})
model.save_pretrained({str(tmp_path / "again")!r})
for call in (lambda: model.push_to_hub("me/cat"), lambda: CATEncoder.from_pretrained("me/cat")):
    try:
        call()
    except ImportError as error:
        assert "pip install 'cat-kernels[hub]'" in str(error), error
    else:
        raise SystemExit("no error")
"""
    run_without(("huggingface_hub", "transformers"), code)
    assert contents(tmp_path / "again") == contents(folder)


# ------------------------------------------------------------------------------------------------ transformers

WITH_TRANSFORMERS = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel

def refused(call, words):
    try:
        call()
    except ValueError as error:
        assert words in str(error)
    else:
        raise SystemExit(words)

clips = [clip for _, clip in sorted(load_file(data).items())]
for folder in folders:
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model.encoder).__module__.startswith("cat.model") == ours
    with torch.no_grad():
        out = model(**extractor(clips, sampling_rate=16000), output_hidden_states=True)
        alone = model(**extractor(clips[0], sampling_rate=16000))
    torch.testing.assert_close(alone.pooler_output[0], out.pooler_output[0], atol=1e-5, rtol=1e-5)
    assert len(out.hidden_states) == 3
    found = {"tokens": out.last_hidden_state, "pooled": out.pooler_output, "first": out.hidden_states[0]}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder + "/out")

refused(lambda: extractor(clips, sampling_rate=8000), "expected 16000")
refused(lambda: extractor([clips[0][:100]], sampling_rate=16000), "at least 400 samples")
tensors = load_file(folder + "/model.safetensors")
del tensors["encoder.norm.bias"]
save_file(tensors, folder + "/model.safetensors", metadata={"format": "pt"})
refused(lambda: AutoModel.from_pretrained(folder, trust_remote_code=True), "encoder.norm.bias")
"""


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(), ("cat", "cat_kernels")], ids=["with cat", "without"])
def test_transformers_load_it_with_and_without_us(hidden, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoders = {str(tmp_path / name): build(model) for name, model in (("multires", MODEL), ("patch", PATCH))}
    for folder, encoder in encoders.items():
        encoder.save_pretrained(folder)
    data = str(tmp_path / "clips.safetensors")
    save_file({str(number): clip for number, clip in enumerate(clips())}, data)
    run_without(hidden, f"folders, data, ours = {list(encoders)}, {data!r}, {not hidden}\n{WITH_TRANSFORMERS}")
    for folder, encoder in encoders.items():
        found, expected = load_file(f"{folder}/out"), encoder(clips(), 16000, layers=[0])
        torch.testing.assert_close(found["pooled"], expected.clip, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["tokens"][:, 1:], expected.patches, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found["first"][:, 1:], expected.layers[0].patches, atol=1e-4, rtol=1e-4)
