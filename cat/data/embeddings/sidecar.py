"""The JSON beside an array of embeddings: what its rows are of, and what made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class EmbeddingError(ValueError):
    """An embedding file that cannot be used, or does not belong to the manifest."""


def sidecar_path(path: Path) -> Path:
    """``clap.npy`` -> ``clap.npy.json``."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any]:
    """What is known of the rows. Raises EmbeddingError for a file that is damaged, or not such a one."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EmbeddingError(f"{path}: damaged ({error}); run `cat-audio embed` again") from None
    for key, kind in (("encoder", str), ("manifest", str), ("fingerprint", str), ("count", int), ("dim", int)):
        value = info.get(key) if isinstance(info, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise EmbeddingError(
                f"{path}: damaged (no {key!r} of type {kind.__name__} in it); run `cat-audio embed` again"
            )
    optional: dict[str, type] = {"sha256": str, "identity": str, "made_with": dict, "pieces": list, "clips": dict}
    for key, expected in optional.items():
        if not isinstance(info.get(key), expected | None):
            found = f"{key!r} is not of type {expected.__name__}"
            raise EmbeddingError(f"{path}: damaged ({found}); run `cat-audio embed` again")
    pieces, clips = info.get("pieces") or [], info.get("clips") or {}
    if not all(isinstance(text, str) for text in (*pieces, *clips.values())) or not all(map(str.isdecimal, clips)):
        raise EmbeddingError(f"{path}: damaged ('pieces' or 'clips' hold no text); run `cat-audio embed` again")
    return info
