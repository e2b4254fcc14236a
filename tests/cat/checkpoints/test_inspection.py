"""`cat-audio checkpoints`: what is listed, found damaged, averaged and exported."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cat.checkpoints import CheckpointError, load_encoder, store
from cat.checkpoints.average import average
from cat.checkpoints.inspection import contents, listed, members, verify
from cat.commands import main
from cat.config import to_mapping
from cat.data.features import FeatureConfig
from cat.encoders import CATEncoder
from cat.model import CAT, ModelConfig
from cat.prediction import CATClassifier

MODEL = ModelConfig(
    channels=(8, 8), embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_layers=1, decoder_groups=2
)
CONFIG = {"model": to_mapping(MODEL), "features": to_mapping(FeatureConfig(frames=64))}
SCORES = {1: 0.3, 2: 0.1, 4: None}


def save(directory: Path, step: int, config: dict = CONFIG, score: float | None = None) -> Path:
    torch.manual_seed(step)
    model = CAT(MODEL).state_dict()
    moments = {f"exp_avg.{name}": torch.zeros_like(t) for name, t in model.items() if name.startswith("student.")}
    return store.save(directory, step=step, model=model, optimizer=moments, config=config, score=score)


@pytest.fixture
def run(tmp_path) -> Path:
    for step, score in SCORES.items():
        save(tmp_path / "run" / "checkpoints", step, score=score)
    return tmp_path / "run"


def command(capsys, *words, code: int = 0):
    """Its JSON, or where it failed what it said."""
    found = main(["checkpoints", *map(str, words), "--json"])
    told = capsys.readouterr()
    assert found == code, told.err
    return json.loads(told.out) if told.out else told.err


def test_what_is_listed_and_what_is_in_it(run, capsys):
    rows = command(capsys, "list", run)
    assert [(row["step"], row["score"], row["newest"], row["best"]) for row in rows] == [
        (1, 0.3, False, False), (2, 0.1, False, True), (4, None, True, False),
    ]  # fmt: skip
    assert [row["bytes"] for row in rows] == [sum(f.stat().st_size for f in p.iterdir()) for p in members(run)]
    (found,) = command(capsys, "inspect", run)
    assert (found["step"], found["config"]) == (4, CONFIG)
    assert found["files"]["model.safetensors"]["student.cls"] == {"dtype": "F32", "shape": [1, 1, 16]}
    (file,) = command(capsys, "inspect", members(run)[0] / "model.safetensors")
    assert (file["step"], list(file["files"])) == (1, ["model.safetensors"])

    assert main(["checkpoints", "list", str(run)]) == main(["checkpoints", "inspect", str(run)]) == 0
    told = capsys.readouterr().out
    for part in ("step-00000002         2     0.1000", "best", "student", "embed_dim=16", "checksums    in state.json"):
        assert part in told
    assert command(capsys, "list", run / "nothing", code=1).count("does not exist; expected a run") == 1


def cut(path: Path) -> None:
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    """A bit of a weight, which no length and no header tells."""
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (path / "model.safetensors").write_bytes(content)


def rewrite(path: Path, **changes) -> None:
    """As if it had been written so."""
    found = store.load(path)
    shutil.rmtree(path)
    kept = {"model": found.model, "optimizer": found.optimizer, "config": found.state["config"]} | changes
    store.save(path.parent, step=found.step, **kept)


def spoil(path: Path) -> None:
    model = store.load(path).model
    model["student.cls"][..., :2] = torch.tensor([float("nan"), float("inf")])
    rewrite(path, model=model)


DAMAGE = {
    "cut": (cut, r"optimizer\.safetensors \(\d+ bytes\) is truncated"),
    "a bit": (flip, r"model\.safetensors is not what was written: its checksum"),
    "not finite": (spoil, r"model\.safetensors: 2 of the 16 values of student\.cls are not finite"),
    "another model": (
        lambda path: rewrite(path, config={**CONFIG, "model": {**CONFIG["model"], "embed_dim": 32}}),
        r"tensors do not fit the model: .*of another shape",
    ),
    "moments of others": (
        lambda path: rewrite(path, optimizer={"exp_avg.student.cls": torch.zeros(3), "exp_avg.x": torch.zeros(1)}),
        r"exp_avg\.student\.cls is \(3,\), expected \(1, 1, 16\)",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_found(run, capsys, what):
    damage, told = DAMAGE[what]
    path = members(run)[1]
    damage(path)
    found = command(capsys, "verify", run, code=1)
    assert [bool(row["problems"]) for row in found] == [False, True, False]
    assert re.search(told, " ".join(found[1]["problems"])), found


def test_whole_ones_of_every_kind_are_whole(run, tmp_path, classifier_checkpoint, capsys):
    state = members(run)[0] / "state.json"
    old = json.loads(state.read_text())
    del old["sha256"]  # of an earlier version
    state.write_text(json.dumps(old))
    tuned = classifier_checkpoint(tmp_path / "tuned", ("a", "b"))
    CATEncoder.from_folder(run).save_pretrained(tmp_path / "folder")
    for path in (run, tuned.parents[1], tmp_path / "folder", members(run)[0] / "model.safetensors"):
        assert not any(row["problems"] for row in command(capsys, "verify", path)), path


def test_a_list_tells_what_is_cut_and_what_a_run_deletes_meanwhile_is_left_out(run, monkeypatch):
    cut(members(run)[2])
    assert [row.damage is None for row in listed(run)] == [True, True, False]
    monkeypatch.setattr("cat.checkpoints.inspection.members", lambda path: [run / "checkpoints" / "step-00000009"])
    assert listed(run) == []


# ---------------------------------------------------------------- averages


def test_an_average_is_the_average_and_a_model(run, tmp_path, capsys):
    out = tmp_path / "average.safetensors"
    told = command(capsys, "average", run, "--last", 2, "-o", out)
    assert [one["share"] for one in told["averaged"]] == [0.5, 0.5]
    one, two = (store.load(path).model for path in members(run)[1:])
    found = store.read_tensors(out)[0]
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, ((one[name].double() + two[name].double()) / 2).float())
    encoder, info = load_encoder(out, "teacher")
    assert (info.step, info.model) == (None, MODEL)
    assert torch.equal(encoder.cls, found["teacher.cls"])
    assert verify(out) == []
    assert contents(out).config == CONFIG
    command(capsys, "average", run, "-o", out)  # its own file
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    assert "left alone" in command(capsys, "average", run, "-o", tmp_path / "mine.safetensors", code=1)
    assert "never done" in command(capsys, "average", run, "-o", members(run)[0] / "model.safetensors", code=1)


def test_a_moving_average_goes_by_steps(run):
    paths = members(run)
    found = average([paths[2], paths[0], paths[1]], ema=0.9)
    assert [file.parent for file in found.of] == paths
    a = None
    for path in paths:
        w = store.load(path).model["student.cls"].double()
        a = w if a is None else 0.9 * a + 0.1 * w
    torch.testing.assert_close(found.tensors["student.cls"], a.float(), rtol=1e-6, atol=1e-7)
    assert sum(found.shares) == pytest.approx(1)


def test_what_has_no_average(run, tmp_path):
    one, two, three = members(run)
    with pytest.raises(ValueError, match="1 checkpoint to average; expected two"):
        average([one])
    with pytest.raises(ValueError, match=r"is 1\.5; expected a number between 0 and 1"):
        average([one, two], ema=1.5)
    spoil(three)
    with pytest.raises(CheckpointError, match=r"step-00000004.*student\.cls is not finite; leave that"):
        average([one, three])
    other = {**CONFIG, "features": to_mapping(FeatureConfig(frames=64, mean=1.0))}
    with pytest.raises(CheckpointError, match=r"hear other spectrograms"):
        average([one, save(tmp_path / "other", 9, other)])
    rewrite(two, model={n: t for n, t in store.load(two).model.items() if n != "decoder.x" and "teacher" not in n})
    with pytest.raises(CheckpointError, match=r"do not hold the same tensors \(only one has teacher"):
        average([one, two])


# ---------------------------------------------------------------- models to publish


def test_an_export_is_what_save_pretrained_writes(run, tmp_path, classifier_checkpoint, capsys):
    command(capsys, "export", run, "-o", tmp_path / "encoder", "--weights", "teacher", "--license", "mit")
    assert torch.equal(CATEncoder.from_folder(tmp_path / "encoder").encoder.cls, load_encoder(run, "teacher")[0].cls)
    assert "license: " in (tmp_path / "encoder" / "README.md").read_text()
    tuned = classifier_checkpoint(tmp_path / "tuned", ("a", "b")).parents[1]
    command(capsys, "export", tuned, "-o", tmp_path / "classifier")
    assert CATClassifier.from_folder(tmp_path / "classifier").info.classes == ("a", "b")
    assert "add --encoder" in command(capsys, "export", tuned, "-o", tmp_path / "x", "--pooling", "cls", code=1)
    assert "new or empty folder" in command(capsys, "export", run, "-o", tmp_path / "encoder", code=1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list", "x", "--ema", "0.5"], "--ema belongs to average, not to list"),
        (["average", "x"], "-o is missing; expected the .safetensors file"),
        (["average", "x", "-o", "a.pt"], "expected a name that ends in .safetensors"),
        (["average", "x", "-o", "a.safetensors", "--last", "0"], "--last is 0; expected at least 1"),
        (["export", "x", "y", "-o", "z"], "2 paths to export; expected one"),
    ],
)
def test_arguments_that_do_not_fit(words, told, capsys):
    assert told in command(capsys, *words, code=1)
