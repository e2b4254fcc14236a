"""Fine-tuning: what is trained and what stays, scores; killed and resumed it is the run that was not disturbed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cat.checkpoints import CheckpointError, load_classifier, load_encoder
from cat.checkpoints import store as checkpoints
from cat.commands import main
from cat.config import ConfigError, to_mapping
from cat.data import DataConfig, FeatureConfig, ManifestError, load_manifest
from cat.data.finetuning import scoring_batches
from cat.data.labels import labels_of
from cat.model import CAT, ModelConfig
from cat.training import finetune as finetuning_run
from cat.training import finetune_step, finetuning
from cat.training.finetune import finetune, profile
from cat.training.finetune_recipe import FinetuneConfig, fitting_frames, load_finetune_recipe
from cat.training.loop import TrainingError
from cat.training.recipe import PretrainConfig, read_run
from cat.training.records import read_rows

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("yaml")
pytest.importorskip("sklearn")

REPOSITORY = Path(__file__).parents[3]
RATE = 16_000
TONES = {"low": 300.0, "middle": 1200.0, "high": 4000.0}
MODEL = ModelConfig(
    channels=(8, 8), embed_dim=16, depth=2, num_heads=2, decoder_dim=16, decoder_layers=1, decoder_groups=2
)
RECIPE = """
model: {channels: [8, 8], embed_dim: 16, depth: 2, num_heads: 2}
augment: {roll: true, gain: true, noise: 0.1, roll_frames: 5, mixup: 0.8, mask_bins: 0.2, mask_frames: 0.3}
data: {batch_size: 4, num_workers: 0}
optim: {lr: 5e-3, warmup_steps: 2, steps: 9, drop_path: 0.3, average: 0.8}
run:
  {threads: 1, log_every: 2, checkpoint_every: 3, eval_every: 0, device: cpu, tensorboard: false, figures: false}
"""


def write_tones(folder: Path, count: int, seed: int) -> Path:
    """A folder a class, ``count`` clips each, of 0.3 to 0.6 s."""
    random = np.random.default_rng(seed)
    for name, frequency in TONES.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            time_s = np.arange(int(RATE * random.uniform(0.3, 0.6))) / RATE
            wave = np.sin(2 * np.pi * frequency * random.uniform(0.9, 1.1) * time_s + random.uniform(0, 6))
            soundfile.write(
                folder / name / f"{i}.wav", 0.3 * wave + 0.02 * random.standard_normal(len(wave)), RATE, "PCM_16"
            )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    for seed, (part, count) in enumerate((("train", 8), ("valid", 3), ("test", 3))):
        write_tones(folder / part, count, seed)
    data = ", ".join(f"{part}: {folder / part}" for part in ("train", "valid", "test"))
    (folder / "minute.yaml").write_text(RECIPE.replace("data: {", f"data: {{{data}, "))
    return folder


@pytest.fixture(scope="module")
def recipe(folder) -> Path:
    return folder / "minute.yaml"


@pytest.fixture(scope="module")
def pretrained(folder) -> Path:
    """A checkpoint of pre-training, of which student and teacher differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        cat = CAT(MODEL)
        for parameter in cat.teacher.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    features = FeatureConfig(frames=32, mean=-6.0, std=5.0)
    config = PretrainConfig(DataConfig(), model=MODEL, features=features)
    return checkpoints.save(
        folder / "pre" / "checkpoints", step=5, model=cat.state_dict(), optimizer={}, config=to_mapping(config)
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recipe) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert finetune(load_finetune_recipe(recipe), run_dir, progress=False).run.step == 9
    return run_dir


def numbers(run_dir: Path) -> list[dict]:
    return [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] != "speed"]


def losses_of(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run_dir / "metrics.jsonl", "train")]


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints.list_checkpoints(run_dir / "checkpoints")]


def scores(run_dir: Path) -> dict:
    return json.loads((run_dir / "scores.json").read_text())


