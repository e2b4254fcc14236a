"""A disk that is full, or becomes read-only, at every kind of write: the file is named with what to do, nothing is half
written, what was there stays, and a run goes on where it was."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cat.checkpoints import store
from cat.checkpoints.encoder import chosen
from cat.checkpoints.inspection import verify
from cat.commands import main
from cat.figures import write_run_figures
from cat.training import finetune, loop
from cat.training.records import read_rows
from tests.cat.checkpoints.test_released import fairseq_file, small_model
from tests.lookalikes import RECIPES, SMALL, esc50, manifest, run_with_two_checkpoints, tars

for module in ("soundfile", "yaml", "sklearn", "matplotlib"):
    pytest.importorskip(module)

MB = 1 << 20


class Disk:
    """A small one of its own."""

    told = r"No space left on device \(\S+ bytes are free there\); make room"

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, leave: int = 0) -> None:
        with open(self.path / ".filler", "ab", buffering=0) as file:
            count = shutil.disk_usage(self.path).free - leave
            while count > 0:
                count -= file.write(bytes(min(count, MB)))

    def empty(self) -> None:
        (self.path / ".filler").unlink()


class Limit(Disk):
    """In its place: files of hardly any size."""

    told = "(File too large|PyTorch could not write all of the trace)"

    def fill(self, leave: int = 0) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def mounted(tmp_path) -> Iterator[Disk | None]:
    """None where nothing may be mounted."""
    (tmp_path / "disk").mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path / "disk")]
    if shutil.which("mount") is None or subprocess.run(made, capture_output=True).returncode:
        yield None
        return
    yield Disk(tmp_path / "disk")
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


@pytest.fixture
def disk(mounted) -> Disk:
    if mounted is None:
        pytest.skip("may not mount a small disk here")
    return mounted


@pytest.fixture
def full(mounted, tmp_path) -> Iterator[Disk]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield mounted or Limit(tmp_path / "disk")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A labelled manifest, a run, and what others have made."""
    folder = tmp_path_factory.mktemp("made")
    manifest(folder / "train.jsonl")
    esc50(folder / "esc50.zip")
    tars(folder / "tars")
    fairseq_file(folder / "released.pt", small_model())
    run_with_two_checkpoints(folder / "run")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


TRAIN = "{made}/train.jsonl"
PRETRAIN = f"{' '.join(SMALL['pretrain'])} data.train={TRAIN} run.dir={{disk}}"
SPLITS = f"--train {TRAIN} --valid {TRAIN} --test {TRAIN}"
KINDS: dict[str, str] = {
    "embed": f"embed {TRAIN} --encoder logmel -o {{disk}}/e.npy",
    "encode": f"encode {TRAIN} --encoder {{made}}/run -o {{disk}}/e.npz",
    "evaluate": f"evaluate {{classifier}} {TRAIN} -o {{disk}}/scores --resamples 10",
    "predict": f"predict {{classifier}} {TRAIN} --csv {{disk}}/classes.csv",
    "picture": "predict {classifier} {made}/train/hum/0.wav --picture {disk}/heard.png",
    "prepare": f"prepare {TRAIN} -o {{disk}}/prepared",
    "shards": f"shards write {TRAIN} -o {{disk}}/shards",
    "index": "shards index {made}/tars -o {disk}/index --labels tags",
    "dataset": "dataset esc50 {made}/esc50.zip -o {disk}/esc50 --allow-missing 100000",
    "convert": "convert {made}/released.pt {disk}/converted.safetensors --num-heads 2",
    "probe": f"probe logmel {SPLITS} --knn --no-cache --out {{disk}}/probe.json",
    "cache": f"probe {{made}}/run {SPLITS} --knn --cache {{disk}}/cache --out {{disk}}/probe.json",
    "similar": "similar {made}/train {made}/train/hum/0.wav --encoder {made}/run --index {disk}/index.npz",
    "export": "export {made}/run {disk}/encoder.pt2",
    "average": "checkpoints average {made}/run -o {disk}/average.safetensors",
    "report": "report {made}/run -o {disk}/report.html",
    "hub folder": "checkpoints export {made}/run -o {disk}/published",
    "synth": "synth {disk}/sounds --classes rain wind --clips-per-class 1 --eval-clips-per-class 1",
    "profile": f"pretrain {RECIPES}/tiny.yaml {PRETRAIN} --profile",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "export" else []) for kind in KINDS]
)
def test_nothing_is_half_written(full, made, classifier_checkpoint, tmp_path, capsys, kind):
    """There is room for a lock, and for no content."""
    classifier = classifier_checkpoint(tmp_path / "tuned", ("hiss", "hum")).parents[1]
    words = KINDS[kind].format(disk=full.path, made=made, classifier=classifier).split()
    full.fill(leave=4096)
    assert main(words) == 1
    told = capsys.readouterr().err
    assert re.search(rf"/disk/\S+: {full.told}", told), told
    assert set(files(full.path)) - {".filler"} <= {"classes.csv.part/rows.jsonl"}  # which it goes on with


def test_a_trace_that_is_cut_off_is_none(disk, made, capsys):
    """PyTorch's profiler does not say that it could not write all of it."""
    words = KINDS["profile"].format(disk=disk.path, made=made).split()
    disk.fill(leave=100_000)
    assert main(words) == 1
    assert re.search(r"trace\.json: PyTorch could not write all of the trace .*make room", capsys.readouterr().err)
    assert set(files(disk.path)) == {".filler"}


