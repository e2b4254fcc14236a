"""Files of weights that other people's code wrote, read without executing anything in them."""

from __future__ import annotations

import pickle  # for the name of an error only
import zipfile
from pathlib import Path
from typing import Any

import torch

from cat.checkpoints.store import CheckpointError, check_readable, read_tensors


class _Inert:
    """Stands for every class a released file mentions (fairseq, omegaconf, argparse): holds nothing, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_foreign(path: str | Path) -> Any:
    """What ``torch.save`` put into a file; of a ``.safetensors`` file its tensors by name.

    It is read with ``weights_only=True``, and the classes it mentions (training settings) are replaced by an empty one.

    Raises: FileNotFoundError, ValueError (not such a file, or not without executing code), `CheckpointError` (damaged).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    check_readable(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a PyTorch zip archive (written by PyTorch 1.6 or later); it may be cut short: "
            f"{path.stat().st_size} bytes"
        )
    foreign: list[str] = []
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, when bytes are wrong
        if foreign and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} cannot be read without executing code it holds; it mentions {sorted(foreign)}. If you trust "
                "it, save its weights alone where it came from: torch.save({'model': checkpoint['model']}, ...)"
            ) from None
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is damaged or not a file of torch.save "
            f"({type(error).__name__}: {error}); copy it again"
        ) from error
