"""One specification an operator: what parity, gradient, compile and benchmark code needs to know about it.

To add an operator: write `<folder>/spec.py` with a constant `SPEC = OperatorSpec(...)` and name the folder in specs.py.
tests/kernels/test_operators.py and the benchmarks then cover it. The contract:

- `operator` and `reference` are called as `f(**sample.inputs)`, with the same keywords. Inputs are nested lists, tuples
  and dicts of tensors and plain values. A module fits as a function of its weights: put its named parameters among the
  inputs and call `torch.func.functional_call(module, weights, (...))` (see stem/spec.py).
- The result is a tensor or a nested list or tuple of tensors. An operator that works in place names the inputs it
  writes in `mutates`; its result is then those inputs, and the reference returns their new values as a tuple.
- `samples(device, dtype)` yields small samples whose low-precision inputs have `dtype`, a plain one first. Layouts
  (strided, expanded, channels-last, ...) need no samples of their own: `awkward_layouts` derives them.

Tolerance rule, in place of hand-picked tolerances: with the reference run in float64 on the same inputs,
`err(operator) <= 2 * err(reference in the inputs' dtype) + 4 * eps(dtype) * scale`, for outputs and for every gradient;
`dtype` is the compared tensor's and `scale` the float64 result's largest magnitude.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .backends import INTERPRETED


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Inputs of one call.

    differentiable: names of the inputs (all their floating-point tensors) with respect to which gradients are checked.
    """

    name: str
    inputs: Mapping[str, Any]
    differentiable: tuple[str, ...] = ()

    def with_inputs(self, name: str, **changes: Any) -> "Sample":
        """The same sample with some inputs replaced."""
        return replace(self, name=name, inputs={**self.inputs, **changes})


@dataclass(frozen=True, kw_only=True)
class BadInput:
    """A call that must fail: the exception, and a regular expression its message must match."""

    name: str
    inputs: Mapping[str, Any]
    error: type[Exception]
    message: str


@dataclass(frozen=True, kw_only=True)
class LargeSample:
    """A call on tensors of more than a given number of elements, checked on a small part.

    inputs: of the large call. small: inputs of a call whose result must equal `part(large result)`, up to rounding.
    differentiable: inputs whose gradients are compared as well; `grad_parts` cuts the large gradients, in that order.
    """

    name: str
    inputs: Mapping[str, Any]
    small: Mapping[str, Any]
    part: Callable[[Any], Any]
    differentiable: tuple[str, ...] = ()
    grad_parts: tuple[Callable[[Tensor], Tensor], ...] = ()


