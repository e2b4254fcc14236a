"""What a step does, operation by operation: bytes, FLOPs, launches, whose part it is; and which tensors are alive.

`Trace` is a dispatch mode, for tensors with values or without: on `benchmarks.standin` a step of any size is traced in
seconds (`benchmarks.traced_step`).

- Bytes: each argument and each result of an operation once (an expanded dimension holds one element), twice what is
  changed in place. Views move none.
- Launches: one for an operation that computes, with the exceptions of `KERNELS` and of lists of tensors, which PyTorch
  cuts into chunks; Triton kernels as they are launched.
- Parts: `cat.parts`, and modules that are named with `watch`. An operation of the backward belongs to the part in whose
  forward its node of autograd was made.
- Alive: storages made while the trace runs, each to the moment when nothing refers to it any more.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from cat import parts
from cat.training.flops import FORMULAS

ROUNDED = 512  # the caching allocator gives out multiples of so many bytes
# Operators of ours that are a part of their own, wherever they are called; their backward begins with the same name.
OPERATORS = {"restore_tokens": "restore", "average_targets": "targets", "masked_regression_loss": "loss"}
# Marks of `cat.parts`, by what is left of them without the modules inside: positions, class token and first norm; and
# what brings the student's tokens back to the grid.
MARKS = {"stem": "tokens", "teacher": "tokens", "decoder": "restore", "forward, rest": "rest", "backward": "rest"}
# Kernels of an operation on a GPU, where it is not one.
KERNELS = {
    "convolution": 2,  # cuDNN's, then the bias
    "native_layer_norm_backward": 2,  # of the input; of weight and bias
    "_scaled_dot_product_flash_attention_backward": 3,  # the rows' sums, the gradients, the queries' in the end
}
ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
# Read no more of their first argument than they put out.
PICKS = ("index", "index_select", "gather", "embedding")
# How PyTorch's kernels for lists cut them: elements a block; blocks, and tensors by the number of lists, a launch.
CHUNK, BLOCKS, TENSORS = 65536, 320, (110, 64, 48, 36, 30)


@dataclass
class Operation:
    """One operation of PyTorch's, or one launch of a Triton kernel."""

    name: str  # "mm", "triton stem.kernels.linear._norm_linear"
    part: str
    backward: bool
    launches: int
    bytes: int
    flops: int
    elements: int  # of its largest tensor
    rows: dict[str, int] = field(default_factory=dict)  # of a Triton kernel: width -> rows of its largest 2-d tensor
    arguments: dict[str, Any] = field(default_factory=dict)  # of a Triton kernel: numbers, constexprs
    multiplies: bool = False  # a Triton kernel with matrix products
    reads: list[list[int]] = field(default_factory=list)  # [number of a storage, bytes]
    writes: list[list[int]] = field(default_factory=list)


@dataclass
class Alive:
    """A storage that the step made."""

    number: int
    bytes: int
    part: str
    backward: bool
    made_by: str  # operation, or "<operator>.<which of its results>"
    shape: tuple[int, ...]
    dtype: str


