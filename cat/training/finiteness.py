"""Which module of a model is the first whose output, or the gradient of it, is not finite."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path


@dataclass(frozen=True)
class Found:
    """Something that is not finite.

    Attributes:
        kind: "weight", "input", "output", "gradient" (of an output) or "weight's gradient".
        name: of the parameter or module; of an input, which one.
        rows: of an input, those of its first dimension that are not finite.
        piece: of the batch, that the model was called with.
    """

    kind: str
    name: str
    bad: int  # numbers that are NaN or infinite
    of: int
    rows: tuple[int, ...] = ()
    piece: int = 0

    def __str__(self) -> str:
        count = f"{self.bad} of {self.of} numbers are NaN or infinite"
        return {
            "weight": f"the weight {self.name}: {count}",
            "input": f"the model's input {self.name}: {count}",
            "output": f"the output of {self.name}: {count}",
            "gradient": f"the gradient for the output of {self.name}: {count}; it came from what follows there",
            "weight's gradient": f"the gradient of the weight {self.name}: {count}",
        }[self.kind]


class Finder:
    """While entered, looks at all that happens in a model; `first` is the first that was not finite.

    Looking waits for the device, and compiled modules must not be: eager ones only.

    Args:
        parts: other modules that the model computes with, by names.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, nn.Module] | None = None) -> None:
        self._model = model
        self._named = dict(model.named_modules())
        for prefix, part in (parts or {}).items():
            self._named |= {f"{prefix}.{name}" if name else prefix: each for name, each in part.named_modules()}
        self.first: Found | None = None
        self._calls = 0
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> Finder:
        for name, parameter in self._model.named_parameters():
            self._look("weight", name, parameter.detach())
            if parameter.requires_grad:
                self._keep(parameter.register_hook(self._of("weight's gradient", name)))
        self._keep(self._model.register_forward_pre_hook(self._inputs, with_kwargs=True))
        for name, module in self._named.items():
            self._keep(module.register_forward_hook(self._outputs(name or type(self._model).__name__)))
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _keep(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _look(self, kind: str, name: str, value: Tensor) -> None:
        if self.first is not None or not value.is_floating_point():
            return
        bad = ~value.isfinite()
        count = int(bad.sum())
        if count:
            rows = bad.flatten(1).any(1).nonzero().flatten().tolist() if kind == "input" and value.ndim > 1 else []
            self.first = Found(kind, name, count, value.numel(), tuple(rows), max(0, self._calls - 1))

    def _of(self, kind: str, name: str) -> Callable[[Tensor], None]:
        return lambda value: self._look(kind, name, value.detach())

    def _inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls += 1
        given = inspect.signature(self._model.forward).bind(*args, **kwargs).arguments
        for name, tree in given.items():
            for place, value in _tensors(tree):
                self._look("input", f"{name}{place}", value.detach())

    def _outputs(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for _, value in _tensors(output):
                self._look("output", name, value.detach())
                if value.requires_grad and self.first is None:
                    value.register_hook(self._of("gradient", name))

        return hook


def _tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in tree_leaves_with_path(tree):
        if isinstance(leaf, Tensor):
            yield keystr(path), leaf


def largest(model: nn.Module) -> tuple[str, float]:
    """The weight with the largest number, and that."""
    sizes = {name: float(value.detach().abs().max()) for name, value in model.named_parameters() if value.numel()}
    name = max(sizes, key=sizes.__getitem__)
    return name, sizes[name]
