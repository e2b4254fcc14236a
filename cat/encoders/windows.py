"""Long audio in overlapping windows, and what becomes of the rows that two of them share.

Rows are rows of patches (P frames). Windows begin at multiples of them, so that the rows of two windows are made of the
very same samples. A shared row is the mean of both, weighted by how far it is from either window's end: a row at an end
has context on one side only, so it should count least, and as the weights move in a straight line from one window to
the other nothing jumps where they meet. (Keeping the centre of each window would use the same rows, and jump: positions
are absolute, and at its seam the position falls from near a window's end to near the next one's beginning.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """``rows`` a window, ``overlap`` of them shared with the next."""

    rows: int
    overlap: int

    def __post_init__(self) -> None:
        if self.rows < 1 or not 0 <= self.overlap < self.rows:
            raise ValueError(f"windows of {self.rows} rows that share {self.overlap}; expected fewer than they have")

    @property
    def hop(self) -> int:
        return self.rows - self.overlap

    def starts(self, rows: int) -> list[int]:
        """First rows of the windows of a clip of so many: a window alone where it fits, else all of full length, the
        last one moved back so that it ends with the clip."""
        if rows <= self.rows:
            return [0]
        return [*range(0, rows - self.rows, self.hop), rows - self.rows]

    def weights(self) -> Tensor:
        """(rows,): 1, and a straight line down to either end over the overlap."""
        place = torch.arange(self.rows)
        ramp = max(1, self.overlap)
        return torch.minimum(place + 1, self.rows - place).clamp(max=ramp) / ramp


class Blend:
    """Rows (R, ...) of windows, added in their order, made the one row each that they become."""

    def __init__(self, windows: Windows) -> None:
        self._weights = windows.weights()
        self._first = 0  # row that is to be taken next
        self._sum: Tensor | None = None
        self._weight = torch.empty(0)

    def add(self, start: int, rows: Tensor) -> None:
        if self._sum is None:
            self._sum = rows.new_empty(0, *rows.shape[1:])
            self._weights = self._weights.to(rows)
            self._weight = self._weights[:0]
        grown = start + len(rows) - self._first - len(self._sum)
        self._sum = torch.cat([self._sum, self._sum.new_zeros(grown, *rows.shape[1:])])
        self._weight = torch.cat([self._weight, self._weight.new_zeros(grown)])
        weights = self._weights[: len(rows)]
        self._sum[start - self._first :] += rows * weights.view(-1, *[1] * (rows.ndim - 1))
        self._weight[start - self._first :] += weights

    def take(self, before: int | None = None) -> Tensor:
        """The rows not yet taken, up to row ``before``: no window that is still to come may have one of them."""
        if self._sum is None:
            raise ValueError("nothing was added")
        count = len(self._sum) if before is None else before - self._first
        weight = self._weight[:count].view(-1, *[1] * (self._sum.ndim - 1))
        taken = self._sum[:count] / weight
        self._first += count
        self._sum, self._weight = self._sum[count:].clone(), self._weight[count:].clone()
        return taken
