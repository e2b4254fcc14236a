"""Checkpoints: written whole, kept or pruned by rule, and refused with a reason when damaged."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cat.checkpoints import CheckpointError, load_encoder
from cat.checkpoints import encoder as encoder_module
from cat.checkpoints import store as checkpoints
from cat.checkpoints.released import read_released
from cat.config import to_mapping
from cat.data.features import FeatureConfig
from cat.model import CAT, ModelConfig

MODEL = ModelConfig(
    channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1, decoder_groups=2
)
FEATURES = FeatureConfig(frames=64, mean=-3.0)
CONFIG = {"model": to_mapping(MODEL), "features": to_mapping(FEATURES), "note": "größer"}


@pytest.fixture(scope="module")
def model() -> CAT:
    torch.manual_seed(0)
    made = CAT(MODEL)
    with torch.no_grad():
        made.teacher.cls.add_(1.0)
    return made


def save(directory, step, model, score=None):
    optimizer = {"step.cls": torch.tensor(float(step)), "exp_avg.cls": torch.randn(3)}
    return checkpoints.save(
        directory, step=step, model=model.state_dict(), optimizer=optimizer, config=CONFIG, score=score, extra={"x": 1}
    )


def test_comes_back_exactly(tmp_path, model):
    optimizer = {"step.a": torch.tensor(7.0), "exp_avg.a": torch.randn(3, 4).to(torch.bfloat16)}
    path = checkpoints.save(tmp_path, step=7, model=model.state_dict(), optimizer=optimizer, config=CONFIG, score=0.1)
    assert path == tmp_path / "step-00000007"
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "model.safetensors", "optimizer.safetensors", "state.json", "step-00000007",
    ]  # fmt: skip
    found = checkpoints.load(path)
    assert (found.step, found.state["score"], found.state["config"]) == (7, 0.1, CONFIG)
    for saved, loaded in ((model.state_dict(), found.model), (optimizer, found.optimizer)):
        assert saved.keys() == loaded.keys()
        for name, tensor in saved.items():
            assert tensor.dtype == loaded[name].dtype
            assert tensor.shape == loaded[name].shape
            assert torch.equal(tensor, loaded[name])


def test_a_save_that_fails_half_way_leaves_no_checkpoint(tmp_path, model, monkeypatch):
    good = save(tmp_path, 1, model)
    monkeypatch.setattr(checkpoints.json, "dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, model)
    monkeypatch.undo()
    assert checkpoints.list_checkpoints(tmp_path) == [good]
    save(tmp_path, 3, model)
    checkpoints.prune(tmp_path, keep_last=5, keep_best=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_keeps_newest_and_best(tmp_path, model):
    directory = tmp_path / "checkpoints"
    scores = {10: 0.5, 20: 0.1, 30: None, 40: 0.2, 50: 0.9, 60: None}
    kept = {}
    for step, score in scores.items():
        save(directory, step, model, score)
        checkpoints.prune(directory, keep_last=2, keep_best=2)
        kept[step] = [int(p.name.removeprefix("step-")) for p in checkpoints.list_checkpoints(directory)]
    assert kept == {10: [10], 20: [10, 20], 30: [10, 20, 30], 40: [20, 30, 40], 50: [20, 40, 50], 60: [20, 40, 50, 60]}
    assert checkpoints.newest(tmp_path).name == "step-00000060"
    assert checkpoints.best(tmp_path).name == "step-00000020"
    assert checkpoints.newest(tmp_path / "nothing") is None
    assert checkpoints.best(tmp_path / "nothing") is None


def test_keeps_those_of_every_so_many_updates(tmp_path, model):
    for step in (2, 4, 5, 6, 8, 10, 11):
        save(tmp_path, step, model)
        checkpoints.prune(tmp_path, keep_last=1, keep_best=0, keep_every=4)
    assert [path.name[-2:] for path in checkpoints.list_checkpoints(tmp_path)] == ["04", "08", "11"]


def test_of_two_damaged_ones_neither_is_offered(tmp_path, model):
    paths = [save(tmp_path, step, model) for step in (1, 2, 3)]
    for path in paths[1:]:
        (path / "state.json").write_text("")
    with pytest.raises(CheckpointError, match=r"go on from step-00000001 set it aside: mv \S+/step-00000003 "):
        checkpoints.load(paths[2])
    (paths[0] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="copy it again, or name another checkpoint"):
        checkpoints.load(paths[2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_truncated_and_missing_files_are_named(tmp_path, model, name):
    older, path = save(tmp_path, 1, model), save(tmp_path, 2, model)
    whole = (path / name).read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1 if name != "state.json" else len(whole) - 3):
        (path / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=rf"{name}.*to go on from {older.name} set it aside: mv .*-00000002 "):
            checkpoints.load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} (does not exist|cannot be read)"):
        checkpoints.load(path)


def test_files_of_two_checkpoints_do_not_mix(tmp_path, model):
    a, b = save(tmp_path, 1, model), save(tmp_path, 2, model)
    (b / "optimizer.safetensors").write_bytes((a / "optimizer.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is of step 1, but .*state\.json is of step 2"):
        checkpoints.load(b)


def test_other_format(tmp_path, model):
    path = save(tmp_path, 1, model)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(CheckpointError, match="is of format 99; expected 1"):
        checkpoints.load(path)


@pytest.mark.parametrize("what", ["run", "checkpoint", "file"])
def test_encoder_loads_from_run_checkpoint_or_file(tmp_path, model, what):
    save(tmp_path / "checkpoints", 3, model)
    path = save(tmp_path / "checkpoints", 12, model)
    given = {"run": tmp_path, "checkpoint": path, "file": path / "model.safetensors"}[what]
    for weights, expected in (("student", model.student), ("teacher", model.teacher)):
        encoder, info = load_encoder(given, weights)
        assert (info.step, info.weights, info.model, info.features) == (12, weights, MODEL, FEATURES)
        assert not encoder.training
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, encoder.state_dict()[name])
    spec = torch.randn(1, 1, 64, 128)
    assert not torch.equal(load_encoder(given, "student")[0](spec), load_encoder(given, "teacher")[0](spec))


def test_a_run_that_goes_on_may_replace_its_checkpoint_meanwhile(tmp_path, model, monkeypatch):
    save(tmp_path / "checkpoints", 1, model)
    read = encoder_module.read_tensors

    def late(file, device):
        monkeypatch.undo()
        save(tmp_path / "checkpoints", 2, model)
        checkpoints.prune(tmp_path / "checkpoints", keep_last=1, keep_best=0)
        return read(file, device)

    monkeypatch.setattr(encoder_module, "read_tensors", late)
    assert load_encoder(tmp_path)[1].step == 2


def test_encoder_errors(tmp_path, model):
    with pytest.raises(CheckpointError, match="does not exist; expected a run directory"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="weights is 'ema'"):
        load_encoder(tmp_path, weights="ema")
    foreign = tmp_path / "foreign.safetensors"
    checkpoints.save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors does not say how its model is built"):
        load_encoder(foreign)
    (tmp_path / "pickle.safetensors").write_bytes(b"PK\x03\x04 not a safetensors file")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_encoder(tmp_path / "pickle.safetensors")


def test_tensors_that_do_not_fit_are_counted_and_named(tmp_path, model):
    tensors = model.student.state_dict()
    del tensors["cls"]
    tensors["norm.weight"] = torch.zeros(3)
    tensors["other"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_tensors(model.student, tensors, "here")
    for part in ("1 missing (first: cls)", "1 unknown (first: other)", "norm.weight is (3,), expected (16,)"):
        assert part in str(error.value)


# ---------------------------------------------------------------- a disk that is full, a file that may not be read


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, model, monkeypatch):
    save(tmp_path, 1, model)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        OSError, match=r"this checkpoint needs .* kB, .* are free there; make room .*step-00000002"
    ) as e:
        save(tmp_path, 2, model)
    assert e.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_the_system_refuses_is_an_oserror(tmp_path, model):
    """A real refusal: files of at most 4 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*step-00000001"):
            save(tmp_path, 1, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_deletion_that_was_killed_is_ended(tmp_path, model):
    for step in (1, 2, 3):
        save(tmp_path, step, model)
    (tmp_path / ".removing-step-00000001" / "left").mkdir(parents=True)
    (tmp_path / "step-00000002" / "state.json").write_text("")  # damaged; must not stop the run that prunes
    checkpoints.prune(tmp_path, keep_last=1, keep_best=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_file_without_permission_is_said_to_be_one(tmp_path, model, monkeypatch):
    path = save(tmp_path, 1, model)

    def refused(file, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no permission to read it"):
        load_encoder(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no permission to read it"):
        read_released(path / "model.safetensors")


# ---------------------------------------------------------------- weights that went through other hands


def renamed(path, model, rename, dtype=None):
    tensors = {rename(name): t.to(dtype) if dtype else t for name, t in model.state_dict().items()}
    checkpoints.save_tensors(path, tensors, config=CONFIG)
    return path


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("student.", "student._orig_mod.").replace("teacher.", "teacher.module."),
        lambda name: name.replace(".blocks.0.", ".blocks.0._orig_mod."),
    ],
)
def test_names_with_the_prefixes_of_wrappers(tmp_path, model, rename):
    path = renamed(tmp_path / "a.safetensors", model, rename)
    for weights in ("student", "teacher"):
        encoder, _ = load_encoder(path, weights)
        for name, tensor in getattr(model, weights).state_dict().items():
            assert torch.equal(tensor, encoder.state_dict()[name])


def test_a_whole_checkpoint_with_prefixes_is_read(tmp_path, model):
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    moments = {"exp_avg.module.cls": torch.ones(3)}
    path = checkpoints.save(tmp_path, step=1, model=state, optimizer=moments, config=CONFIG)
    found = checkpoints.load(path)
    assert found.model.keys() == model.state_dict().keys()
    assert list(found.optimizer) == ["exp_avg.cls"]


def test_an_encoder_alone_is_the_student(tmp_path, model):
    path = renamed(tmp_path / "a.safetensors", model.teacher, lambda name: f"_orig_mod.{name}")
    assert torch.equal(load_encoder(path)[0].cls, model.teacher.cls)
    with pytest.raises(CheckpointError, match="one encoder, without a teacher; use weights='student'"):
        load_encoder(path, "teacher")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_load_as_values(tmp_path, model, dtype):
    encoder, _ = load_encoder(renamed(tmp_path / "a.safetensors", model, str, dtype))
    assert encoder.cls.dtype == torch.float32
    assert torch.equal(encoder.norm.weight, model.student.norm.weight.to(dtype).float())


def test_names_that_are_there_are_told(tmp_path, model):
    path = renamed(tmp_path / "a.safetensors", model.student, lambda name: f"backbone.{name}")
    with pytest.raises(
        CheckpointError, match=r"no tensors student\.\*; it holds backbone\.\* \(\d+\), the first is back"
    ):
        load_encoder(path)


def test_two_names_for_one_tensor(tmp_path, model):
    tensors = model.state_dict()
    tensors["module.student.cls"] = tensors["student.cls"] + 1
    checkpoints.save_tensors(tmp_path / "a.safetensors", tensors, config=CONFIG)
    with pytest.raises(CheckpointError, match=r"holds both (module\.)?student\.cls and (module\.)?student\.cls"):
        load_encoder(tmp_path / "a.safetensors")