def model_parts(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """Those parts of a step that are modules of `cat.model.CAT`."""
    yield model.student.stem, "student's stem"
    yield model.acting_teacher.stem, "teacher's stem"
    yield model.decoder, "decoder"
    for encoder, name in ((model.student, "blocks"), (model.acting_teacher, "teacher's blocks")):
        for block in encoder.blocks:
            yield block, name


class Trace(TorchDispatchMode):
    """Use it as ``with trace.tracing()``. ``device``: operations elsewhere are not counted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operations: list[Operation] = []
        self.peak_bytes, self.at_peak = 0, Counter()
        self.kept: dict[str, list[Alive]] = {}  # watched module -> what is alive of its part when it returns
        self._alive: dict[int, Alive] = {}  # by address of the storage
        self._references: dict[int, weakref.ref[Any]] = {}
        self._live, self._by_part = 0, Counter()
        self._number = itertools.count()
        self._blank: set[int] = set()  # allocated, nothing written yet
        self._stack = ["rest"]
        self._first_nodes, self._parts = [0], ["rest"]  # from which node of autograd on it is which part
        self._owners: dict[int, str] = {}  # parameter -> part
        self._within: list[str] = []  # operators of ours
        self._hooks: list[Any] = []

    # ------------------------------------------------------------ parts

    def watch(self, module: nn.Module, name: str) -> None:
        """What the module computes is a part."""
        for p in module.parameters():
            self._owners.setdefault(id(p), name)
        self._hooks.append(module.register_forward_pre_hook(lambda *_: self._enter(name)))
        self._hooks.append(module.register_forward_hook(lambda *_: self._leave()))

    def watch_model(self, model: Any) -> None:
        """The parts of a pre-training model (`cat.model.CAT`)."""
        for module, name in model_parts(model):
            self.watch(module, name)
        for p in model.student.parameters():
            self._owners.setdefault(id(p), "tokens")

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """For `cat.parts.part`."""
        self._enter(MARKS.get(name, name))
        try:
            yield
        finally:
            self._leave()

    def _enter(self, name: str) -> None:
        self._stack.append(name)
        self._from_here_on(name)

    def _leave(self) -> None:
        name = self._stack.pop()
        self.kept[name] = [a for a in self._alive.values() if a.part == name and a.bytes]
        self._from_here_on(self._stack[-1])

    def _from_here_on(self, name: str) -> None:
        self._first_nodes.append(torch._C._autograd._get_sequence_nr())
        self._parts.append(name)

    def _part(self) -> tuple[str, bool]:
        node = torch._C._current_autograd_node()
        ours = next((OPERATORS[o] for o in OPERATORS if self._within and self._within[-1].startswith(o)), None)
        if node is None:
            return ours or self._stack[-1], False
        if hasattr(node, "variable"):  # a parameter's gradient arrives
            return self._owners.get(id(node.variable), "rest"), True
        return ours or self._parts[bisect.bisect_right(self._first_nodes, node._sequence_nr()) - 1], True

    @contextlib.contextmanager
    def tracing(self) -> Iterator[Trace]:
        parts._ACTIVE.append(self)
        try:
            with self:  # entered anew for what an operator of ours runs
                yield self
        finally:
            parts._ACTIVE.remove(self)
            for hook in self._hooks:
                hook.remove()

    # ------------------------------------------------------------ operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "cat_kernels":
            return self._operator(func, args, kwargs)
        given = self._here((args, kwargs))
        before = {t.untyped_storage()._cdata for t in given}
        for t in given:
            self._storage(t, None)
        result = func(*args, **kwargs)
        made = self._here(result)
        if func.namespace == "aten" and (made or given):
            self._count(func, args, kwargs, given, result, made, before)
        return result

    def _operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One of ours runs the implementation that it has for this device, in sight of the trace."""
        for t in self._here((args, kwargs)):
            self._storage(t, None)
        name = func._schema.name.partition("::")[2]
        key = torch._C.DispatchKey.CUDA if self.device.type == "cuda" else torch._C.DispatchKey.CPU
        self._within.append(name)
        first = len(self.operations)
        try:
            with self:
                result = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        finally:
            self._within.pop()
        multiplying = [o for o in self.operations[first:] if o.multiplies]
        for o in multiplying:
            o.flops = _flops(func, args, kwargs, result) // len(multiplying)
        for i, t in enumerate(self._here(result)):
            if (alive := self._alive.get(t.untyped_storage()._cdata)) is not None:
                alive.made_by = f"{name}.{i}"
        return result

    def _here(self, tree: Any) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        return [leaf for leaf in leaves if leaf.device.type == self.device.type]

    def _count(
        self, func: Any, args: Any, kwargs: Any, given: list[Tensor], result: Any, made: list[Tensor], before: set[int]
    ) -> None:
        name = func._schema.name.partition("::")[2]
        new = [t for t in made if t.untyped_storage()._cdata not in before]
        written = self._here([a for a, s in zip(args, func._schema.arguments, strict=False) if _is_written(s)])
        if not new and not written:
            return  # a view
        part, backward = self._part()
        writes = [self._access(t, name) for t in (*new, *written)]
        if name in ALLOCATES:
            self._blank.update(number for number, _ in writes)
            return
        was_blank = {number for number, _ in writes} & self._blank
        reads = [a for a in map(self._access, given) if a[0] not in was_blank]
        reads = [list(pair) for pair in dict.fromkeys(map(tuple, reads))]
        if name in PICKS and reads:
            reads[0][1] = min(reads[0][1], writes[0][1])
        if name == "copy_":
            reads = [a for a in reads if a not in writes]
        moved = sum(count for _, count in (*reads, *writes))
        launches = KERNELS.get(name, 1)
        if name.startswith(("_foreach", "_fused")):
            launches = _list_launches([a for a in args if isinstance(a, list | tuple) and self._here(a)])
        elif name == "convolution":
            moved += 2 * writes[0][1]
        elif name == "convolution_backward":
            launches = sum(args[-1])
        elif name == "native_layer_norm_backward":
            moved += sum(count for _, count in reads[:2])
        elements = max(map(_elements, (*given, *made)), default=0)
        self._blank -= was_blank
        self.operations.append(
            Operation(name, part, backward, launches, moved, _flops(func, args, kwargs, result), elements,
                      reads=reads, writes=writes)
        )  # fmt: skip

    def launched(self, kernel: Any, args: Any, meta: dict[str, Any]) -> None:
        """A Triton kernel (JITFunction) was launched."""
        bound = {**dict(zip(kernel.arg_names, args, strict=False)), **meta}
        tensors = self._here(list(bound.values()))
        accesses = list(dict.fromkeys(tuple(self._access(t)) for t in tensors))
        writes = [list(a) for a in accesses if a[0] in self._blank]
        reads = [list(a) for a in accesses if a[0] not in self._blank]
        self._blank -= {number for number, _ in writes}
        numbers = {k: v for k, v in bound.items() if isinstance(v, int | float | str | bool)}
        moved = sum(count for _, count in accesses)
        elements = max(map(_elements, tensors), default=0)
        if kernel.fn.__name__ == "_average":  # its tensors' addresses are in a table
            elements = bound["table_ptr"].shape[0] * bound["CHUNK"]
            types = bound["STUDENT"], *([bound["COPY"]] if bound["HAS_COPY"] else [])
            moved = elements * (8 + sum(t.primitive_bitwidth // 8 for t in types))
        rows: dict[str, int] = {}
        for t in tensors:
            if t.ndim == 2:
                rows[str(t.shape[1])] = max(t.shape[0], rows.get(str(t.shape[1]), 0))
        part, backward = self._part()
        self.operations.append(
            Operation(
                name_of(kernel),
                part,
                backward,
                1,
                moved,
                0,
                elements,
                rows,
                numbers,
                "dot(" in kernel.src,
                reads,
                writes,
            )
        )

    # ------------------------------------------------------------ storages

    def _access(self, tensor: Tensor, made_by: str | None = None) -> list[int]:
        return [self._storage(tensor, made_by).number, _elements(tensor) * tensor.element_size()]

    def _storage(self, tensor: Tensor, made_by: str | None) -> Alive:
        """Its record. What is first seen as an argument was there before: it has no bytes."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        found = self._alive.get(address)
        if found is None:
            part, backward = self._part()
            size = 0 if made_by is None else -(-storage.nbytes() // ROUNDED) * ROUNDED
            dtype = str(tensor.dtype).removeprefix("torch.")
            found = Alive(next(self._number), size, part, backward, made_by or "", tuple(tensor.shape), dtype)
            self._alive[address] = found
            self._references[address] = weakref.ref(storage, lambda _: self._gone(address))
            self._live += size
            self._by_part[part, backward] += size
            if self._live > self.peak_bytes:
                self.peak_bytes, self.at_peak = self._live, self._by_part.copy()
        return found

    def _gone(self, address: int) -> None:
        gone = self._alive.pop(address)
        del self._references[address]
        self._live -= gone.bytes
        self._by_part[gone.part, gone.backward] -= gone.bytes

    # ------------------------------------------------------------ what it found

    def as_dict(self) -> dict[str, Any]:
        at_peak = [[part, backward, size] for (part, backward), size in self.at_peak.items() if size]
        kept = {name: [asdict(a) for a in found] for name, found in self.kept.items()}
        operations = [asdict(operation) for operation in self.operations]
        return {"operations": operations, "peak_bytes": self.peak_bytes, "at_peak": at_peak, "kept": kept}


def counts(operations: Iterable[Operation]) -> dict[str, dict[str, int]]:
    """Launches, bytes and FLOPs of PyTorch's products by part and direction, in the order in which they came."""
    found: dict[str, dict[str, int]] = {}
    for o in operations:
        total = found.setdefault(f"{o.part}, backward" if o.backward else o.part, dict.fromkeys(COUNTED, 0))
        for name in COUNTED:
            total[name] += getattr(o, name)
    return found


def name_of(kernel: Any) -> str:
    """An operation's name of a Triton kernel."""
    return f"triton {kernel.fn.__module__.removeprefix('cat_kernels.')}.{kernel.fn.__name__}"


COUNTED = ("launches", "bytes", "flops")


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _elements(tensor: Tensor) -> int:
    """Those that lie in memory."""
    if tensor.numel() == 0:
        return 0
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def _list_launches(lists: list[Any]) -> int:
    """Of a kernel for lists of tensors."""
    most = TENSORS[min(len(lists), len(TENSORS)) - 1]
    launches, blocks, tensors = 0, 0, 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(-(-tensor.numel() // CHUNK)):
            blocks += 1
            if blocks == BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 1
        if tensors == most:
            launches, blocks, tensors = launches + 1, 0, 0
    return launches + (blocks > 0)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Of products, convolutions and attention; PyTorch's formulas and `FORMULAS`."""
    packet = func._overloadpacket
    if packet is torch.ops.aten.matmul:
        return 2 * result.numel() * args[0].shape[-1]
    formula = shape_wrapper(FORMULAS[packet]) if packet in FORMULAS else flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0
