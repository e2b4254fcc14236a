"""The `cat_kernels` operator library and the one way an operator enters it.

Built on `Library.define` and `Library.impl`, for a low cost of an eager call. Measured on one CPU core with PyTorch
2.13, for an operator that clones eight floats: 17 us where no gradient is recorded (`torch.library.custom_op`: 31 us),
76 us where one is (61 us, saving nothing): PyTorch then fills in arguments' defaults in Python, 3 to 17 us of it.
Looking out for transforms and forward mode (`_autograd_kernel`) adds 0.4 and 0.7 us, on a core that takes 8 and 17 us
for the two calls.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._library.autograd import Info, make_autograd_impl
from torch._library.utils import is_tensorlist_like_type
from torch.autograd import forward_ad

from ._ops import add_op_namespace_prefix, ops
from .backends import OPERATORS, BackendError, resolve

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Dispatch keys an operator is implemented for; the implementation itself is chosen by `backends.resolve`.
DEVICES = ("cpu", "cuda")
_AUTOCAST_KEYS = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)


def register(
    operator: str,
    schema: str,
    implementations: Mapping[str, Callable[..., Any]],
    *,
    fake: Callable[..., Any],
    refuses: Mapping[str, Callable[..., str | None]] | None = None,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    composite: Callable[..., Any] | None = None,
    autocast: tuple[int, ...] = (),
) -> torch._ops.OpOverload:
    """Define one `torch.library` operator and return its overload.

    operator: row of the backend table (`backends.OPERATORS`) that decides which implementation runs; the forward and
        the backward of an operator share one row.
    schema: PyTorch schema without the namespace. Its last argument must be `*, str backend="auto"`.
    implementations: backend name -> function of the schema's other arguments.
    fake: the same signature, on tensors without storage; gives shapes, dtypes and devices (results are contiguous).
    refuses: backend name -> function of the same arguments that says, in words, why this implementation does not take
        them, or None where it does. "auto" then takes the operator's last backend, which takes everything.
    setup_context, backward: as in `torch.library.register_autograd`. `setup_context` gets (ctx, inputs, output), and
        `ctx.backend` is set for it. Without `backward`, differentiating the result is an error, never a silent zero.
    composite: the operator in plain, differentiable PyTorch, a function of the same arguments as an implementation. It
        runs in their place, whatever the backend, where forward-mode derivatives or transforms of `torch.func` go
        through the operator: there, all derivatives of any order are PyTorch's. Without it these are an error, and so
        they are where an argument is written in place.
    autocast: positions of the tensor arguments that are cast to the active autocast dtype. All other arguments keep
        theirs: inside an implementation autocast is off, so that its arithmetic is the same everywhere.
    """
    name = schema.split("(")[0]
    qualname = add_op_namespace_prefix(name)
    # flexible_layout: implementations accept any strides, so that a compiler need not copy inputs to fixed ones.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    op = getattr(ops, name).default
    for device in DEVICES:
        kernel = _kernel(operator, implementations, device, refuses or {})
        LIBRARY.impl(name, kernel, device.upper())
        LIBRARY.impl(name, _autocast_kernel(op, device, autocast), "Autocast" + device.upper(), with_keyset=True)
    torch.library.register_fake(qualname, lambda *args, backend="auto": fake(*args), lib=LIBRARY)
    if op._schema.is_mutable:
        recorded = _mutating_autograd_kernel(op)
    else:

        def save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
            ctx.backend = keyword_only_inputs["backend"]
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        # What `torch.library.register_autograd` would register.
        recorded = make_autograd_impl(op, Info(backward or _not_differentiable(qualname), save))

    def composed(*args: Any, backend: str = "auto") -> Any:
        if composite is None:
            raise NotImplementedError(_no_composite(op))
        device = next(_tensors(args)).device.type
        _choose(operator, backend, device, refuses or {}, args)  # errors are the same everywhere
        return composite(*args)

    LIBRARY.impl(name, _autograd_kernel(recorded, composed, op._schema.is_mutable), "Autograd", with_keyset=True)
    if any(is_tensorlist_like_type(argument.type) for argument in op._schema.arguments):
        # What others have of PyTorch, a loop over the batch, it does not make for lists of tensors.
        for key in ("FuncTorchBatched", "Batched"):  # torch.func.vmap, and autograd's is_grads_batched
            LIBRARY.impl(name, composed, key)
    return op


def _kernel(
    operator: str,
    implementations: Mapping[str, Callable[..., Any]],
    device: str,
    refuses: Mapping[str, Callable[..., str | None]],
) -> Callable[..., Any]:
    def kernel(*args: Any, backend: str = "auto") -> Any:
        return implementations[_choose(operator, backend, device, refuses, args)](*args)

    return kernel


def _choose(
    operator: str,
    backend: str,
    device: str,
    refuses: Mapping[str, Callable[..., str | None]],
    args: tuple[Any, ...],
) -> str:
    chosen = resolve(operator, backend, device)
    if chosen in refuses:
        reason = refuses[chosen](*args)
        if reason is not None:
            chosen = OPERATORS[operator][-1]
            if backend != "auto":
                raise BackendError(
                    f"backend={backend!r} cannot run {operator}: {reason}; use backend={chosen!r} or 'auto'"
                )
    return chosen


def _autograd_kernel(recorded: Callable[..., Any], composed: Callable[..., Any], mutates: bool) -> Callable[..., Any]:
    """`recorded` knows reverse mode alone: it would drop tangents, and functorch does not let it through. It may run
    where no argument carries a derivative; `composed` runs elsewhere."""

    def kernel(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        if transformed or forward_ad._current_level >= 0:
            records = transformed and (mutates or torch.is_grad_enabled())
            if any((records and t.requires_grad) or _has_tangent(t) for t in _tensors(args)):
                return composed(*args, **kwargs)
        return recorded(keyset, *args, **kwargs)

    return kernel


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def _has_tangent(tensor: Tensor) -> bool:
    # Not `forward_ad.unpack_dual`: it asks for a level that compiled code enters without telling Python. There is one.
    return torch._VF._unpack_dual(tensor, level=0)[1] is not None


def _no_composite(op: torch._ops.OpOverload) -> str:
    name = op._schema.name
    remedy = "use the operator's reference (cat_kernels.<operator>.reference), which is plain PyTorch"
    if op._schema.is_mutable:
        return (
            f"{name} writes in place: torch.func, vmap and forward-mode derivatives do not go through it; detach its "
            f"arguments (torch.Tensor.detach), or {remedy}"
        )
    return f"{name} has no forward-mode derivative, and neither torch.func nor vmap goes through it; {remedy}"


def _autocast_kernel(op: torch._ops.OpOverload, device: str, positions: tuple[int, ...]) -> Callable[..., Any]:
    def kernel(_: DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if positions:
            dtype = torch.get_autocast_dtype(device)
            args = tuple(_lower(arg, dtype) if i in positions else arg for i, arg in enumerate(args))
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return op(*args, **kwargs)

    return kernel


def _lower(arg: Any, dtype: torch.dtype) -> Any:
    # float64 is left alone, as PyTorch's own autocast does.
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64 else arg


def _mutating_autograd_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """In-place operators record nothing. They count their writes here: below autograd neither kernels nor, on a GPU,
    PyTorch's operations on lists do. (Tensors of inference mode, which have no counters, do not come by.)"""
    arguments = enumerate(op._schema.arguments)
    written = [i for i, argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]

    def kernel(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
        torch.autograd.graph.increment_version(list(_tensors(args[i] for i in written)))
        return result

    return kernel


def _not_differentiable(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name} cannot be differentiated: second derivatives are not implemented. Take them with torch.func, "
            "which goes by PyTorch's operations, or use the operator's reference (cat_kernels.<operator>.reference)."
        )

    return backward
