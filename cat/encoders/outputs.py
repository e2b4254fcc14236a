"""The files that `cat-audio embed` writes, and how it knows them again as its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cat.data.embeddings import EmbeddingError, EmbeddingStore, read_sidecar, sidecar_path
from cat.data.manifest import FORMAT, Manifest
from cat.files import replacing, write_json
from cat.outputs import Output, OutputError, claim, is_own, same_file


@dataclass(frozen=True)
class EmbeddingOutputs:
    """``rows`` (.npy, with its sidecar), the ``manifest`` whose clips name them, and the ``failures``."""

    rows: Path
    manifest: Path
    failures: Path


def claim_outputs(
    manifest: Manifest, out: Path, manifest_out: Path | None = None, *, overwrite: bool = False
) -> EmbeddingOutputs:
    """What embedding ``manifest`` into ``out`` writes: OUT.npy, OUT.jsonl and OUT.failures.jsonl.

    Where OUT.jsonl is the manifest that is embedded, the new one is OUT.embedded.jsonl. The manifest and the embeddings
    that it names are never replaced; other files than those of an earlier `embed` only with ``overwrite``.

    Raises OutputError, and EmbeddingError for a name that does not end in .npy.
    """
    if out.suffix != ".npy":
        raise EmbeddingError(f"{out}: embeddings are written as .npy; name the file so")
    linked = manifest_out or out.with_suffix(".jsonl")
    if linked.suffix != ".jsonl":
        raise OutputError(f"{linked}: a manifest is written as .jsonl; name the file so (--manifest-out)")
    if manifest_out is None and manifest.source is not None and same_file(linked, manifest.source):
        linked = out.with_suffix(".embedded.jsonl")
    sidecar, failures = sidecar_path(out), out.with_suffix(".failures.jsonl")
    claim(
        [
            Output(out, lambda path: EmbeddingStore(path).is_as_written(), "another -o"),
            Output(sidecar, lambda path: bool(read_sidecar(path)), "another -o"),
            Output(linked, lambda path: _is_linked(path, out), "another -o or --manifest-out"),
            Output(failures, is_record, "another -o"),
        ],
        inputs=[manifest.source, manifest.embeddings, *(_named_alike(manifest, out) if out.exists() else ())],
        overwrite=overwrite,
    )
    return EmbeddingOutputs(out, linked, failures)


def partial_folder(out: Path) -> Path:
    """Where an embed into ``out`` keeps what it has done: ``clap.npy`` -> ``clap.npy.partial``."""
    return out.with_name(out.name + ".partial")


def sign(outputs: EmbeddingOutputs) -> None:
    """Notes in the sidecar what was written as the manifest, so that one that is changed by hand is known as such."""
    sidecar = sidecar_path(outputs.rows)
    info = json.loads(sidecar.read_text(encoding="utf-8"))
    linked = {"name": outputs.manifest.name, "sha256": _digest(outputs.manifest)}
    with contextlib.suppress(OSError):  # no room for it is no reason to fail: everything else is written
        write_json(sidecar, {**info, "linked": linked})


def record_failures(path: Path, failures: Sequence[tuple[str, str]]) -> None:
    """(path, reason) of each clip without an embedding; no failure, no file."""
    if failures:
        with replacing(path) as temporary:
            lines = [json.dumps({"path": clip, "reason": reason}) for clip, reason in failures]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif is_own(path, is_record):
        path.unlink()


def _named_alike(manifest: Manifest, out: Path) -> Iterator[Path]:
    """The manifest's one .npy a clip, as far as ``out`` may be one of them."""
    name = out.name.casefold()
    return (file for file in manifest.embedding_files or () if file.name.casefold() == name)


def _is_linked(path: Path, out: Path) -> bool:
    """A manifest that names ``out`` and has not been changed since, as far as its sidecar tells."""
    with open(path, encoding="utf-8") as file:
        header = json.loads(file.readline())
    if header["format"] != FORMAT or not isinstance(header["embeddings_fingerprint"], str):
        return False
    if os.path.realpath(path.parent / header["embeddings"]) != os.path.realpath(out):
        return False
    sidecar = sidecar_path(out)
    written = read_sidecar(sidecar).get("linked") if sidecar.exists() else None
    return written is None or written["sha256"] == _digest(path)


def is_record(path: Path) -> bool:
    """Whether a file is what `record_failures` writes."""
    with open(path, encoding="utf-8") as file:
        return all(set(json.loads(line)) == {"path", "reason"} for line in file)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