def goes_on(run_dir: Path, recipe: Path, undisturbed: Path, *changes: str) -> bool:
    """Resumed, it is the run that was not disturbed, bit for bit."""
    finetune(load_finetune_recipe(recipe, changes), run_dir, resume=True, progress=False)
    ours, theirs = (checkpoints.load(checkpoints.newest(run)) for run in (run_dir, undisturbed))
    assert numbers(run_dir) == numbers(undisturbed)
    for mine, other in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    assert scores(run_dir) == scores(undisturbed)
    return True


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("step", [3, 6])
def test_stopped_and_resumed_it_is_the_same_run(tmp_path, recipe, undisturbed, step):
    result = finetune(load_finetune_recipe(recipe, [f"run.stop_at={step}"]), tmp_path / "run", progress=False)
    assert (result.run.step, result.scores) == (step, None)
    assert goes_on(tmp_path / "run", recipe, undisturbed)


@pytest.mark.parametrize(("where", "count"), [("finetune_batches", 0), ("finetune_batches", 5), ("scoring_batches", 1)])
def test_a_signal_wherever_it_comes(tmp_path, recipe, undisturbed, monkeypatch, where, count):
    function = getattr(finetuning, where)

    def signalling(*args, **options):
        for number, batch in enumerate(function(*args, **options)):
            if number == count:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, where, signalling)
        result = finetune(load_finetune_recipe(recipe), tmp_path / "run", progress=False)
    assert result.run.stopped_by == signal.SIGTERM
    assert result.scores is None
    assert not (tmp_path / "run" / "scores.json").exists()
    assert goes_on(tmp_path / "run", recipe, undisturbed)


@pytest.mark.slow
def test_killed_at_some_moment(tmp_path, recipe, undisturbed):
    command = [sys.executable, "-m", "cat", "finetune", str(recipe), f"run.dir={tmp_path}", "run.name=run"]
    process = subprocess.Popen([*command, "data.num_workers=1"], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    moment = np.random.default_rng().uniform(0, 0.5)
    while process.poll() is None and not steps(tmp_path / "run"):
        time.sleep(0.02)
    time.sleep(moment)
    process.kill()
    process.wait()
    assert goes_on(tmp_path / "run", recipe, undisturbed), f"killed {moment:.3f} s after the first checkpoint"


def test_an_error_does_not_cost_what_was_trained(tmp_path, recipe, undisturbed, monkeypatch):
    function = finetuning.finetune_batches

    def failing(*args, **options):
        for number, batch in enumerate(function(*args, **options)):
            if number == 4:
                raise RuntimeError("a surprise")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "finetune_batches", failing)
        with pytest.raises(RuntimeError, match="a surprise") as error:
            finetune(load_finetune_recipe(recipe), tmp_path / "run", progress=False)
    assert f"step 4 is saved; go on with: cat-audio finetune --resume {tmp_path / 'run'}" in error.value.__notes__
    assert goes_on(tmp_path / "run", recipe, undisturbed)


def test_workers_change_nothing(tmp_path, recipe, undisturbed):
    finetune(load_finetune_recipe(recipe, ["data.num_workers=2", "run.stop_at=6"]), tmp_path / "run", progress=False)
    assert numbers(tmp_path / "run") == [row for row in numbers(undisturbed) if row["step"] <= 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optim.layer_decay=0.5"], r"optim\.layer_decay was 0\.65, now 0\.5"),
        (["augment.mixup=0.3"], r"augment\.mixup was 0\.8, now 0\.3"),
        (["freeze=1"], "freeze was 0, now 1"),
        (["head.pooling=mean"], r"head\.pooling was 'cls', now 'mean'"),
        (["run.seed=1"], r"run\.seed was 0, now 1"),
    ],
)
def test_other_settings_do_not_resume(tmp_path, recipe, undisturbed, changes, message):
    config, _ = read_run(FinetuneConfig, undisturbed, changes)
    with pytest.raises(ConfigError, match=message):
        finetune(config, undisturbed, resume=True, progress=False)


