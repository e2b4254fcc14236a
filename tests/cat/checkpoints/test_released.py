"""Released files into checkpoints of ours. That the numbers agree is test_golden.py's part."""

import argparse
import os
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from cat.checkpoints import CheckpointError
from cat.checkpoints.released import from_released, infer_config, read_released, to_released
from cat.model import CAT, ModelConfig, ObjectiveConfig

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_dim": 48, "decoder_layers": 3, "decoder_groups": 16}
CONFIGS = {
    "4,8,16": ModelConfig(channels=(8, 16), **SMALL),
    "16": ModelConfig(resolutions=(16,), channels=(), **SMALL),
    "4,8": ModelConfig(resolutions=(4, 8), channels=(8,), **SMALL),
    "4,16": ModelConfig(resolutions=(4, 16), channels=(8,), **SMALL),
    "8,16": ModelConfig(resolutions=(8, 16), channels=(8,), **SMALL),
    "2,4,8,16": ModelConfig(resolutions=(2, 4, 8, 16), channels=(8, 8, 16), **SMALL),
    "4,8,16,32": ModelConfig(resolutions=(4, 8, 16, 32), channels=(8, 8, 16), **SMALL),
    "patch": ModelConfig(stem="patch", resolutions=(16,), channels=(), **SMALL),
}


def small_model(name="4,8,16"):
    torch.manual_seed(0)
    model = CAT(CONFIGS[name], ObjectiveConfig(regularisation_weight=1.0), embedding_dim=24)
    for parameter in model.teacher.parameters():
        parameter.add_(0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_there_and_back(name):
    model = small_model(name)
    student, teacher = to_released(model)
    assert infer_config(student, num_heads=2) == CONFIGS[name]
    again = from_released(student, teacher, num_heads=2)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_student_alone_is_the_teacher_too():
    student, _ = to_released(small_model())
    model = from_released(student, num_heads=2)
    assert torch.equal(model.teacher.cls, model.student.cls)


def fairseq_file(path, model):
    """A file as fairseq writes it: settings of foreign classes around the weights, the teacher under ``_ema``."""
    student, teacher = to_released(model)
    positions = {"modality_encoders.IMAGE.fixed_positional_encoder.positions": torch.zeros(1, 512, 32)}
    foreign = types.ModuleType("foreign_settings")
    foreign.Config = type("Config", (), {"__module__": "foreign_settings"})
    sys.modules["foreign_settings"] = foreign
    config = foreign.Config()
    config.model = {"depth": 2}
    try:
        torch.save(
            {
                "args": argparse.Namespace(lr=1),
                "cfg": config,
                "model": student | positions | {"_ema": teacher | positions},
                "optimizer_history": [{"num_updates": 3}],
            },
            path,
        )
    finally:
        del sys.modules["foreign_settings"]


def test_fairseq_file(tmp_path):
    model = small_model()
    fairseq_file(tmp_path / "released.pt", model)
    student, teacher = read_released(tmp_path / "released.pt")
    again = from_released(student, teacher, num_heads=2)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_command_writes_a_checkpoint_that_loads(tmp_path, capsys):
    from cat.checkpoints import load_encoder
    from cat.commands import main

    model = small_model()
    fairseq_file(tmp_path / "released.pt", model)
    assert main(["convert", str(tmp_path / "released.pt"), str(tmp_path / "out.safetensors"), "--num-heads", "2"]) == 0
    assert "student and teacher" in capsys.readouterr().out
    for weights, encoder in (("student", model.student), ("teacher", model.teacher)):
        loaded, _ = load_encoder(tmp_path / "out.safetensors", weights=weights)
        assert torch.equal(loaded.cls, encoder.cls)


def test_the_command_replaces_its_own_file_alone(tmp_path, capsys):
    from cat.checkpoints.store import save_tensors
    from cat.commands import main

    fairseq_file(tmp_path / "released.pt", small_model())
    convert = ["convert", str(tmp_path / "released.pt"), "--num-heads", "2"]
    save_tensors(tmp_path / "model.safetensors", {"x": torch.zeros(1)}, config={}, step=7)  # of a checkpoint
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "in.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("model.safetensors", "other.safetensors"):
        assert main([*convert, str(tmp_path / name)]) == 1
        assert f"{tmp_path / name} exists" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "in.safetensors"), "--overwrite"]) == 1
    assert "which this command reads; that is never done" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for overwrite in (["--overwrite"], []):
        assert main([*convert, str(tmp_path / "other.safetensors"), *overwrite]) == 0


def test_safetensors_file(tmp_path):
    model = small_model()
    student, teacher = to_released(model)
    save_file(
        {k: v.contiguous() for k, v in student.items()} | {f"_ema.{k}": v.contiguous() for k, v in teacher.items()},
        tmp_path / "released.safetensors",
    )
    loaded_student, loaded_teacher = read_released(tmp_path / "released.safetensors")
    assert loaded_student.keys() == student.keys()
    assert loaded_teacher.keys() == teacher.keys()


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": to_released(small_model())[0], "args": Malicious()}, "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt cannot be read without executing code.*posix.system"):
        read_released("evil.pt")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_file_is_said_to_be_one(tmp_path):
    fairseq_file(tmp_path / "good.pt", small_model())
    content = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "bad.pt").write_bytes(content[:100] + bytes(900) + content[1000:])  # the end of a zip file is its list
    with pytest.raises(CheckpointError, match=r"bad\.pt \(\d+ bytes\) is damaged or not a file of torch\.save \("):
        read_released(tmp_path / "bad.pt")


def test_names_with_the_prefixes_of_wrappers(tmp_path):
    student, teacher = to_released(small_model())
    both = {f"module.{k}": v for k, v in student.items()} | {f"module._ema.{k}": v for k, v in teacher.items()}
    torch.save({"model": both}, tmp_path / "wrapped.pt")
    found = read_released(tmp_path / "wrapped.pt")
    assert (found[0].keys(), found[1].keys()) == (student.keys(), teacher.keys())


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        read_released(tmp_path / "nowhere.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match=r"cut\.pt is not a PyTorch zip archive"):
        read_released(tmp_path / "cut.pt")
    student, _ = to_released(small_model())
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        from_released(student | {"classifier.weight": torch.zeros(2)}, num_heads=2)
    del student["blocks.1.norm2.bias"]
    with pytest.raises(ValueError, match=r"missing.*blocks.1.norm2.bias"):
        from_released(student, num_heads=2)
    with pytest.raises(ValueError, match=r"no stem among the 1 parameters"):
        infer_config({"encoder.weight": torch.zeros(2)})
