"""Checkpoints: safetensors and a small JSON, written whole or not at all, never a pickle.

A checkpoint is a directory, ``checkpoints/step-00000200`` of a run::

    model.safetensors       CAT.state_dict(): student.*, teacher.*, decoder.*, regulariser.*, regularisers.NAME.*; of a
                            fine-tuned model Classifier.state_dict(): encoder.*, head.*, the same below average.*
    optimizer.safetensors   exp_avg.*, exp_avg_sq.*, step.* by parameter name
    state.json              format, step, the whole configuration, score, where it was made, sha256 of the files

It is written under a temporary name and renamed, so a directory with the final name is complete. Each safetensors file
also carries the step and the configuration, so that a lone ``model.safetensors`` can be loaded and files of different
checkpoints cannot be mixed. Names are read without what wrappers (DDP, torch.compile) put before and between them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cat.files import NO_SPACE, clear_leftovers, format_bytes, free_space, new_folder, replacing, sha256_of

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
TENSORS = (MODEL, OPTIMIZER)
ASIDE = "damaged-"  # before a name it hides a checkpoint from its run
# What DistributedDataParallel, torch.compile, FSDP and checkpoint_wrapper put into the names of a state dict.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not the one that was expected."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory holds, on the CPU."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


# ---------------------------------------------------------------- writing


def save(
    directory: PathLike,
    *,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    config: Mapping[str, Any],
    score: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write checkpoint ``directory/step-<step>`` and return its path.

    ``score`` (lower is better) is what `prune` keeps the best by; None keeps it out of that contest. ``extra`` goes
    into state.json. A checkpoint of this step that is already there stays as it is: a run's numbers at a step do not
    depend on when it was stopped.
    """
    directory = Path(directory)
    final = directory / step_name(step)
    if final.exists():
        return final
    try:
        with new_folder(final) as temporary:
            save_tensors(temporary / MODEL, model, step=step, config=config)
            save_tensors(temporary / OPTIMIZER, optimizer, step=step, config=config)
            sums = {name: sha256_of(temporary / name) for name in TENSORS}
            state = {"format": FORMAT, "step": step, "score": score, **(extra or {}), "sha256": sums, "config": config}
            (temporary / STATE).write_text(_state_text(state), encoding="utf-8")
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        free = free_space(directory)
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)}: this checkpoint needs {format_bytes(size_of(model) + size_of(optimizer))}"
            + ("" if free is None else f", {format_bytes(free)} are free there")
            + "; make room (fewer run.keep_last, run.keep_best) and go on with --resume. Earlier checkpoints are good",
            str(final),
        ) from error
    return final


def add_score(path: PathLike, score: float) -> None:
    """Give a checkpoint the score that it was saved without, in a hurry; one that has a score keeps it."""
    state = read_state(path)
    if state.get("score") is None:
        with replacing(Path(path) / STATE) as temporary:
            temporary.write_text(_state_text({**state, "score": score}), encoding="utf-8")


def _state_text(state: Mapping[str, Any]) -> str:
    return json.dumps(state, indent=1) + "\n"


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a state dict in a file, but for the names."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def save_tensors(
    path: PathLike,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    step: int | None = None,
    file_format: str = str(FORMAT),
    about: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file that `load_encoder` can read alone: the configuration is in its metadata.

    ``file_format`` is what the file says of itself; transformers wants "pt". ``about``: more for the metadata.
    """
    metadata = {**(about or {}), "format": file_format, "config": json.dumps(config)}
    if step is not None:
        metadata["step"] = str(step)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=metadata)
        except SafetensorError as error:  # no OSError; its text has the system's number
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise CheckpointError(f"{path} cannot be written: {error}") from error
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def prune(directory: PathLike, *, keep_last: int, keep_best: int, keep_every: int = 0) -> list[Path]:
    """Delete all but the newest ``keep_last`` checkpoints, the best ``keep_best``, which are those of lowest score, and
    those of every ``keep_every`` updates.

    Returns what was deleted. For the one writer of a run: leftovers of a deletion that was killed go too.
    """
    directory = Path(directory)
    found = list_checkpoints(directory)
    scored = [(score, path) for path in found if (score := _score(path)) is not None]
    best = [path for _, path in sorted(scored, key=lambda item: (item[0], item[1].name))[:keep_best]]
    regular = [path for path in found if keep_every and _step(path) % keep_every == 0]
    keep = {*found[len(found) - keep_last :], *best, *regular, *found[-1:]}
    removed = [path for path in found if path not in keep]
    _remove(directory, removed)
    return removed


def remove_all(directory: PathLike) -> None:
    """Delete every checkpoint in ``directory``, and the directory if nothing else is in it. For the one writer."""
    directory = Path(directory)
    if directory.is_dir():
        _remove(directory, list_checkpoints(directory))
        clear_leftovers(directory)
        if not directory.is_symlink():
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()


def _remove(directory: Path, paths: list[Path]) -> None:
    _clear_removed(directory)
    for path in paths:
        # Renamed first: a directory half deleted must not pass for a checkpoint.
        path.rename(path.with_name(f".removing-{path.name}"))
    _clear_removed(directory)


def _clear_removed(directory: Path) -> None:
    for leftover in [*directory.glob(".removing-*"), *directory.glob(".writing-*")]:  # .writing: of earlier versions
        shutil.rmtree(leftover, ignore_errors=True)


def _score(path: Path) -> float | None:
    """Of a checkpoint; None also of a damaged one, which must not stop the run that goes on without it."""
    try:
        return read_state(path).get("score")
    except CheckpointError:
        return None


# ---------------------------------------------------------------- finding


def list_checkpoints(directory: PathLike) -> list[Path]:
    """The checkpoints in ``directory``, oldest first."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()), key=_step)


