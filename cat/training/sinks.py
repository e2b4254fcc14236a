"""Where else than in ``metrics.jsonl`` people look at a run: TensorBoard, Weights & Biases, MLflow.

They are for looking on. What goes wrong with one while a run trains is said, and the run goes on without it; only what
was asked for and cannot be begun ends a run before its first update. A run that goes on goes on in the same run of each
service; ``loggers.json`` has their names.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cat.config import ConfigError, flatten
from cat.files import write_json

NAMES = ("wandb", "mlflow")  # of run.loggers
IDS = "loggers.json"
_LONGEST = 500  # characters of a parameter that every MLflow server takes
_AT_ONCE = 100  # parameters, likewise


class Sink(Protocol):
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Finite numbers, by names such as "train/loss"."""
        ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """All of a run; what one of them raises is told once, and then it is left out.

    Args:
        config: every field of the recipe, nested as there; shown beside the curves.
        warn: is told when the run goes on without one.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any] | None,
        *,
        start_step: int,
        tensorboard: bool,
        loggers: Sequence[str],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._open: dict[str, Sink] = {}
        if tensorboard:
            self._open["TensorBoard"] = TensorBoard(run_dir, config, start_step)
        for name in loggers:
            title, make = _KINDS[name]
            try:
                self._open[title] = make(run_dir, config or {})
            except ImportError:
                self.close()
                raise ImportError(
                    f"run.loggers has {name!r}, and the package {name} is not installed: pip install {name}, or leave "
                    "it out of run.loggers"
                ) from None
            except Exception as error:  # whatever the service's package raises
                if not start_step:
                    self.close()
                    raise ConfigError(
                        f"{title} cannot be begun ({_text(error)}). {_REMEDIES[name]}, or leave it out of run.loggers"
                    ) from error
                warn(f"{title} cannot be begun ({_text(error)}): the run goes on without it")

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        named = {f"{group}/{key}": value for key, value in values.items()}
        self._each(lambda sink: sink.scalars(named, step))

    def flush(self) -> None:
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self._open = {}

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                call(sink)
            except Exception as error:  # of its writing thread, a while ago, or of a network
                del self._open[name]
                self._warn(f"{name} cannot be written ({_text(error)}): the run goes on without it")


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class TensorBoard:
    """``tensorboard/`` in the run directory."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any] | None, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "TensorBoard is not installed: pip install 'cat-kernels[train]', or switch it off with "
                "run.tensorboard=false"
            ) from None
        self._writer: Any = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )
        if config is not None:
            import yaml

            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), start_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Online as the package is set up, or with WANDB_MODE=offline in ``wandb/`` of the run directory, for ``wandb
    sync``. The project is WANDB_PROJECT's, or "cat-audio"."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        known = _ids(run_dir).get("wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "cat-audio",
            dir=str(run_dir),
            name=run_dir.name,
            id=known,
            resume="allow" if known else None,
            config=dict(config),
            settings=wandb.Settings(console="off"),  # stdout is for results
        )
        # An axis of our own: wandb's must not go back, and a run that goes on begins at its newest checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        _keep_id(run_dir, "wandb", self._run.id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def flush(self) -> None:
        """It has a process that writes at once."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Where MLFLOW_TRACKING_URI says, else in the file ``mlflow.db`` of the run directory. The experiment is
    MLFLOW_EXPERIMENT_NAME's, or "cat-audio"."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        uri = mlflow_uri(run_dir)
        self._client: Any = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cat-audio"
        found = self._client.get_experiment_by_name(name)
        # A server knows where its files go; by itself MLflow would put them where the command was started.
        place = None if "MLFLOW_TRACKING_URI" in os.environ else (run_dir.absolute() / "mlflow").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=place)
        self._run = _ids(run_dir).get("mlflow") or ""
        if self._run:
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            _keep_id(run_dir, "mlflow", self._run)
            params = [Param(key, str(value)[:_LONGEST]) for key, value in flatten(config).items()]
            for first in range(0, len(params), _AT_ONCE):
                self._client.log_batch(self._run, params=params[first : first + _AT_ONCE])
        with contextlib.suppress(MlflowException):  # a server without a place for files
            self._client.log_dict(self._run, dict(config), "config.yaml")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[self._metric(key, v, now, step) for key, v in values.items()])

    def flush(self) -> None:
        """Every batch is written at once."""

    def close(self) -> None:
        self._client.set_terminated(self._run)


def mlflow_uri(run_dir: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.absolute() / 'mlflow.db'}"


_KINDS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any]], Sink]]] = {
    "wandb": ("Weights & Biases", WeightsAndBiases),
    "mlflow": ("MLflow", MLflow),
}
_REMEDIES = {
    "wandb": "Log in (wandb login), or write it beside the run for later (WANDB_MODE=offline)",
    "mlflow": "Look at MLFLOW_TRACKING_URI; without it MLflow, but not mlflow-skinny, writes into the run directory",
}


def _ids(run_dir: Path) -> dict[str, str]:
    """Names of the runs that this one goes on in; none where the file is not there or damaged."""
    try:
        found = json.loads((run_dir / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _keep_id(run_dir: Path, name: str, value: str) -> None:
    write_json(run_dir / IDS, {**_ids(run_dir), name: value})