def test_other_labels_do_not_resume(tmp_path, recipe, folder, capsys):
    """Of the same clips; nor a head of other classes."""
    clips = load_manifest(folder / "train").clips

    def write(labels):
        lines = [
            json.dumps({"path": str(folder / "train" / clip.path), "labels": [label]})
            for clip, label in zip(clips, labels, strict=True)
        ]
        (tmp_path / "list.jsonl").write_text("\n".join(lines))

    labels = [clip.labels[0] for clip in clips]
    changes = [f"data.train={tmp_path / 'list.jsonl'}", "data.valid=null", "data.test=null", "run.stop_at=2"]
    write(labels)
    finetune(load_finetune_recipe(recipe, changes), tmp_path / "run", progress=False)
    write([labels[-1], *labels[1:-1], labels[0]])
    config, _ = read_run(FinetuneConfig, tmp_path / "run", ["run.stop_at=3"])
    with pytest.raises(ConfigError, match=r"have other labels than when .*run was started"):
        finetune(config, tmp_path / "run", resume=True, progress=False)
    write([f"other {label}" for label in labels])
    with pytest.raises(ConfigError, match=r"classes was \['high', 'low', 'middle'\], now \['other high'"):
        finetune(load_finetune_recipe(recipe, changes), tmp_path / "run", resume=True, progress=False)
    with pytest.raises(ManifestError, match="none of the 3 classes"):
        finetune(config, tmp_path / "run", resume=True, progress=False)


def test_a_run_goes_on_with_the_command_that_began_it(undisturbed, capsys):
    assert main(["pretrain", "--resume", str(undisturbed)]) == 1
    told = capsys.readouterr().err
    assert f"so it is a recipe for: cat-audio finetune --resume {undisturbed}" in told


# ---------------------------------------------------------------- the result


def test_the_checkpoint_is_a_classifier_with_the_average_of_its_weights(undisturbed, folder):
    classifier, info = load_classifier(checkpoints.newest(undisturbed))
    assert (info.task, info.classes, info.padding, info.step) == ("single-label", ("high", "low", "middle"), "mask", 9)
    saved = checkpoints.load(checkpoints.newest(undisturbed)).model
    found = classifier.state_dict()
    assert all(torch.equal(tensor, saved[f"average.{name}"]) for name, tensor in found.items())
    assert not torch.equal(saved["head.linear.weight"], saved["average.head.linear.weight"])
    # what was evaluated at the end is what is loaded
    manifest = load_manifest(folder / "valid")
    right = 0
    for batch in scoring_batches(manifest, labels_of(manifest), info.features, patch_size=16, batch_size=4):
        chosen = classifier(batch.spec, rows=batch.rows).clip.argmax(1)
        right += int(batch.targets[torch.arange(len(chosen)), chosen].sum())
    assert numbers(undisturbed)[-1]["accuracy"] == right / 9


def test_the_test_split_is_scored_once_by_the_best_checkpoint(tmp_path, recipe, undisturbed, monkeypatch):
    rows = read_rows(undisturbed / "metrics.jsonl", "valid")
    best = max(rows, key=lambda row: (row["accuracy"], -row["step"]))
    found = scores(undisturbed)
    assert (found["step"], found["valid"]["accuracy"]) == (best["step"], best["accuracy"])
    assert load_classifier(undisturbed)[1].step == load_encoder(undisturbed)[1].step == best["step"]
    assert (found["seed"], found["chosen_on"], found["clips"]) == (0, "valid", {"train": 24, "valid": 9, "test": 9})
    assert found["classes"] == ["high", "low", "middle"]
    assert 0 <= found["test"]["accuracy"] <= 1
    seen = []
    of = finetuning_run._of
    monkeypatch.setattr(finetuning_run, "_of", lambda task, manifest: seen.append(manifest) or of(task, manifest))
    config, _ = read_run(FinetuneConfig, undisturbed)
    assert finetune(config, undisturbed, resume=True, progress=False).scores == found
    assert seen == []