def newest(run_dir: PathLike) -> Path | None:
    """The newest checkpoint of a run directory, or None."""
    found = list_checkpoints(Path(run_dir) / "checkpoints")
    return found[-1] if found else None


def best(run_dir: PathLike) -> Path | None:
    """The checkpoint of a run with the lowest score (validation, else training loss), or None without a scored one."""
    scores = {path: read_state(path).get("score") for path in list_checkpoints(Path(run_dir) / "checkpoints")}
    scored = {path: score for path, score in scores.items() if score is not None}
    return min(scored, key=lambda path: (scored[path], path.name)) if scored else None


def step_name(step: int) -> str:
    """The directory name of a checkpoint, ``step-00000200``."""
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# ---------------------------------------------------------------- reading


def load(path: PathLike, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint directory whole.

    Raises: `CheckpointError` naming the file when one is missing, truncated, of another step than its neighbours, or
    not what was written (checkpoints of earlier versions have no checksums).
    """
    path = Path(path)
    state = read_state(path)
    sums = state.get("sha256") or {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in TENSORS:
        tensors[name], metadata = read_tensors(path / name, device)
        if metadata.get("step") != str(state["step"]):
            raise CheckpointError(
                f"{path / name} is of step {metadata.get('step')}, but {path / STATE} is of step {state['step']}; "
                f"expected files of one checkpoint: {remedy(path)}"
            )
        if name in sums and sha256_of(path / name) != sums[name]:
            raise CheckpointError(
                f"{path / name} is not what was written: its checksum is not that in {STATE}; {remedy(path)}"
            )
    return Checkpoint(path, int(state["step"]), tensors[MODEL], tensors[OPTIMIZER], state)


def read_state(path: PathLike) -> dict[str, Any]:
    """The state.json of a checkpoint directory."""
    file = Path(path) / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); expected a checkpoint directory: {remedy(path)}"
        ) from None
    except ValueError:
        raise CheckpointError(f"{file} is not valid JSON, so damaged; {remedy(path)}") from None
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("step"), int)
        or not isinstance(state.get("config"), dict)
    ):
        raise CheckpointError(f"{file} lacks 'step' or 'config'; expected what `cat-audio` writes: {remedy(path)}")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} is of format {state.get('format')!r}; expected {FORMAT}: use the version that wrote it"
        )
    return state


def read_tensors(path: PathLike, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, by their `unwrapped` names, and the metadata of a safetensors file."""
    path = Path(path)
    with opened(path, device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = dict(file.metadata() or {})
    return unwrapped(tensors, str(path)), metadata


@contextlib.contextmanager
def opened(path: PathLike, device: torch.device | str = "cpu") -> Iterator[Any]:
    """A safetensors file, as `safetensors.safe_open` opens it. Raises: `CheckpointError`."""
    path = Path(path)
    check_readable(path)
    try:
        with open(path, "rb") as file, _safe_open(path, file, device) as tensors:
            yield tensors
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a safetensors file ({error}); {remedy(path.parent)}"
        ) from None


def _safe_open(path: Path, file: IO[bytes], device: torch.device | str = "cpu") -> Any:
    """Of the open ``file``, also where bytes of its path are not UTF-8."""
    try:
        name = os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        name = f"/proc/self/fd/{file.fileno()}"
    return safe_open(name, "pt", device=str(device))


def check_readable(path: PathLike) -> None:
    """Raises `CheckpointError` that says why a file cannot be opened."""
    path = Path(path)
    try:
        open(path, "rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist; {remedy(path.parent)}") from None
    except PermissionError:
        raise CheckpointError(f"{path}: no permission to read it; ask its owner for it (chmod a+r)") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {remedy(path.parent)}") from None


def unwrapped(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors by the names they have in the model itself, where it was saved inside of a wrapper:
    ``module.student.norm.weight``, ``_orig_mod.blocks.0._orig_mod.norm1.weight``.

    Raises: `CheckpointError` when two names become one.
    """
    plain: dict[str, str] = {}
    for name in tensors:
        inner = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if inner in plain:
            raise CheckpointError(
                f"{source} holds both {plain[inner]} and {name}; expected one of them: delete the other"
            )
        plain[inner] = name
    return {inner: tensors[name] for inner, name in plain.items()}


def remedy(path: PathLike) -> str:
    """What to do about a damaged checkpoint."""
    path = Path(path)
    other = other_whole(path)
    if other is None:
        return "copy it again, or name another checkpoint"
    aside = path.with_name(ASIDE + path.name)
    return f"to go on from {other.name} set it aside: mv {shlex.quote(str(path))} {shlex.quote(str(aside))}"


def other_whole(path: PathLike) -> Path | None:
    """The newest of the other checkpoints of a run whose files are complete; their content is not read."""
    path = Path(path)
    return next((other for other in reversed(list_checkpoints(path.parent)) if other != path and _whole(other)), None)


def _whole(path: Path) -> bool:
    # Not by `read_state` and `opened`: their errors would ask for another whole one in turn.
    try:
        json.loads((path / STATE).read_text(encoding="utf-8"))
        for name in TENSORS:
            with open(path / name, "rb") as file, _safe_open(path / name, file):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def load_tensors(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict whose names and shapes must be the module's; the error says which are not, and how many."""
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or unknown or shapes:
        parts = [
            f"{len(names)} {label} (first: {names[0]})"
            for names, label in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if names
        ]
        raise CheckpointError(
            f"{source}: tensors do not fit the model: {'; '.join(parts)}; expected the model that wrote the file"
        )
    module.load_state_dict(dict(tensors))
