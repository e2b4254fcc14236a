"""What is deleted for a new run, and whether its disk will do."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from cat.checkpoints import store as checkpoints
from cat.config import ConfigError, to_mapping, write_yaml
from cat.data.dataset import DataConfig
from cat.training import directory
from cat.training.recipe import PretrainConfig, RunConfig, load_run

pytest.importorskip("yaml")

CONFIG = PretrainConfig(data=DataConfig(train="a", batch_size=7))
OURS = (
    *("metrics.jsonl", "failures.jsonl", "probe.json", "tensorboard/events.out.tfevents.1", "figures/loss.png"),
    *("figures/patches.png", "figures/embeddings.png", "profile/trace.json", "checkpoints/step-00000002/state.json"),
    *("evaluation/test/evaluation.json", "evaluation/test/clips.csv", "evaluation/test/figures/curves.png"),
    *("evaluation/other/classes.csv", "events.json"),
)
THEIRS = (
    "evaluation/other/notes.txt",
    "notes.txt",
    "train.jsonl",
    "figures/mine.png",
    "checkpoints/mine/model.safetensors",
    ".hidden",
)


def make(run_dir: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("x")
    return run_dir


def make_run(run_dir: Path) -> Path:
    make(run_dir, OURS)
    write_yaml(CONFIG, run_dir / "config.yaml")
    return run_dir


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_a_run_writes_is_deleted(tmp_path):
    run_dir = make(make_run(tmp_path / "run"), THEIRS)
    found = directory.files_of_earlier_run(run_dir, overwrite=True)
    assert {str(path.relative_to(run_dir)) for path in found} == {*OURS, "config.yaml"}
    directory.delete_run(run_dir)
    assert files(run_dir) == {*THEIRS, "config.yaml"}  # which the new run replaces
    assert not (run_dir / "tensorboard").exists()
    assert not (run_dir / "evaluation" / "test").exists()


def test_links_stay_links(tmp_path):
    make_run(tmp_path / "far")
    shutil.move(tmp_path / "far" / "checkpoints", tmp_path / "scratch")
    (tmp_path / "far" / "checkpoints").symlink_to("../scratch")
    (tmp_path / "run").symlink_to("far")
    directory.delete_run(tmp_path / "run")
    assert ((tmp_path / "run").is_symlink(), files(tmp_path / "run")) == (True, {"config.yaml"})
    assert list((tmp_path / "far" / "checkpoints").iterdir()) == list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("at", range(1, 10))
def test_a_deletion_that_was_interrupted_leaves_no_whole_run(tmp_path, monkeypatch, at):
    run_dir = make_run(tmp_path / "run")
    calls = []

    def interrupted(real):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted(Path.unlink))
        patch.setattr(shutil, "rmtree", interrupted(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            directory.delete_run(run_dir)
    assert checkpoints.newest(run_dir) is None
    assert directory.files_of_earlier_run(run_dir, overwrite=True), "still known for a run"
    directory.delete_run(run_dir)
    assert files(run_dir) == {"config.yaml"}


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/epoch-1.pt"])
def test_a_folder_of_another_program_is_no_run(tmp_path, name):
    make(tmp_path, (name, "chapter1.txt"))
    (tmp_path / name).write_text("model: {layers: 3}\n")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"is not a run directory \(it holds 'chapter1.txt'\)"):
            directory.files_of_earlier_run(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("names", [(), ("profile/trace.json",), (".lock",)])
def test_what_is_in_nobodys_way(tmp_path, names):
    make(tmp_path, names)
    (tmp_path / "checkpoints").mkdir()  # of a run that was stopped before it wrote anything
    assert directory.files_of_earlier_run(tmp_path, overwrite=False) == []


def test_a_disk_that_is_too_small_is_found_at_the_start(tmp_path, monkeypatch, capsys):
    run_dir = make_run(tmp_path / "run")
    usage = namedtuple("usage", "total used free")
    config = RunConfig(keep_last=2, keep_best=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 30_000_000))
    with pytest.raises(OSError, match=r"a checkpoint of this model needs 50 MB, and 30 MB are free there; make room"):
        directory.check_disk(run_dir, config, needed=50_000_000, freed=0)
    directory.check_disk(run_dir, config, needed=50_000_000, freed=20_000_000)
    told = "3 that are kept (run.keep_last, run.keep_best, run.keep_every) and a new one need 200 MB"
    assert told in capsys.readouterr().err
    directory.check_disk(run_dir, RunConfig(keep_every=5), needed=5_000_000, freed=0, updates=24)
    assert "7 that are kept" in capsys.readouterr().err
    directory.check_disk(run_dir, config, needed=7_500_000, freed=0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))  # a file system that does not say
    directory.check_disk(run_dir, config, needed=50_000_000, freed=0)


# ---------------------------------------------------------------- the configuration of a run


@pytest.mark.parametrize("damage", [b"", bytes(512), b"model: [", b"\xff\xfe", None])
def test_a_damaged_config_is_taken_from_the_checkpoint(tmp_path, damage):
    run_dir = make_run(tmp_path / "run")
    state = {"model": {}, "optimizer": {}, "config": to_mapping(CONFIG)}
    checkpoints.save(run_dir / "checkpoints", step=3, **state)
    assert load_run(run_dir, ["optim.steps=80000"])[1] is None
    path = run_dir / "config.yaml"
    path.unlink() if damage is None else path.write_bytes(damage)
    config, note = load_run(run_dir, ["optim.steps=80000"])
    assert (config.data.batch_size, config.optim.steps) == (7, 80000)
    assert f"{path}" in note
    assert note.endswith(f"the configuration is that of {run_dir}/checkpoints/step-00000003")
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(ConfigError, match=r"config\.yaml.*no checkpoint|without config\.yaml"):
        load_run(run_dir)


def test_a_mistake_in_config_is_the_users_to_mend(tmp_path):
    run_dir = make_run(tmp_path / "run")
    checkpoints.save(run_dir / "checkpoints", step=3, model={}, optimizer={}, config={})
    (run_dir / "config.yaml").write_text("optim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml.*optim\.lr"):
        load_run(run_dir)


@pytest.mark.parametrize("name", ["", ".", "..", "a/../../b", "/tmp/a", "a\0b"])
def test_names_that_are_no_folder_in_run_dir(name):
    config = PretrainConfig(data=DataConfig(train="a"), run=RunConfig(name=name))
    with pytest.raises(ConfigError, match=r"run\.name is .*expected the name of a folder in run\.dir \(runs\)"):
        _ = config.run_dir
    assert PretrainConfig(data=DataConfig(train="a"), run=RunConfig(name="a/b")).run_dir == Path("runs/a/b")