# ---------------------------------------------------------------- a run


RUN = (*SMALL["pretrain"], "optim.steps=40", "run.log_every=1", "run.figures=false", "run.tensorboard=false")


def pretrain(where: Path, made: Path, *changes: str) -> int:
    own = (f"data.train={made}/train.jsonl", f"run.dir={where}", "run.name=run", "--quiet")
    return main(["pretrain", f"{RECIPES}/tiny.yaml", *RUN, *own, *changes])


def at_update(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    update = loop.Trainer._update

    def updating(self: loop.Trainer, *args: Any) -> None:
        update(self, *args)
        if self.step == step:
            action()

    monkeypatch.setattr(loop.Trainer, "_update", updating)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl", "train")]


@pytest.fixture(scope="module")
def undisturbed(made) -> list[float]:
    assert pretrain(made / "undisturbed", made) == 0
    return losses(made / "undisturbed" / "run")


# what does not fit: (checkpoints every so many updates, the disk is full after, what is said)
RUNS = {
    "a checkpoint": (3, 4, (r"step-00000006: No space left on device: this checkpoint needs \d+ kB",)),
    "metrics": (
        20,
        21,
        (
            r"run/metrics\.jsonl: No space left on device \(0 bytes are free there\); make room",
            r"step \d+ could not be saved \(.*No space left.*\); the last checkpoint: \S+/step-00000020",
        ),
    ),
}


@pytest.mark.parametrize("what", RUNS)
def test_a_run_goes_on_when_there_is_room_again(disk, made, undisturbed, monkeypatch, capsys, what):
    every, full_after, told = RUNS[what]
    with monkeypatch.context() as patch:
        at_update(patch, full_after, disk.fill)
        assert pretrain(disk.path, made, f"run.checkpoint_every={every}") == 1
    err = capsys.readouterr().err
    for part in told:
        assert re.search(part, err), err
    folder = disk.path / "run" / "checkpoints"
    good = [path for path in store.list_checkpoints(folder) if not verify(path)]
    assert [path.name for path in folder.iterdir()] == [path.name for path in good], "nothing half written is left"
    assert str(good[-1]) in err
    disk.empty()
    assert pretrain(disk.path, made, f"run.checkpoint_every={every}", "--resume") == 0
    assert losses(disk.path / "run") == undisturbed


def test_pictures_that_do_not_fit_come_after_all_was_trained(disk, made, monkeypatch, capsys):
    monkeypatch.setattr("cat.commands.pretrain.write_run_figures", lambda run: disk.fill() or write_run_figures(run))
    changes = ("optim.steps=2", "run.checkpoint_every=2", "run.figures=true")
    assert pretrain(disk.path, made, *changes) == 1
    told = capsys.readouterr()
    assert "trained 2 steps" in told.out
    assert re.search(r"figures/\w+\.png: No space left on device .*make room", told.err), told.err
    assert not verify(store.newest(disk.path / "run"))
    assert not list((disk.path / "run" / "figures").glob("*"))


def test_scores_that_do_not_fit_come_when_there_is_room_again(disk, made, monkeypatch, capsys):
    own = (f"data.train={made}/train.jsonl", f"encoder={made}/run", f"run.dir={disk.path}", "run.name=tuned", "--quiet")
    changes = [word for word in SMALL["finetune"] if word != "--overwrite"]
    words = ["finetune", f"{RECIPES}/finetune.yaml", *changes, *own, "run.figures=false", "run.tensorboard=false"]
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "chosen", lambda run: disk.fill() or chosen(run))
        assert main(words) == 1
    told = capsys.readouterr().err
    assert re.search(r"tuned/scores\.json: No space left on device .*make room", told), told
    assert not list((disk.path / "tuned").glob("*scores*"))
    disk.empty()
    assert main([*words, "--resume"]) == 0
    assert (disk.path / "tuned" / "scores.json").is_file()


def test_a_folder_that_loses_its_permission(tmp_path, made, undisturbed, monkeypatch, capsys):
    mkdtemp = tempfile.mkdtemp

    def refused(*args: Any, **options: Any) -> str:
        if str(options.get("dir", "")).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", options["dir"])
        return mkdtemp(*args, **options)

    with monkeypatch.context() as patch:
        at_update(patch, 4, lambda: patch.setattr(tempfile, "mkdtemp", refused))
        assert pretrain(tmp_path, made, "run.checkpoint_every=3") == 1
    told = capsys.readouterr().err
    assert re.search(
        r"step-00000006: Permission denied; expected a folder that may be written to: \S+/checkpoints", told
    )
    assert re.search(r"the last good checkpoint: \S+/step-00000003; go on with: cat-audio pretrain --resume", told)
    assert pretrain(tmp_path, made, "--resume") == 0
    assert losses(tmp_path / "run") == undisturbed


def test_files_have_the_permissions_of_the_umask(tmp_path, made):
    before = os.umask(0o027)
    try:
        assert pretrain(tmp_path, made, "optim.steps=2", "run.checkpoint_every=1", "run.tensorboard=true") == 0
    finally:
        os.umask(before)
    found = {p.relative_to(tmp_path): stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "run").rglob("*")}
    assert len(found) > 10
    assert found == {path: 0o750 if (tmp_path / path).is_dir() else 0o640 for path in found}
