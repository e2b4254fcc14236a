"""Weights & Biases and MLflow: the packages themselves, offline, where they are installed; look-alikes elsewhere."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from cat.config import ConfigError, from_mapping
from cat.training.recipe import RunConfig
from cat.training.sinks import Sinks

CONFIG = {"data": {"train": "clips", "batch_size": 3}, "optim": {"lr": 1e-3, "betas": [0.9, 0.95]}}


def opened(run_dir, *loggers, start_step=0, warn=print, config=CONFIG):
    run_dir.mkdir(exist_ok=True)
    return Sinks(run_dir, config, start_step=start_step, tensorboard=False, loggers=loggers, warn=warn)


@pytest.fixture
def wandb(monkeypatch):
    module = ModuleType("wandb")
    module.begun, module.logged, module.ended = [], [], 0

    def init(**settings):
        module.begun.append(settings)
        return SimpleNamespace(
            id=settings["id"] or "abc",
            define_metric=lambda *args, **kwargs: None,
            log=module.logged.append,
            finish=lambda **kwargs: setattr(module, "ended", module.ended + 1),
        )

    module.init, module.Settings = init, SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told = SimpleNamespace(runs=[], metrics=[], params=[], states=[], uri=None)

    class MlflowClient:
        def __init__(self, tracking_uri):
            told.uri = tracking_uri

        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id="1") if told.runs else None

        def create_experiment(self, name, artifact_location=None):
            return "1"

        def create_run(self, experiment, run_name):
            told.runs.append(run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def update_run(self, run, status):
            told.states.append((run, status))

        def set_terminated(self, run):
            told.states.append((run, "FINISHED"))

        def log_batch(self, run, metrics=(), params=()):
            told.metrics += [(m.key, m.value, m.step) for m in metrics]
            told.params += [(p.key, p.value) for p in params]

        def log_dict(self, run, values, name):
            pass

    modules = {name: ModuleType(name) for name in ("mlflow", "mlflow.entities", "mlflow.exceptions", "mlflow.tracking")}
    modules["mlflow.entities"].Metric = lambda key, value, timestamp, step: SimpleNamespace(
        key=key, value=value, step=step
    )
    modules["mlflow.entities"].Param = lambda key, value: SimpleNamespace(key=key, value=value)
    modules["mlflow.exceptions"].MlflowException = RuntimeError
    modules["mlflow.tracking"].MlflowClient = MlflowClient
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_wandb_gets_the_configuration_and_a_run_that_goes_on_its_name(tmp_path, wandb):
    for start in (0, 4):
        sinks = opened(tmp_path / "run", "wandb", start_step=start)
        sinks.scalars("train", {"loss": 1.5}, start + 2)
        sinks.close()
    assert [(begun["id"], begun["resume"]) for begun in wandb.begun] == [(None, None), ("abc", "allow")]
    assert wandb.begun[0]["config"] == CONFIG
    assert wandb.logged == [{"train/loss": 1.5, "step": 2}, {"train/loss": 1.5, "step": 6}]
    assert wandb.ended == 2
    assert json.loads((tmp_path / "run" / "loggers.json").read_text()) == {"wandb": "abc"}


def test_mlflow_gets_the_configuration_and_a_run_that_goes_on_its_name(tmp_path, mlflow):
    for start in (0, 4):
        sinks = opened(tmp_path / "run", "mlflow", start_step=start)
        sinks.scalars("train", {"loss": 1.5}, start + 2)
        sinks.close()
    assert mlflow.runs == ["run"]
    assert ("optim.betas", "[0.9, 0.95]") in mlflow.params
    assert len(mlflow.params) == 4
    assert mlflow.metrics == [("train/loss", 1.5, 2), ("train/loss", 1.5, 6)]
    assert mlflow.states == [("r1", "FINISHED"), ("r1", "RUNNING"), ("r1", "FINISHED")]
    assert str(tmp_path / "run") in mlflow.uri


def test_a_service_that_fails_is_told_once_and_left_out(tmp_path, wandb):
    said = []
    sinks = opened(tmp_path / "run", "wandb", warn=said.append)
    sinks._open["Weights & Biases"]._run.log = broken
    for step in (1, 2):
        sinks.scalars("train", {"loss": 1.0}, step)
    sinks.close()
    assert said == ["Weights & Biases cannot be written (no route to host): the run goes on without it"]


def test_a_service_that_cannot_be_begun_ends_a_new_run_and_no_other(tmp_path, wandb):
    wandb.init = broken
    with pytest.raises(ConfigError, match=r"cannot be begun \(no route to host\)\. Log in .*WANDB_MODE=offline"):
        opened(tmp_path / "run", "wandb")
    said = []
    opened(tmp_path / "run", "wandb", start_step=7, warn=said.append).close()
    assert said == ["Weights & Biases cannot be begun (no route to host): the run goes on without it"]


def broken(*args, **kwargs):
    raise OSError("no route to host")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"package {name} is not installed: pip install {name}"):
        opened(tmp_path / "run", name)


def test_a_logger_that_there_is_not():
    with pytest.raises(ConfigError, match="loggers has 'comet'; expected of wandb, mlflow"):
        from_mapping(RunConfig, {"loggers": ["comet"]}, source="a test")


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.mark.slow
@installed("wandb")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 4):
        said = []
        sinks = opened(tmp_path / "run", "wandb", start_step=start, warn=said.append)
        sinks.scalars("train", {"loss": 1.5}, start + 2)
        sinks.flush()
        sinks.close()
        assert said == []
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 2
    (known,) = json.loads((tmp_path / "run" / "loggers.json").read_text()).values()
    assert all(known in path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
@installed("mlflow")
def test_mlflow_in_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for start in (0, 4):
        said = []
        sinks = opened(tmp_path / "run", "mlflow", start_step=start, warn=said.append)
        sinks.scalars("train", {"loss": 1.5, "regularisation.g": 0.5}, start + 2)
        sinks.close()
        assert said == []
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(sinks_uri(tmp_path / "run"))
    (experiment,) = [e for e in client.search_experiments() if e.name == "cat-audio"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["optim.lr"] == "0.001"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [2, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing where the command was started


def sinks_uri(run_dir):
    from cat.training.sinks import mlflow_uri

    return mlflow_uri(run_dir)