def test_the_command_tells_the_scores(tmp_path, recipe, capsys):
    assert main(["finetune", str(recipe), f"run.dir={tmp_path}", "run.name=run", "optim.steps=3", "--quiet"]) == 0
    told = capsys.readouterr().out
    found = scores(tmp_path / "run")
    assert f"valid accuracy: {found['valid']['accuracy']:.4f} (9 clips, where step 3 was chosen)" in told
    assert f"test accuracy: {found['test']['accuracy']:.4f} (9 clips)" in told
    assert main(["finetune", str(recipe), f"run.dir={tmp_path}", "run.name=run", "--quiet"]) == 1
    assert "already holds a run" in capsys.readouterr().err
    run = ["finetune", str(recipe), f"run.dir={tmp_path}", "run.name=run", "run.stop_at=1", "--quiet", "--overwrite"]
    assert main(run) == 0
    assert not (tmp_path / "run" / "scores.json").exists()
    assert f"go on with: cat-audio finetune --resume {tmp_path / 'run'} run.stop_at=null" in capsys.readouterr().out


def test_clips_are_held_out_where_there_are_none_to_choose_by(tmp_path, recipe):
    changes = ["data.valid=null", "data.valid_share=0.25", "optim.steps=3"]
    found = finetune(load_finetune_recipe(recipe, changes), tmp_path / "run", progress=False).scores
    assert (found["chosen_on"], found["clips"]) == ("held-out", {"train": 18, "valid": 6, "test": 9})


def test_chosen_by_the_test_split_is_said(tmp_path, recipe, folder):
    config = load_finetune_recipe(recipe, [f"data.valid={folder / 'test'}", "optim.steps=3"])
    found = finetune(config, tmp_path / "run", progress=False).scores
    assert found["chosen_on"] == "test"
    assert found["valid"] == found["test"]


def test_it_learns(tmp_path, folder):
    """Three tones, a tiny model from scratch, a few seconds."""
    (tmp_path / "learn.yaml").write_text(RECIPE)
    changes = [
        *(f"data.{part}={folder / part}" for part in ("train", "valid", "test")),
        *("augment.noise=0", "augment.mixup=0", "augment.mask_frames=0", "data.batch_size=12", "head.pooling=mean"),
        *("optim.steps=45", "optim.lr=2e-2", "optim.layer_decay=1", "optim.average=0", "optim.drop_path=0"),
        *("augment.mask_bins=0", "model.depth=1", "model.embed_dim=32", "run.checkpoint_every=15"),
    ]
    config = load_finetune_recipe(tmp_path / "learn.yaml", changes)
    assert finetune(config, tmp_path / "run", progress=False).scores["test"]["accuracy"] >= 7 / 9  # chance: 3 / 9


def test_patience_ends_a_run_that_gets_no_better(tmp_path, recipe, monkeypatch):
    accuracies = iter([0.2, 0.5, 0.5, 0.4, 0.9])
    evaluate = finetuning.Finetuning.evaluate
    monkeypatch.setattr(
        finetuning.Finetuning, "evaluate", lambda self, b: {**evaluate(self, b), "accuracy": next(accuracies)}
    )
    changes = ["optim.steps=30", "optim.patience=2", "data.test=null", "run.keep_last=1"]
    result = finetune(load_finetune_recipe(recipe, changes), tmp_path / "run", progress=False)
    assert (result.run.step, result.run.early) == (12, True)
    assert (result.scores["step"], result.scores["test"]) == (6, None)
    again = finetune(load_finetune_recipe(recipe, changes), tmp_path / "run", resume=True, progress=False)
    assert (again.run.step, again.run.early, again.scores) == (12, True, result.scores)


# ---------------------------------------------------------------- what it begins with


def begun(recipe: Path, run_dir: Path, *changes: str):
    """The weights of a run's only checkpoint, and those it began with."""
    config = load_finetune_recipe(recipe, ["optim.steps=2", "data.valid=null", "data.test=null", *changes])
    task = finetuning.Finetuning(config, finetuning.read_splits(config))
    task.begin()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    finetune(config, run_dir, progress=False)
    return before, checkpoints.load(checkpoints.newest(run_dir)).model


