"""What a frozen encoder's embeddings depend on: its weights and settings, by their content and never by a path."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cat.encoders.frozen import FrozenEncoder


class UnknownIdentity(TypeError):
    """It cannot be said what an encoder's embeddings depend on."""


def identity_of(encoder: FrozenEncoder) -> str:
    """SHA-256; another one for other weights or settings, the same wherever they lie and whatever computes with them.

    An encoder's own attribute ``identity`` comes first. Of an encoder that is not one of ours and has none, what can be
    seen counts: its name and settings, the file that it is written in, its weights. What that file imports is not seen.
    """
    own = getattr(encoder, "identity", None)
    if isinstance(own, str):
        return own
    try:
        return _digest(identity(encoder))
    except UnknownIdentity:
        return _digest(_as_far_as_seen(encoder))


def device_of(encoder: FrozenEncoder) -> torch.device:
    """Where it computes: its ``device``, or the CPU where it has none."""
    return torch.device(getattr(encoder, "device", "cpu"))


def identity(value: Any) -> Any:
    """Equal for what gives equal embeddings on the same device, JSON-able.

    Raises UnknownIdentity.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return _identity_of_array(torch.as_tensor(value))
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, list | tuple):
        return [identity(each) for each in value]
    if isinstance(value, dict):
        return {str(name): identity(each) for name, each in value.items()}
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if dataclasses.is_dataclass(value):
        return {"": name, **{f.name: identity(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    own = name.startswith("cat.")
    if isinstance(value, nn.Module):
        if not own and name.partition(".")[0] not in ("torch", "transformers"):
            raise UnknownIdentity(f"the code of {name} may change, and nothing here would tell")
        settings = _settings(value) if own else _described(getattr(value, "config", None))
        return {"": name, "modules": repr(value), "weights": _weights(value), "settings": settings}
    return {"": name, **_settings(value)} if own else {"": name, "settings": _described(value)}


def _settings(value: Any) -> dict[str, Any]:
    """Of an object of ours: its attributes, but for its name, which may be a path, and what computes with it."""
    unseen = ("name", "device", "threads")
    return {key: identity(each) for key, each in vars(value).items() if key not in unseen and not key.startswith("_")}


def _described(value: Any) -> Any:
    """Of an object of `transformers`: what its own file of settings would say."""
    if value is None:
        return None
    if not callable(getattr(value, "to_json_string", None)):
        raise UnknownIdentity(f"{type(value).__name__} is nothing whose settings can be compared")
    return value.to_json_string()


def _weights(network: nn.Module) -> dict[str, list[Any]]:
    return {key: _identity_of_array(tensor) for key, tensor in network.state_dict().items()}


def _identity_of_array(tensor: Tensor) -> list[Any]:
    plain = tensor.detach().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy()
    return [str(plain.dtype), list(plain.shape), hashlib.sha256(content.data).hexdigest()]


def _as_far_as_seen(encoder: Any) -> dict[str, Any]:
    held = {"": encoder} if isinstance(encoder, nn.Module) else getattr(encoder, "__dict__", {})
    seen: dict[str, Any] = {}
    for key, value in held.items():
        if isinstance(value, nn.Module):
            seen[key] = [_source(type(value)), _weights(value)]
        elif isinstance(value, Tensor | np.ndarray | bool | int | float | str):
            seen[key] = identity(value)
    known = {key: getattr(encoder, key) for key in ("name", "sample_rate", "dim")}
    return {**known, "code": _source(encoder if inspect.isroutine(encoder) else type(encoder)), "holds": seen}


def _source(what: Any) -> str | None:
    """SHA-256 of the file that a class or function is written in."""
    try:
        return hashlib.sha256(Path(inspect.getfile(what)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
