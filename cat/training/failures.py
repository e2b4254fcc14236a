"""The record of audio that could not be read, ``failures.jsonl``, and when there is too much of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from cat.data.batch import Failure
from cat.data.loader import TooManyFailures
from cat.training.records import JsonLines, truncate_rows

# The share is taken of at least so many clips (or the whole data set, if smaller): one bad file in the first batch is
# no verdict.
MIN_CLIPS = 1000


class FailureLog:
    """Writes every distinct clip that failed, once: ``{"step": ..., "split": "train", "path": ..., "reason": ...}``.

    Args:
        path: the file; rows after ``start_step`` are dropped, earlier ones count.
        max_share: raise `TooManyFailures` when more than this share of the distinct training clips seen so far failed.
        clips: size of the training set.
        batch_size: clips seen in every step.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_share: float, clips: int, batch_size: int, start_step: int = 0
    ) -> None:
        self._path, self._max_share, self._clips, self._batch_size = path, max_share, clips, batch_size
        self._failed = {(row["split"], row["path"]) for row in truncate_rows(path, start_step)}
        self._file: JsonLines | None = None

    @property
    def count(self) -> int:
        """Distinct clips that failed, in training and validation."""
        return len(self._failed)

    def add(self, failures: Sequence[Failure], step: int, split: str = "train") -> None:
        """Record the failures of the batch that makes update ``step``."""
        rows: list[dict[str, Any]] = []
        for failure in failures:
            if (split, failure.path) not in self._failed:
                self._failed.add((split, failure.path))
                rows.append({"step": step, "split": split, "path": failure.path, "reason": failure.reason})
        if rows:
            self._file = self._file or JsonLines(self._path)
            self._file.write(rows)
            self._check(step, rows[-1])

    def _check(self, step: int, latest: dict[str, Any]) -> None:
        failed = sum(split == "train" for split, _ in self._failed)
        seen = min(self._clips, max(step * self._batch_size, MIN_CLIPS))
        if failed > self._max_share * seen:
            raise TooManyFailures(
                f"{failed} clips could not be read, more than data.max_failed_share={self._max_share:g} of {seen} "
                f"allows; the latest: {latest['path']}: {latest['reason']}. All are listed in {self._path}: "
                "mend or remove them, or raise data.max_failed_share"
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