@pytest.fixture
def plain(tmp_path, folder) -> Path:
    """A recipe that says nothing of the model."""
    text = RECIPE.replace("model: {channels: [8, 8], embed_dim: 16, depth: 2, num_heads: 2}", "")
    (tmp_path / "plain.yaml").write_text(text.replace("data: {", f"data: {{train: {folder / 'train'}, "))
    return tmp_path / "plain.yaml"


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_it_begins_with_the_encoder(tmp_path, plain, pretrained, weights):
    before, _ = begun(plain, tmp_path / "run", f"encoder={pretrained}", f"weights={weights}")
    encoder, _ = load_encoder(pretrained, weights)
    for prefix in ("encoder.", "average.encoder."):
        own = {name.removeprefix(prefix): t for name, t in before.items() if name.startswith(prefix)}
        assert all(torch.equal(tensor, own[name]) for name, tensor in encoder.state_dict().items())


def test_model_and_features_are_the_encoders(plain, pretrained):
    config = load_finetune_recipe(plain, [f"encoder={pretrained}"])
    assert config.model == MODEL
    assert (config.features.mean, config.features.std) == (-6.0, 5.0)
    assert config.features.frames == 64  # of the longest clip, 0.6 s, in whole patches; not the 32 of pre-training
    config = load_finetune_recipe(plain, [f"encoder={pretrained}", "features.frames=48", "features.mean=-5"])
    assert (config.features.frames, config.features.mean, config.features.std) == (48, -5.0, 5.0)


def test_an_encoder_of_another_width_is_an_error(plain, pretrained):
    for change, message in (("model.embed_dim=32", "embed_dim is 32, there 16"), ("model.preset=tiny", "depth is 4")):
        with pytest.raises(ConfigError, match=rf"not that of encoder=.*model\.{message}.*Leave the section model out"):
            load_finetune_recipe(plain, [f"encoder={pretrained}", change])
    config = load_finetune_recipe(plain, ["model.preset=tiny"])
    task = finetuning.Finetuning(dataclasses.replace(config, encoder=str(pretrained)), finetuning.read_splits(config))
    with pytest.raises(ConfigError, match="embed_dim is 192, there 16"):
        task.begin()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_finetune_recipe(plain, ["encoder=nowhere"])


@pytest.mark.parametrize(("freeze", "lowest"), [("encoder", 2), ("1", 1), ("2", 2)])
def test_what_is_frozen_stays_bit_for_bit(tmp_path, plain, pretrained, freeze, lowest):
    before, after = begun(plain, tmp_path / "run", f"encoder={pretrained}", f"freeze={freeze}", "optim.steps=3")
    frozen = ("encoder.stem.", "encoder.cls", "encoder.norm.", *(f"encoder.blocks.{i}." for i in range(lowest)))
    for name, tensor in before.items():
        plain_name = name.removeprefix("average.")
        assert torch.equal(tensor, after[name]) == plain_name.startswith(frozen), name
    optimizer = checkpoints.load(checkpoints.newest(tmp_path / "run")).optimizer
    assert not [name for name in optimizer if name.partition(".")[2].startswith(frozen)]


def test_frozen_parts_are_in_eval_mode(plain, pretrained):
    config = load_finetune_recipe(plain, [f"encoder={pretrained}", "freeze=1"])
    task = finetuning.Finetuning(config, finetuning.read_splits(config))
    task.train_mode()
    encoder = task.model.encoder
    assert [m.training for m in (encoder.stem, encoder.norm, *encoder.blocks, task.model.head)] == [
        *(False, False, False, True, True)
    ]


