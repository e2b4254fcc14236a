"""What a pre-training recipe holds, and which of it may change when a run is resumed."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import torch

from cat.checkpoints import store as checkpoints
from cat.config import ConfigError, differences, from_mapping, read_yaml, to_mapping
from cat.data.dataset import DataConfig
from cat.data.features import FEATURE_PRESETS, FeatureConfig
from cat.data.masks import MaskConfig
from cat.data.share import Share
from cat.device import pick_device as pick_device  # for those who look for it here
from cat.model import PRESETS, GuideConfig, ModelConfig, ObjectiveConfig, check_guide_names
from cat.training.optim import EmaConfig, OptimConfig
from cat.training.sinks import NAMES as LOGGERS

SECTION_PRESETS: dict[type, Mapping[str, Any]] = {ModelConfig: PRESETS, FeatureConfig: FEATURE_PRESETS}


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, what it runs on, and how often it reports and saves."""

    name: str = ""  # the run directory is dir/name; empty: the recipe's file name
    dir: Path = Path("runs")
    seed: int = 0  # of the weights, the data order, the masks and the noise
    weights_seed: int | None = None  # of the weights alone; null: the seed
    device: str = "auto"  # "auto": the GPU where there is one; "cpu", "cuda", "cuda:1"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # "auto": bf16 autocast on a GPU, fp32 on the CPU
    compile: Literal["none", "blocks", "step"] = "none"  # torch.compile of every block, or of the whole loss
    cuda_graph: bool = False  # record the whole step as one CUDA graph and replay it; GPU only
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes each has a copy of the model, or a shard of it
    threads: int = 0  # CPU threads; 0: torch's choice
    timeout: float = 600.0  # seconds that processes which train together wait for one another
    stop_at: int | None = (
        None  # stop with a checkpoint after so many updates of the schedule's optim.steps; --resume goes on
    )
    log_every: int = 50  # updates between two writes of metrics; each waits for the device once
    eval_every: int = 5_000  # updates between two validation losses, when data.valid is given; 0: at checkpoints only
    checkpoint_every: int = 5_000  # updates
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints with the lowest validation (else training) loss kept besides
    keep_every: int = 0  # and those of every so many updates; 0: none for that
    tensorboard: bool = True
    loggers: tuple[str, ...] = ()  # of "wandb" and "mlflow", whose packages are then needed
    line_every: float = 10.0  # seconds between two lines of progress where stderr is no terminal
    max_bad_steps: int = 10  # so many updates in a row whose loss or gradient is not finite end the run
    figures: bool = True  # write figures/ at the end, when matplotlib is installed
    collapse_pred_std: float = 0.01  # warn below, after collapse_steps updates in a row
    collapse_target_std: float = 0.1
    collapse_steps: int = 500  # 0: never warn
    guidance_share: float = 0.5  # of the schedule after warm-up, by when L_r must beat a constant; 0: never warn of it

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep_last", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("threads", "eval_every", "keep_best", "keep_every", "collapse_steps", "line_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if wrong := [name for name in self.loggers if name not in LOGGERS]:
            raise ValueError(f"loggers has {wrong[0]!r}; expected of {', '.join(LOGGERS)}")
        if self.parallel == "fsdp" and (self.cuda_graph or self.compile == "step"):
            other = "cuda_graph=true" if self.cuda_graph else "compile='step'"
            raise ValueError(
                f"parallel is 'fsdp' with {other}; expected cuda_graph=false and compile 'none' or 'blocks': "
                "weights are gathered block by block, which a graph of all of them cannot hold"
            )
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; expected seconds, above 0")
        if not 0 <= self.guidance_share <= 1:
            raise ValueError(f"guidance_share is {self.guidance_share}; expected a share of the schedule, 0 to 1")
        for name in ("seed", "weights_seed"):
            if not 0 <= (getattr(self, name) or 0) < 1 << 63:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 2^63 - 1")
        if self.stop_at is not None and self.stop_at < 1:
            raise ValueError(f"stop_at is {self.stop_at}; expected at least 1, or null")

    @property
    def path(self) -> Path:
        """The run directory."""
        name = self.name
        if "\0" in name or ".." in Path(name).parts or Path(name).is_absolute() or not Path(name).name:
            raise ConfigError(
                f"run.name is {name!r}; expected the name of a folder in run.dir ({self.dir}); for a run elsewhere "
                "set run.dir"
            )
        return self.dir / name

    @staticmethod
    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        """Fields as earlier versions wrote them, in recipes and checkpoints, as today's: ``compile`` was a bool."""
        if isinstance(values.get("compile"), bool):
            values["compile"] = "step" if values["compile"] else "none"
        return values


