"""Encoders of the user's own: what ``package.module:function`` or ``path/to/file.py:function`` returns.

The function is called once, as ``function(device=...)``, and gives a `FrozenEncoder`::

    class Loudness:
        name, sample_rate, dim = "loudness", 16000, 1

        def __call__(self, waveform, lengths=None):
            ends = [waveform.shape[1]] * len(waveform) if lengths is None else lengths.tolist()
            return torch.stack([clip[:end].square().mean().log()[None] for clip, end in zip(waveform, ends)])

    def loudness(device):
        return Loudness()
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat.encoders.frozen import FrozenEncoder

_NAMED = re.compile(r"(?P<place>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")
_TOLERANCE = 0.01  # of an embedding's norm: bf16 keeps three digits, and a clip that hears its padding is far outside


def is_named(spec: str) -> bool:
    return _NAMED.fullmatch(spec) is not None


def named_encoder(spec: str, *, device: torch.device | str = "cpu") -> FrozenEncoder:
    """What the function that ``spec`` names returns, checked (`check_encoder`).

    Raises: ImportError and TypeError that say what is missing; what the function raises passes through.
    """
    match = _NAMED.fullmatch(spec)
    if match is None:
        raise ValueError(f"encoder {spec!r}; expected package.module:function or path/to/file.py:function")
    place, name = match["place"], match["function"]
    module = _file(spec, Path(place)) if place.endswith(".py") else _module(spec, place)
    function = getattr(module, name, None)
    if not callable(function):
        have = ", ".join(key for key, value in vars(module).items() if inspect.isroutine(value) and key[0] != "_")
        raise ImportError(f"encoder {spec!r}: {place} has no function {name!r}; it has {have or 'none'}")
    try:
        inspect.signature(function).bind(device=torch.device(device))
    except TypeError as error:
        raise TypeError(
            f"encoder {spec!r}: expected {name}(device), which is called as {name}(device=...): {error}"
        ) from None
    encoder = function(device=torch.device(device))
    check_encoder(encoder, spec)
    return encoder


def check_encoder(encoder: Any, spec: str) -> None:
    """Whether it is a `FrozenEncoder`, tried on two clips of noise.

    Raises: TypeError that says what is missing.
    """

    def wrong(found: str, expected: str) -> TypeError:
        return TypeError(f"encoder {spec!r} {found}; expected {expected} (see cat.encoders.FrozenEncoder)")

    if encoder is None:
        raise wrong("is None", "that the function returns an encoder")
    for key in ("name", "sample_rate", "dim"):
        value = getattr(encoder, key, None)
        named = isinstance(value, str) and value != ""
        counted = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not (named if key == "name" else counted):
            have = f"has {key}={value!r}" if hasattr(encoder, key) else f"has no attribute {key!r}"
            raise wrong(have, f"{key}, {'a name' if key == 'name' else 'a whole number above 0'}")
    if not callable(encoder):
        raise wrong("cannot be called", "encoder(waveform (B, n), lengths (B,)) -> (B, dim)")
    least = getattr(encoder, "min_samples", 1)
    long, short = max(encoder.sample_rate, 2 * least), max(encoder.sample_rate * 3 // 5, least)
    waveform = 0.1 * torch.randn(2, long, generator=torch.Generator().manual_seed(0))
    waveform[1, short:] = 0  # as padding is
    lengths = torch.tensor([long, short])
    rows = encoder(waveform.clone(), lengths)
    if not isinstance(rows, Tensor) or rows.shape != (2, encoder.dim) or not rows.is_floating_point():
        found = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise wrong(f"gave {found} for 2 clips", f"a float32 tensor (2, {encoder.dim})")
    if rows.requires_grad:
        raise wrong("gave embeddings with gradients", "a frozen one: decorate its call with @torch.no_grad()")
    if not rows.isfinite().all():
        raise wrong("gave NaN or infinite values for noise", "finite ones")
    if not _close(encoder(waveform.clone(), lengths), rows):
        raise wrong("gave two embeddings for one clip", "no randomness: call .eval() on its network")
    alone = torch.cat([encoder(waveform[:1].clone()), encoder(waveform[1:, :short].clone())])
    if not _close(alone, rows):
        raise wrong(
            "gave a clip alone another embedding than beside a longer one",
            "that clip b is waveform[b, :lengths[b]], of which neither padding nor other clips are heard, and that "
            "lengths may be left out",
        )


def _close(rows: Tensor, others: Tensor) -> bool:
    norms = others.float().norm(dim=1).clamp(min=1e-6)
    return rows.shape == others.shape and bool(((rows - others).float().norm(dim=1) <= _TOLERANCE * norms).all())


def _module(spec: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # one that the module itself imports
        raise ImportError(
            f"encoder {spec!r}: no module {error.name!r}; expected one that is installed or in PYTHONPATH, or a file: "
            "path/to/file.py:function"
        ) from error


def _file(spec: str, path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"encoder {spec!r}: {path}: no such file")
    name = f"_cat_encoder_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    found: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look there
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
