"""Models on the Hugging Face hub, and in folders that look like one of its repositories.

A folder holds all that rebuilds the model, and works offline::

    config.json                one dataclass, `EncoderConfig` or `ClassifierConfig`, and what transformers looks for
    model.safetensors          encoder.*, of a classifier head.* too; `load_encoder` and `load_classifier` read it alone
    preprocessor_config.json   how spectrograms are made
    modeling_cat.py, feature_extraction_cat.py    for `AutoModel` and `AutoFeatureExtractor`, with trust_remote_code
    README.md                  the model card

Reading is strict: an unknown key, a tensor too many or too few is an error, and nothing is ever unpickled. Uploads and
downloads are huggingface_hub's; without that package folders work all the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cat.checkpoints.card import model_card
from cat.checkpoints.classifier import TASKS, ClassifierInfo
from cat.checkpoints.store import MODEL, CheckpointError, PathLike, load_tensors, read_tensors, save_tensors
from cat.config import ConfigError, from_mapping
from cat.data.features import FeatureConfig
from cat.files import new_folder
from cat.model import Classifier, HeadConfig, ModelConfig

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        """Without huggingface_hub there are folders, and no hub."""

        @classmethod
        def from_pretrained(cls, path: PathLike, **options: Any) -> Any:
            raise _no_hub(path)

        def push_to_hub(self, repo_id: str, **options: Any) -> str:
            raise _no_hub(repo_id)


CONFIG, PREPROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
REMOTE = ("modeling_cat.py", "feature_extraction_cat.py")
POOLINGS = ("mean", "cls", "both")
FORMAT_VERSION = 1
# What transformers looks for in config.json; it adds the others when it writes one.
_FOR_TRANSFORMERS: dict[str, Any] = {
    "model_type": "cat-audio",
    "architectures": ["CATModel"],
    "auto_map": {"AutoConfig": "modeling_cat.CATConfig", "AutoModel": "modeling_cat.CATModel"},
}
_OF_DOWNLOADS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_OF_TRANSFORMERS = {*_FOR_TRANSFORMERS, "transformers_version", "dtype", "torch_dtype", "_name_or_path"}


@dataclass(frozen=True)
class EncoderConfig:
    """All that rebuilds an encoder.

    ``pooling`` makes the clip's embedding: the "mean" of the patches, the "cls" token, or "both" side by side.
    """

    model: ModelConfig
    features: FeatureConfig
    pooling: str = "mean"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {self.pooling!r}.")
        _check_version(self.format_version)


@dataclass(frozen=True)
class ClassifierConfig:
    """All that rebuilds a classifier; the fields are those of `ClassifierInfo`."""

    model: ModelConfig
    features: FeatureConfig
    head: HeadConfig
    task: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    padding: Literal["fill", "mask"]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not self.classes or len(self.classes) != len(self.class_names):
            raise ValueError(f"{len(self.classes)} classes with {len(self.class_names)} names; expected one name each")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        _check_version(self.format_version)


@dataclass(frozen=True)
class Origin:
    """What is known of how a model came to be, for its card: the run's configuration, step and file."""

    config: Mapping[str, Any]
    step: int | None
    file: Path


@dataclass(frozen=True)
class Folder:
    """What `read_folder` finds."""

    config: EncoderConfig | ClassifierConfig
    tensors: dict[str, Tensor]
    card: str | None

    @property
    def encoder_tensors(self) -> dict[str, Tensor]:
        """Without a classifier's head."""
        if isinstance(self.config, EncoderConfig):
            return self.tensors
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith("head.")}