class Data(Protocol):
    """The section ``data``, as far as the loop reads it."""

    @property
    def train(self) -> str: ...
    @property
    def valid(self) -> str | None: ...
    @property
    def global_batch(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def update_clips(self) -> int: ...
    @property
    def max_failed_share(self) -> float: ...


class Recipe(Protocol):
    """The configuration of a run, a dataclass of sections, as far as the loop reads it."""

    @property
    def data(self) -> Data: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def run_dir(self) -> Path: ...
    @property
    def end(self) -> int: ...


def check_fit(model: ModelConfig, features: FeatureConfig) -> None:
    """Raises: ValueError for spectrograms that the model does not take."""
    if features.mel_bins != model.mel_bins:
        raise ValueError(
            f"features.mel_bins is {features.mel_bins} and model.mel_bins {model.mel_bins}; expected the same"
        )
    if features.frames % model.patch_size:
        raise ValueError(
            f"features.frames is {features.frames}; expected a multiple of the patch size {model.patch_size} (the last "
            "resolution)"
        )


@dataclass(frozen=True)
class PretrainConfig:
    """A whole recipe; each section is the dataclass of the module that uses it."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    guides: Mapping[str, GuideConfig] = field(default_factory=dict)
    masks: MaskConfig = field(default_factory=MaskConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_fit(self.model, self.features)
        check_guide_names(self.guides)

    @property
    def run_dir(self) -> Path:
        return self.run.path

    @property
    def end(self) -> int:
        """The update after which the run ends: of the whole schedule, unless stopped earlier."""
        return min(self.optim.steps, self.run.stop_at or self.optim.steps)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and frequency, (H, W)."""
        return self.features.frames // self.model.patch_size, self.model.mel_bins // self.model.patch_size


R = TypeVar("R", bound=Recipe)


# Keys at the top of a recipe that only one command knows.
_OWN_KEYS = {
    "pretrain": ("objective", "guides", "masks", "ema"),
    "finetune": ("task", "encoder", "weights", "freeze", "head", "loss", "augment", "classes", "class_names"),
}
# Where it is installed, and of a checkout (setup.py).
RECIPES = next(
    (folder for up in (1, 2) if (folder := Path(__file__).parents[up] / "recipes").is_dir()), Path("recipes")
)


def find_recipe(name: str) -> Path:
    """The recipe at a path, or one of those that come with the package by its name: "esc50". What the pages write,
    "recipes/esc50.yaml", is that too where there is no such file."""
    path = Path(name)
    plain = path.name == name and not path.suffix
    shipped = RECIPES / (f"{name}.yaml" if plain else path.name)
    known = plain or path == Path("recipes", path.name)
    return shipped if known and not path.exists() and shipped.is_file() else path


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a recipe; a run without a name gets the file's.

    Raises: `ConfigError`.
    """
    recipe = read_yaml(path)
    check_purpose(recipe, path, "pretrain")
    return named(
        from_mapping(PretrainConfig, recipe, source=str(path), overrides=overrides, presets=SECTION_PRESETS), path
    )


def check_purpose(recipe: Mapping[str, Any], path: str | os.PathLike[str], command: str) -> None:
    """Raises: `ConfigError` for a recipe of another command than "pretrain" or "finetune", whichever this is."""
    for other, keys in _OWN_KEYS.items():
        own = [key for key in keys if key in recipe]
        if other != command and own:
            raise ConfigError(f"{path} has {own[0]!r}, so it is a recipe for: cat-audio {other} {path}")


def named(config: R, path: str | os.PathLike[str]) -> R:
    """With a name for the run: that of the recipe's file, where it has none."""
    if config.run.name:
        return config
    changes: dict[str, Any] = {"run": dataclasses.replace(config.run, name=Path(path).stem)}
    return dataclasses.replace(cast(Any, config), **changes)


def load_run(run_dir: Path, overrides: Sequence[str] = ()) -> tuple[PretrainConfig, str | None]:
    """`read_run` of pre-training."""
    return read_run(PretrainConfig, run_dir, overrides)


def read_run(kind: type[R], run_dir: Path, overrides: Sequence[str] = ()) -> tuple[R, str | None]:
    """The configuration of a run of this kind, from its config.yaml; where a crash or a copy has damaged that, from its
    newest checkpoint, with a note that says so.

    Raises: `ConfigError`.
    """
    path = run_dir / "config.yaml"
    newest = checkpoints.newest(run_dir)
    if newest is None and not path.exists():
        raise ConfigError(
            f"{run_dir} is a directory without config.yaml; expected a recipe (YAML) or a run directory with --resume"
        )
    try:
        saved = read_yaml(path)
        damage = "" if saved else f"{path} is empty"
    except ConfigError as error:
        damage = str(error)
    if damage and newest is None:
        raise ConfigError(
            f"{damage}, and {run_dir} has no checkpoint to take the configuration from; expected every field of the "
            "recipe: give the recipe and --resume, or start another run"
        )
    source, note = str(path), None
    if damage and newest is not None:
        saved, source = checkpoints.read_state(newest)["config"], str(newest / checkpoints.STATE)
        note = f"note: {damage}; the configuration is that of {newest}"
    check_purpose(saved, f"--resume {run_dir}", "pretrain" if kind is PretrainConfig else "finetune")
    config = from_mapping(kind, saved, source=source, overrides=overrides, presets=SECTION_PRESETS)
    return named(config, path), note


def pick_precision(name: str, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The arithmetic of ``run.precision`` on this device."""
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return cast(Literal["fp32", "bf16", "fp16"], name)


def pick_features(name: str, device: torch.device) -> Literal["gpu", "cpu"]:
    """Where ``data.features`` has the log-mel made: on the run's device ("gpu", whatever it is) or by data workers."""
    if name == "auto":
        return "gpu" if device.type == "cuda" else "cpu"
    return "gpu" if name == "gpu" else "cpu"


def made_with(
    run: RunConfig, device: torch.device, precision: str, kernels: str, features: str, share: Share
) -> dict[str, Any]:
    """What the numbers of a run depend on, bit for bit, besides its configuration and data."""
    return {
        "torch": torch.__version__,
        "device": device.type,
        "precision": precision,
        "compile": run.compile,
        "cuda_graph": run.cuda_graph,
        "kernels": kernels,
        "features": features,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "processes": share.pieces // share.own,
        "parallel": run.parallel if share.pieces > share.own else None,
        "pieces": share.pieces,
    }


# ---------------------------------------------------------------- resuming

# Keys that leave a run's numbers alone (or change them by rounding only). data.train and data.valid may move, but the
# clips must be the same: `cat.training.identity` compares them. run.precision is compared as resolved.
_FREE = {
    "data.train",
    "data.valid",
    "data.test",
    "data.num_workers",
    "data.prefetch",
    "data.features",
    "data.max_failed_share",
    "model.kernels",
}
# Of a guide: where its embeddings come from may move too; what they are is compared.
_FREE_OF_A_GUIDE = re.compile(r"guides\.\w+\.(encoder|embeddings|where)")
_BOUND_IN_RUN = {"run.seed"}
_OF_A_BATCH = {"data.global_batch", "data.batch_size"}  # these may change where an update has as many clips


def check_same_run(saved: Mapping[str, Any], config: Recipe, run_dir: Path) -> None:
    """Whether a run may go on with this configuration.

    Everything that changes the numbers must be as it was, the schedule's length (optim.steps) too: the learning rate of
    every step depends on it. To stop earlier and go on later there is run.stop_at.

    Raises: `ConfigError` naming the keys that differ.
    """
    before = to_mapping(from_mapping(type(config), saved, source=f"{run_dir}'s checkpoint"))
    changed = {
        key: values
        for key, values in differences(before, to_mapping(config)).items()
        if key in _BOUND_IN_RUN or not (key in _FREE or key.startswith("run.") or _FREE_OF_A_GUIDE.fullmatch(key))
    }
    data = before["data"]
    if (data["global_batch"] or data["batch_size"]) == config.data.update_clips:
        changed = {key: values for key, values in changed.items() if key not in _OF_A_BATCH}
    if changed:
        listed = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            f"{run_dir} cannot be resumed with other settings, its numbers would change: {listed}. Resume it without "
            "these changes, or start another run with run.name=OTHER"
        )
