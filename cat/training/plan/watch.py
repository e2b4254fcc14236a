"""What one step does, operation by operation, on tensors without values: memory that is alive, FLOPs, bytes moved."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cat import parts
from cat.training.plan.operators import flops_of

ROUNDED = 512  # the caching allocator gives out multiples of so many bytes


class Watch(TorchDispatchMode):
    """Use it as ``with watch.watching()``, inside a FakeTensorMode. An operator of ours is one operation: what it makes
    and frees on the way is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0  # of what was made since, at the worst moment
        self.at_peak: Counter[str] = Counter()  # part of the step -> bytes of it
        self.flops: Counter[str] = Counter()
        self.bytes = 0  # read and written
        self.operations = 0
        self._sizes: dict[int, tuple[int, str]] = {}  # storage -> bytes, part that made it
        self._references: dict[int, weakref.ref[Any]] = {}
        self._live = 0
        self._by_part: Counter[str] = Counter()
        self._stack = ["rest"]

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        with parts.told_to(self), self:
            yield self

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """For `cat.parts.part`."""
        self._stack.append(name)
        try:
            yield
        finally:
            self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        before = {_number(tensor) for tensor in given}
        for tensor in given:
            self._meet(tensor, 0)
        result = func(*args, **kwargs)
        made = [tensor for tensor in _tensors(result) if _number(tensor) not in before]
        for tensor in made:
            size = tensor.untyped_storage().nbytes()
            self._meet(tensor, -(-size // ROUNDED) * ROUNDED)
        if made or func._schema.is_mutable:
            self.operations += 1
            self.bytes += sum(map(_bytes, (*given, *made)))
            self.flops[self._stack[-1]] += flops_of(func, args, kwargs, result)
        return result

    def _meet(self, tensor: Tensor, size: int) -> None:
        number = _number(tensor)
        if number in self._sizes:
            return
        part = self._stack[-1]
        self._sizes[number] = size, part
        self._references[number] = weakref.ref(tensor.untyped_storage(), lambda _: self._gone(number))
        self._live += size
        self._by_part[part] += size
        if self._live > self.peak_bytes:
            self.peak_bytes, self.at_peak = self._live, self._by_part.copy()

    def _gone(self, number: int) -> None:
        size, part = self._sizes.pop(number)
        del self._references[number]
        self._live -= size
        self._by_part[part] -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _number(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Of the elements that lie in memory."""
    if tensor.numel() == 0:
        return 0
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