def test_frames_that_fit_the_clips(tmp_path, folder):
    config = load_finetune_recipe(folder / "minute.yaml")
    assert config.features.frames == 64
    soundfile.write(tmp_path / "long.wav", np.zeros(20 * RATE), RATE)
    assert fitting_frames(load_manifest(tmp_path), config.features, 16) == 1024
    (tmp_path / "long.wav").write_bytes(b"no audio")
    assert fitting_frames(load_manifest(tmp_path), config.features, 16) == 16


# ---------------------------------------------------------------- tasks


def listed(path: Path, folder: Path, entry) -> Path:
    """A manifest of the clips of a folder, with what ``entry`` says of each."""
    clips = load_manifest(folder).clips
    path.write_text("\n".join(json.dumps({"path": str(folder / clip.path), **entry(clip)}) for clip in clips))
    return path


def test_several_labels_a_clip(tmp_path, recipe, folder):
    def entry(clip):
        return {"labels": [*clip.labels, "tone"] if "1" in clip.path else list(clip.labels)}

    both = listed(tmp_path / "m.jsonl", folder / "train", entry)
    changes = [f"data.train={both}", "data.valid=null", "data.test=null", "optim.steps=3", "loss.over=positives"]
    config = load_finetune_recipe(recipe, changes)
    assert (config.task, config.head.loss, config.classes) == ("multi-label", "bce", ("high", "low", "middle", "tone"))
    result = finetune(config, tmp_path / "run", progress=False)
    assert result.scores["metric"] == "mAP"
    assert checkpoints.read_state(result.run.checkpoint)["score"] == -numbers(tmp_path / "run")[-1]["mAP"]


