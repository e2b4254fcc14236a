"""Whether somebody wrote into a teacher's parameters, or their averages, since the last update."""

from collections.abc import Sequence

import torch
from torch import Tensor

Mark = tuple[int, int | None]  # address and version: a write that PyTorch counts, or new memory, changes it


class Watch:
    """The parameters of a teacher, each with the average it is a rounded copy of, as an update left them."""

    def __init__(self, watched: Sequence[tuple[str, Tensor, Tensor]]) -> None:
        self.watched = watched
        self._tensors = [t for _, parameter, average in watched for t in (parameter, average)]
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._memory = [t.untyped_storage() for t in self._tensors]  # kept: no other tensor may get its address
        self.settle()

    def settle(self) -> None:
        """What was written up to now is known."""
        self._versions = _versions(self._tensors)

    def untouched(self) -> bool:
        return self._versions == _versions(self._tensors)

    def marks(self) -> dict[str, tuple[Mark, Mark]]:
        """Name -> the marks of parameter and average."""
        marks = list(zip(self._addresses, self._versions, strict=True))
        names = [name for name, _, _ in self.watched]
        return dict(zip(names, zip(marks[::2], marks[1::2], strict=True), strict=True))

    def written_averages(self) -> set[str]:
        """Names of averages that were written in place, wherever their module has moved since."""
        now = _versions(self._tensors)
        pairs = zip(self.watched, self._versions[1::2], now[1::2], strict=True)
        return {name for (name, _, _), then, version in pairs if then != version}


def _versions(tensors: list[Tensor]) -> list[int | None]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [None if t.is_inference() else t._version for t in tensors]


@torch.no_grad()
def adopt(parameter: Tensor, average: Tensor) -> None:
    """Go on from the parameter where it is not the rounded average."""
    average.copy_(torch.where(_agree(parameter, average), average, parameter.to(average.dtype)))


def agree(parameter: Tensor, average: Tensor) -> bool:
    return bool(_agree(parameter, average).all())


def _agree(parameter: Tensor, average: Tensor) -> Tensor:
    rounded = average.to(parameter.dtype)
    return (rounded == parameter) | (rounded.isnan() & parameter.isnan())