class HubModel(PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a class that says what it is made of (`hub_parts`) and
    can be made of a folder (`from_folder`)."""

    def hub_parts(self) -> tuple[EncoderConfig | ClassifierConfig, Mapping[str, Tensor], Origin | str | None]:
        """Its configuration, its tensors, and where it came from: or, of a folder, its model card."""
        raise NotImplementedError

    @classmethod
    def from_folder(cls, path: Path, **options: Any) -> Any:
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: PathLike,
        *,
        license: str | None = None,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes a folder, whole or not at all.

        Args:
            save_directory: a new or empty folder.
            license: of the weights, as the hub names licences ("mit", "cc-by-4.0", ...), for the model card. Without
                one the card has none. ``model_card_kwargs={"license": ...}`` is the same, for `push_to_hub`.
            config: only here because huggingface_hub has it; the model's own is written.

        Returns: the commit's address with ``push_to_hub``.
        """
        own, tensors, origin = self.hub_parts()
        if config is not None and config not in (own, dataclasses.asdict(own)):
            raise ValueError("config is not the model's own; expected None: what is saved is what the model is made of")
        license = license or (model_card_kwargs or {}).get("license")
        write_folder(save_directory, own, tensors, origin, license=license)
        if not push_to_hub:
            return None
        name = repo_id or Path(save_directory).name
        return self.push_to_hub(name, model_card_kwargs={"license": license}, **push_to_hub_kwargs)

    @classmethod
    def from_pretrained(cls, path: PathLike, **options: Any) -> Any:  # type: ignore[override]
        """What a folder holds, or else what the hub has under this name, as in "somebody/cat-base"; ``revision``,
        ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` are then huggingface_hub's."""
        if Path(path).exists():
            local = {key: value for key, value in options.items() if key not in _OF_DOWNLOADS}
            return cls.from_folder(Path(path), **local)
        try:
            return super().from_pretrained(os.fspath(path), **options)
        except (CheckpointError, ConfigError, ImportError):
            raise
        except Exception as error:  # of the network, of names, of what is not there
            word = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{path} does not exist here, and could not be had from the hub; expected a folder, a run, a "
                f"checkpoint, a .safetensors file, or a name on the hub. The hub's word: {word}"
            ) from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: Any = None,  # huggingface_hub's reading of it, which passes over unknown keys
        **options: Any,
    ) -> Any:
        from huggingface_hub import hf_hub_download

        for name in (MODEL, CONFIG):
            file = hf_hub_download(
                model_id,
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        return cls.from_folder(Path(file).parent, **options)


def is_folder(path: Path) -> bool:
    """Whether a path is such a folder, and not a run or a checkpoint."""
    return path.is_dir() and (path / CONFIG).is_file()


def read_folder(path: PathLike, device: torch.device | str = "cpu") -> Folder:
    """Raises: `CheckpointError`, `ConfigError` for a key that is unknown or missing."""
    path = Path(path)
    file = path / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON ({error}); expected what save_pretrained writes"
        ) from None
    if not isinstance(values, dict) or values.get("model_type") != _FOR_TRANSFORMERS["model_type"]:
        found = values.get("model_type") if isinstance(values, dict) else None
        raise CheckpointError(f"{file} is of model_type {found!r}; expected 'cat-audio', as save_pretrained writes it")
    _check_version(values.get("format_version"))
    own = {key: value for key, value in values.items() if key not in _OF_TRANSFORMERS}
    kind: type[EncoderConfig | ClassifierConfig] = ClassifierConfig if "head" in own else EncoderConfig
    missing = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in own]
    if missing:  # of a section that is not there `from_mapping` would take the defaults
        raise ConfigError(f"{file}: {missing[0]} is missing; expected what save_pretrained writes")
    config: EncoderConfig | ClassifierConfig = from_mapping(kind, own, source=str(file))
    if not (path / MODEL).is_file():
        others = [other.name for other in path.iterdir() if other.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        pickled = f"; pickles such as {others[0]} are not read" if others else ""
        raise CheckpointError(f"{path} has no {MODEL}; expected what save_pretrained writes{pickled}")
    tensors, _ = read_tensors(path / MODEL, device)
    card = path / CARD
    return Folder(config, tensors, card.read_text(encoding="utf-8") if card.is_file() else None)


def read_classifier(path: Path, device: torch.device | str = "cpu") -> tuple[Classifier, ClassifierInfo, str | None]:
    """As `load_classifier`, of a folder, with its model card. Raises as `read_folder`."""
    found = read_folder(path, device)
    config = found.config
    if not isinstance(config, ClassifierConfig):
        raise CheckpointError(f"{path} is an encoder and has no classes; expected the folder of a classifier")
    model = Classifier(config.model, config.head, len(config.classes)).to(device)
    load_tensors(model, found.tensors, str(path))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del values["format_version"]
    return model.eval(), ClassifierInfo(path=path / MODEL, step=None, config={}, **values), found.card


def write_folder(
    path: PathLike,
    config: EncoderConfig | ClassifierConfig,
    tensors: Mapping[str, Tensor],
    origin: Origin | str | None,
    *,
    license: str | None = None,
) -> None:
    """Writes the folder (see above), whole or not at all. ``origin``: for the model card, or the card itself.

    Raises: `FileExistsError` for a file, or a folder with something in it.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists and has something in it; expected a new or empty folder: delete it, or name another"
        )
    if license and isinstance(origin, str):
        raise ValueError(
            f"license is {license!r}, but the model came with a model card, which is kept; name it in the {CARD} of "
            "the folder that it came from, or in the new one"
        )
    model = dataclasses.replace(config.model, kernels="auto")  # what runs here need not run elsewhere
    own = dataclasses.asdict(dataclasses.replace(config, model=model))
    metadata = {**own, "data": {"padding": own["padding"]}} if "padding" in own else own
    features = dataclasses.asdict(config.features)
    with new_folder(path) as folder:
        _write_json(folder / CONFIG, {**own, **_FOR_TRANSFORMERS})
        save_tensors(folder / MODEL, tensors, config=metadata, file_format="pt")  # which transformers asks for
        _write_json(
            folder / PREPROCESSOR,
            {
                "feature_extractor_type": "CATFeatureExtractor",
                "auto_map": {"AutoFeatureExtractor": "feature_extraction_cat.CATFeatureExtractor"},
                "feature_size": config.features.mel_bins,
                "sampling_rate": config.features.sample_rate,
                "padding_value": 0.0,
                "features": features,
                "patch_size": model.patch_size,
            },
        )
        for name in REMOTE:
            shutil.copyfile(Path(__file__).with_name("remote") / name, folder / name)
        card = origin if isinstance(origin, str) else _card(own, tensors, origin, license)
        (folder / CARD).write_text(card, encoding="utf-8")


def _card(own: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: Origin | None, license: str | None) -> str:
    if origin is None:
        return model_card(own, tensors, trained={}, step=None, file=None, license=license)
    return model_card(own, tensors, trained=origin.config, step=origin.step, file=origin.file, license=license)


def _check_version(version: Any) -> None:
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"format_version is {version!r}; this version reads {FORMAT_VERSION}: use the cat-kernels that wrote it"
        )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _no_hub(name: PathLike) -> Exception:
    return ImportError(
        f"{name} is no folder or file here, and the hub needs the package huggingface_hub: "
        "pip install 'cat-kernels[hub]'"
    )