def test_events_from_strong_and_from_weak_labels(tmp_path, recipe, folder, capsys):
    def entry(clip):
        if "1" in clip.path:
            return {"labels": list(clip.labels)}
        return {"events": [{"onset": 0.0, "offset": 0.2, "label": clip.labels[0]}]}

    events = listed(tmp_path / "e.jsonl", folder / "train", entry)
    changes = [f"data.train={events}", "data.valid=null", "data.test=null", "optim.steps=3", "loss.over=mean"]
    config = load_finetune_recipe(recipe, changes)
    assert (config.task, config.head.kind) == ("events", "frames")
    finetune(config, tmp_path / "run", progress=False)
    assert load_classifier(tmp_path / "run")[1].task == "events"
    if importlib.util.find_spec("sed_eval") is None:
        assert "no settings of events were chosen: scores of events need sed_eval" in capsys.readouterr().err
        return
    assert f"settings of events: {tmp_path / 'run' / 'events.json'}, chosen on valid" in capsys.readouterr().err
    (tmp_path / "run" / "events.json").write_text("{}")  # as somebody has edited it
    finetune(config, tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "events.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["task=multi-label", "head.loss=ce"], "head.loss is 'ce' with task=multi-label; expected 'bce'"),
        (["task=events", "head.kind=clip", "head.pooling=cls"], "head.kind is 'clip' with task=events"),
        (["head.loss=bce", "loss.label_smoothing=0.1"], r"label_smoothing is 0\.1 with head\.loss='bce'"),
        (["loss.over=mean"], "loss.over is 'mean' with head.loss='ce'"),
        (["freeze=3"], "freeze is 3; expected 0 to 2"),
        (["freeze=stem"], "freeze is stem; expected an integer or one of encoder"),
        (["run.cuda_graph=true"], "cuda_graph"),
        (["run.compile=step"], "run.compile='step' with data.padding='mask'; expected 'blocks'"),
        (["data.fold=1"], "data.fold is 1 and data.test .*; expected one of them"),
        (["task=regression"], "task is 'regression'; expected one of auto, single-label"),
        (["features.frames=40"], "multiple of the patch size 16"),
        (["data.trian=x"], "unknown key 'data.trian'"),
    ],
)
def test_recipes_that_contradict_themselves(recipe, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_finetune_recipe(recipe, changes)


def test_a_recipe_for_pre_training_is_told(recipe, capsys):
    tiny = REPOSITORY / "recipes" / "tiny.yaml"
    assert main(["finetune", str(tiny), "data.train=x"]) == 1
    assert f"so it is a recipe for: cat-audio pretrain {tiny}" in capsys.readouterr().err
    assert main(["pretrain", str(recipe)]) == 1
    assert f"so it is a recipe for: cat-audio finetune {recipe}" in capsys.readouterr().err


def test_labels_that_training_does_not_know(tmp_path, recipe, folder):
    other = listed(tmp_path / "o.jsonl", folder / "valid", lambda clip: {"labels": [f"very {clip.labels[0]}"]})
    for part in ("valid", "test"):
        with pytest.raises(ManifestError, match=r"9 clips with labels that are none of the 3 classes: .*very high"):
            finetune(load_finetune_recipe(recipe, [f"data.{part}={other}"]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_one_class_only_and_no_labels(tmp_path, recipe, folder, capsys):
    changes = ["data.valid=null", "data.test=null", f"run.dir={tmp_path}"]
    one = listed(tmp_path / "one.jsonl", folder / "train", lambda clip: {"labels": ["tone"]})
    for train, message in (
        (one, "a single class, 'tone'"),
        (folder / "train" / "low", "none of its 8 clips has a label"),
    ):
        assert main(["finetune", str(recipe), f"data.train={train}", *changes]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "minute").exists()
    assert main(["finetune", str(recipe), "data.train=", *changes]) == 1
    assert "data.train is missing; expected a folder with a folder for each class" in capsys.readouterr().err


def test_clips_that_are_trained_on_and_scored_are_told(recipe, folder, tmp_path, capsys):
    finetuning.read_splits(load_finetune_recipe(recipe))
    assert "are trained on" not in capsys.readouterr().err
    (tmp_path / "link").symlink_to(folder / "train")
    for again in (folder / "train", tmp_path / "link"):
        finetuning.read_splits(load_finetune_recipe(recipe, [f"data.test={again}"]))
        assert "warning: 24 of the 24 clips of data.test are trained on" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, recipe):
    changes = ["optim.lr=1e30", "optim.warmup_steps=0", "optim.average=0", "run.max_bad_steps=2"]
    with pytest.raises(TrainingError, match=r"not finite .*Start another run .*lower optim\.lr"):
        finetune(load_finetune_recipe(recipe, changes), tmp_path / "run", progress=False)
    assert checkpoints.newest(tmp_path / "run") is None


def test_bf16(tmp_path, recipe, undisturbed):
    finetune(load_finetune_recipe(recipe, ["run.precision=bf16", "run.stop_at=3"]), tmp_path / "run", progress=False)
    losses = [
        [row["loss"] for row in numbers(run) if row["kind"] == "train"] for run in (tmp_path / "run", undisturbed)
    ]
    assert losses[0] == pytest.approx(losses[1][:3], rel=0.05)
    assert losses[0] != losses[1][:3]
    config, _ = read_run(FinetuneConfig, tmp_path / "run", ["run.precision=fp32", "run.stop_at=4"])
    with pytest.raises(ConfigError, match="was trained in bf16"):
        finetune(config, tmp_path / "run", resume=True, progress=False)


def test_compiled_blocks_change_rounding_only(tmp_path, recipe, undisturbed, monkeypatch):
    monkeypatch.setattr(finetune_step, "COMPILER", "eager")
    finetune(load_finetune_recipe(recipe, ["run.compile=blocks", "run.stop_at=3"]), tmp_path / "run", progress=False)
    losses = [
        [row["loss"] for row in numbers(run) if row["kind"] == "train"] for run in (tmp_path / "run", undisturbed)
    ]
    assert losses[0] == pytest.approx(losses[1][:3], rel=1e-5)


def test_profile_writes_a_trace_and_nothing_else(tmp_path, recipe):
    result = profile(load_finetune_recipe(recipe), tmp_path / "run", steps=2)
    assert result.trace.is_file()
    assert {"input", "backward", "optimiser", "EMA"} <= result.parts.keys()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["profile"]
