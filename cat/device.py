"""The device that a recipe or a command names."""

from __future__ import annotations

import torch

from cat.config import ConfigError


def pick_device(name: str | None, option: str = "run.device") -> torch.device:
    """ "auto" or None: the GPU where there is one; "cpu", "cuda", "cuda:1". ``option`` is what the user wrote it as.

    Raises: `ConfigError` for a device that is not here.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{option} is {name!r}; expected auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{option} is {name!r}, but torch sees {torch.cuda.device_count()} GPUs; use auto or cpu")
    return device
