"""Which data a run was trained on, as its checkpoints say it, and whether it goes on with the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat.config import ConfigError, differences
from cat.data import Manifest
from cat.data.embeddings import EmbeddingFiles, EmbeddingStore
from cat.training.recipe import Recipe


def data_identity(
    manifest: Manifest, valid: Manifest | None, embeddings: EmbeddingStore | EmbeddingFiles | None
) -> dict[str, Any]:
    """JSON-able: the clips of training and validation, and the external embeddings if the run learns from them.

    Raises: `EmbeddingError` where embeddings are damaged, or of other audio than there is (`EmbeddingStore.verify`).
    """
    if isinstance(embeddings, EmbeddingStore):
        embeddings.verify(manifest)
    identity: dict[str, Any] = dict(manifest.identity)
    rows = identity.pop("embedding_rows", None)
    return {
        **identity,
        "valid": None if valid is None else {"clips": len(valid), "fingerprint": valid.fingerprint},
        "embeddings": None if embeddings is None else {**embeddings.identity, "rows": rows},
    }


def check_same_data(
    saved: Mapping[str, Any], now: Mapping[str, Any], config: Recipe, run_dir: Path
) -> tuple[dict[str, Any], list[str]]:
    """Whether a run may go on with this data. Returns the identity that it keeps, and notes for the user.

    Scores of checkpoints must stay comparable: a run that began without validation data is scored by the training loss
    to its end, and one that goes on without has no more scores. Checkpoints of earlier versions do not say everything;
    what they leave out is taken to be the same.

    Raises: `ConfigError` naming what differs.
    """
    if any(saved.get(key) != now[key] for key in ("clips", "fingerprint")):
        raise ConfigError(
            f"{config.data.train} lists other clips ({now['clips']}) than when {run_dir} was started "
            f"({saved.get('clips')}); give the same data, or start another run with run.name=OTHER"
        )
    if saved.get("labels") != now.get("labels"):
        raise ConfigError(
            f"the clips of {config.data.train} have other labels than when {run_dir} was started: its numbers would "
            "change. Give the labels of then, or start another run with run.name=OTHER"
        )
    kept = dict(now)
    old, new = saved.get("embeddings", now["embeddings"]), now["embeddings"]
    if reasons := other_embeddings(old, new):
        raise ConfigError(
            f"{config.data.train} has other external embeddings ({_embeddings(new)}) than when {run_dir} was started "
            f"({_embeddings(old)}): its numbers would change ({'; '.join(reasons)}). Give those of then, or start "
            "another run with run.name=OTHER"
        )
    if "guides" in now:
        _check_same_guides(saved.get("guides") or {}, now["guides"], run_dir)
    old, new = saved.get("valid", now["valid"]), now["valid"]
    if old is not None and new is not None and old != new:
        raise ConfigError(
            f"data.valid={config.data.valid} lists other clips ({new['clips']}) than when {run_dir} was started "
            f"({old['clips']}): the scores of its checkpoints could not be compared. Give the same clips, leave them "
            "out (data.valid=null), or start another run with run.name=OTHER"
        )
    kept["valid"] = old
    notes = [
        f"the checkpoint, of an earlier version, does not say which {what} the run began with: taken to be the same"
        for key, what in (("embeddings", "external embeddings"), ("valid", "validation data"))
        if key not in saved and now[key] is not None
    ]
    if old is not None and new is None:
        notes.append("data.valid is left out: checkpoints have no score from here on, and the best stays the best")
    if old is None and new is not None:
        notes.append("data.valid is new to this run: checkpoints are scored by the training loss, as before")
    return kept, notes


def other_embeddings(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[str]:
    """Why a run cannot go on with these embeddings; nothing where it can.

    Equal rows by the same encoder are the same, wherever its weights lie. What a checkpoint or sidecar of an earlier
    version does not say is taken to be the same.
    """
    if old is None or new is None:
        return [] if old is new else ["one of the two is none"]

    def differs(key: str) -> bool:
        return old.get(key) is not None and new.get(key) is not None and old[key] != new[key]

    named = old.get("encoder") != new.get("encoder")
    known = old.get("identity") is not None and new.get("identity") is not None
    rows = any(differs(key) for key in ("count", "dim", "sha256", "sample"))
    which = differs("rows")
    if not rows and not which and (not named or (known and not differs("identity"))):
        return []
    reasons = []
    if named:
        reasons.append(f"the encoder was {_encoder(old)}, now {_encoder(new)}")
    elif differs("identity"):
        reasons.append(f"the encoder's weights or settings are others: it was {_encoder(old)}, now {_encoder(new)}")
    if rows:
        if differs("audio"):
            reasons.append("the audio files were others")
        made = differences(old.get("made_with") or {}, new.get("made_with") or {})
        if old.get("made_with") and new.get("made_with"):
            reasons += [f"made with {key}={was}, now {now}" for key, (was, now) in made.items()]
        reasons.append("the rows are others")
    if which:
        reasons.append("its clips have other rows")
    return reasons


def _check_same_guides(saved: Mapping[str, Any], now: Mapping[str, Any], run_dir: Path) -> None:
    """A run may go on with a live guide whose embeddings have been cached since, and the other way about."""
    for name, new in now.items():
        if reasons := _other_guide(saved.get(name), new):
            raise ConfigError(
                f"guides.{name} is another one than when {run_dir} was started: its numbers would change "
                f"({'; '.join(reasons)}). Give that one, or start another run with run.name=OTHER"
            )


def _other_guide(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """Why it is another one: cached rows by what they are, live encoders, which have none, by theirs."""
    if old is not None and "sha256" in old and "sha256" in new:
        return other_embeddings(old, new)
    if old is not None and old.get("identity") is not None and old["identity"] == new.get("identity"):
        return []
    return [f"the encoder was {'none' if old is None else _encoder(old)}, now {_encoder(new)}"]


def _encoder(identity: Mapping[str, Any]) -> str:
    weights = identity.get("identity")
    return f"{identity.get('encoder')} ({weights[:12]})" if weights else str(identity.get("encoder"))


def _embeddings(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "none"
    return f"encoder {identity.get('encoder')}, {identity.get('count')} x {identity.get('dim')}"