@dataclass(frozen=True, kw_only=True)
class OperatorSpec:
    """Everything tests and benchmarks know about one operator."""

    name: str
    operator: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterator[Sample]]
    # Low-precision types of the inputs; float64 is always supported.
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    # A network of many operations: its small gradients are sums of hundreds of roundings, and which of two equal orders
    # of summation lands closer in one of them is chance. The error of PyTorch eager, relative to scale, is then the
    # largest among the outputs, or among the gradients, of the run.
    pooled: bool = False
    # Inputs that the operator writes in place.
    mutates: tuple[str, ...] = ()
    # Inputs that autocast casts to its active dtype; all others keep theirs.
    autocast_inputs: tuple[str, ...] = ()
    # Calls for torch.library.opcheck: (overload, positional arguments) of the forward and the backward operators.
    overload_calls: Callable[[Sample], Iterator[tuple[torch._ops.OpOverload, tuple[Any, ...]]]] | None = None
    # The backend "torch" calls PyTorch's operations, not a registered operator: exporters, compilers and autocast see
    # them as they are.
    open_in_torch: bool = False
    bad_inputs: Callable[[torch.device], Iterator[BadInput]] | None = None
    # Samples with at least `elements` elements in their largest tensor, for offsets past 2^31.
    large_samples: Callable[[torch.device, int], Iterator[LargeSample]] | None = None
    # Names of two samples that differ in sizes only: the second must not compile again.
    resized: tuple[str, str] | None = None
    # Benchmark: inputs at base width for `clips` clips; and, for the inputs of any sample, the least that a forward and
    # a backward must move (bytes) or do (FLOPs).
    benchmark: Callable[[torch.device, torch.dtype, int], Sample] | None = None
    bytes_forward: Callable[[Mapping[str, Any]], int] | None = None
    bytes_backward: Callable[[Mapping[str, Any]], int] | None = None
    flops_forward: Callable[[Mapping[str, Any]], int] | None = None
    flops_backward: Callable[[Mapping[str, Any]], int] | None = None
    # Whether float64 inputs are computed (in float64).
    float64: bool = True
    # Samples, by name, that Triton's kernels are tested on, the first one most: where compiling, or interpreting, each
    # of all samples would take minutes. Empty: all. And the dtypes that the interpreter runs: None is all.
    triton_samples: tuple[str, ...] = ()
    interpreted_dtypes: tuple[torch.dtype, ...] | None = None

    def with_backend(self, backend: str) -> "OperatorSpec":
        """The same operator by one of its other backends (`backends.OPERATORS`)."""
        names = self.triton_samples if backend == "triton" else ()

        def chosen(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
            found = (sample for sample in self.samples(device, dtype) if not names or sample.name in names)
            yield from sorted(found, key=lambda sample: names.index(sample.name)) if names else found

        interpreted = self.interpreted_dtypes if backend == "triton" and INTERPRETED else None
        return replace(
            self,
            name=f"{self.name}[{backend}]",
            operator=functools.partial(self.operator, backend=backend),
            overload_calls=None,
            float64=backend not in ("triton", "native"),
            samples=chosen,
            dtypes=interpreted or self.dtypes,
        )


# --- inputs -----------------------------------------------------------------------------------------------------------


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def map_floats(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with every floating-point tensor replaced by `function` of it."""
    return pytree.tree_map(lambda leaf: function(leaf) if is_float(leaf) else leaf, tree)


def floats(tree: Any) -> list[Tensor]:
    """All floating-point tensors of a nested structure, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if is_float(leaf)]


def fresh(sample: Sample, *, requires_grad: bool = True) -> dict[str, Any]:
    """The sample's inputs as new leaves on their storage; those to differentiate require gradients where asked.

    Inputs the operator may write must be cloned first (`clone_tensors`)."""
    inputs = {}
    for name, value in sample.inputs.items():
        wanted = requires_grad and name in sample.differentiable
        inputs[name] = map_floats(lambda t, wanted=wanted: t.detach().requires_grad_(wanted), value)  # type: ignore[misc]
    return inputs


def clone_tensors(tree: Any) -> Any:
    """A copy of every tensor of a nested structure that keeps strides and storage offset; gaps hold NaN."""
    return pytree.tree_map(lambda leaf: _clone(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _clone(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return tensor.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.full(
        (tensor.storage_offset() + span,),
        float("nan") if tensor.is_floating_point() else 0,
        dtype=tensor.dtype,
        device=tensor.device,
    )
    # Expanded dimensions are written once: PyTorch refuses to write through stride 0.
    narrow = tuple(slice(None, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    copy = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    copy[narrow] = tensor[narrow]
    return copy


# --- samples ----------------------------------------------------------------------------------------------------------


class Random:
    """Seeded inputs, the same on every device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def visible(self, rows: int, length: int, count: int) -> Tensor:
        """(rows, count) distinct patch indices in [0, length), in random order."""
        order = torch.rand(rows, length, generator=self.generator).argsort(dim=1)
        return order[:, :count].contiguous().to(self.device)

    def mask(self, rows: int, length: int, count: int) -> Tensor:
        """(rows, length) bool with `count` True in each row."""
        mask = torch.zeros(rows, length, dtype=torch.bool, device=self.device)
        return mask.scatter_(1, self.visible(rows, length, count), True)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# --- awkward layouts --------------------------------------------------------------------------------------------------


def strided(t: Tensor) -> Tensor:
    """Every second element of a larger tensor, along the last dimension."""
    if t.ndim == 0:
        return t
    base = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=t.device)
    view = base[..., ::2]
    view.copy_(t)
    return view


def sliced(t: Tensor) -> Tensor:
    """Rows 1.. of a larger tensor along the second dimension, as tokens with the CLS row cut off arrive."""
    if t.ndim < 2:
        return t
    base = torch.full((t.shape[0], t.shape[1] + 1, *t.shape[2:]), float("nan"), dtype=t.dtype, device=t.device)
    view = base[:, 1:]
    view.copy_(t)
    return view


def channels_last(t: Tensor) -> Tensor:
    """Channels-last memory for a 4-D tensor (B, C, H, W); for the other ranks the last two dimensions swap places in
    memory, as (B, L, D) tokens do that were flattened from (B, D, H, W) feature maps."""
    if t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.mT.contiguous().mT if t.ndim >= 2 else t


def transposed(t: Tensor) -> Tensor:
    """First two dimensions swapped in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim >= 2 else t


def expanded(t: Tensor) -> Tensor:
    """The first entry of the first dimension, repeated with stride 0."""
    return t[:1].expand(t.shape) if t.ndim >= 1 and t.shape[0] > 1 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided,
    "sliced": sliced,
    "channels_last": channels_last,
    "transposed": transposed,
    "expanded": expanded,
}


def awkward_layouts(sample: Sample, mutates: tuple[str, ...] = ()) -> Iterator[Sample]:
    """The sample with all its floating-point tensors in each layout.

    Not expanded are inputs that are written in place, and dicts: these hold weights, whose equal rows would make all
    channels equal and the norms over them 0 / 0."""
    for name, layout in LAYOUTS.items():
        inputs = {
            key: value
            if name == "expanded" and (key in mutates or isinstance(value, Mapping))
            else map_floats(layout, value)
            for key, value in sample.inputs.items()
        }
        yield replace(sample, name=f"{sample.name}, {name}", inputs=inputs)


# --- runs and the tolerance rule --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Outputs and gradients of one call, flat."""

    outputs: list[Tensor]
    grads: list[Tensor]


def run(
    spec: OperatorSpec,
    function: Callable[..., Any],
    sample: Sample,
    incoming: list[Tensor] | None = None,
) -> Run:
    """Call `function` (the spec's operator or reference) on copies of the sample's inputs.

    incoming: gradients of the outputs, in order; the result then holds the gradients of the differentiable inputs.
        None: forward only.
    """
    inputs = fresh(replace(sample, inputs=clone_tensors(dict(sample.inputs))), requires_grad=incoming is not None)
    result = function(**inputs)
    if spec.mutates and result is None:
        result = tuple(inputs[name] for name in spec.mutates)
    outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    grads: list[Tensor] = []
    if incoming is not None and sample.differentiable:
        leaves = floats([inputs[name] for name in sample.differentiable])
        grads = gradients(outputs, leaves, incoming, materialize_grads=True)
    return Run([out.detach() for out in outputs], grads)


def gradients(outputs: list[Tensor], leaves: list[Tensor], incoming: list[Tensor], **options: bool) -> list[Tensor]:
    """`torch.autograd.grad` from those outputs that carry a gradient."""
    carry = [(out, grad) for out, grad in zip(outputs, incoming, strict=True) if out.requires_grad]
    return list(torch.autograd.grad([out for out, _ in carry], leaves, [grad for _, grad in carry], **options))


def to_float64(sample: Sample) -> Sample:
    """The same values in float64."""
    return replace(sample, inputs=map_floats(lambda t: t.to(torch.float64), dict(sample.inputs)))


LARGE = 1 << 24  # numbers that a CPU takes a tenth of a second or more to draw


def incoming_gradients(outputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Random incoming gradients for floating-point outputs, the same for every run and dtype up to rounding; for small
    outputs also on every device."""
    large = sum(out.numel() for out in outputs) > LARGE
    device = outputs[0].device if large else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(seed)
    drawn = (torch.randn(out.shape, generator=generator, dtype=torch.float64, device=device) for out in outputs)
    return [numbers.to(out.device, out.dtype) for numbers, out in zip(drawn, outputs, strict=True)]


def error_bound(eager: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The tolerance rule: 2 * err(PyTorch eager) + 4 * eps(dtype) * scale."""
    return 2 * max_error(eager, exact) + 4 * torch.finfo(dtype).eps * _scale(exact)


def _scale(exact: Tensor) -> float:
    return float(exact.abs().max()) if exact.numel() else 0.0


def max_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.to(torch.float64) - exact).abs().max()) if exact.numel() else 0.0


def check_parity(spec: OperatorSpec, sample: Sample, layout: Callable[[Tensor], Tensor] | None = None) -> None:
    """Raise AssertionError where the operator breaks the tolerance rule on a sample, in an output or a gradient.

    layout: applied to the incoming gradients.
    """
    incoming = incoming_gradients(run(spec, spec.reference, sample).outputs) if sample.differentiable else None
    if incoming is not None and layout is not None:
        incoming = [layout(g) for g in incoming]
    actual = run(spec, spec.operator, sample, incoming)
    eager = run(spec, spec.reference, sample, incoming)
    wide = None if incoming is None else [g.to(torch.float64) for g in incoming]
    exact = run(spec, spec.reference, to_float64(sample), wide)
    compare_runs(f"{spec.name}, {sample.name}", actual, eager, exact, pooled=spec.pooled)


def compare_runs(what: str, actual: Run, eager: Run, exact: Run, *, pooled: bool = False) -> None:
    """The tolerance rule on every output and gradient of a run; `pooled`: see `OperatorSpec`."""
    for kind in ("outputs", "grads"):
        triples = list(zip(getattr(actual, kind), getattr(eager, kind), getattr(exact, kind), strict=True))
        pooled_error = 2 * max((max_error(e, x) / (_scale(x) or 1) for _, e, x in triples), default=0) if pooled else 0
        for i, (a, e, x) in enumerate(triples):
            where = f"{what}: {kind[:-1]} {i}"
            _require(a.shape == x.shape, f"{where}: shape {tuple(a.shape)}, expected {tuple(x.shape)}")
            _require(a.dtype == e.dtype, f"{where}: dtype {a.dtype}, the reference gives {e.dtype}")
            if not a.is_floating_point():
                _require(torch.equal(a, e), f"{where}: differs from the reference")
                continue
            error, bound = max_error(a, x), max(error_bound(e, x, a.dtype), pooled_error * _scale(x))
            # Written so that a NaN fails.
            _require(error <= bound, f"{where}: error {error:.3g} > {bound:.3g} allowed ({a.dtype})")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
