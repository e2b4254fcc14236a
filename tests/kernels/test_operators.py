"""What every operator must survive, driven by the specifications (`cat_kernels.spec`); nothing here names an operator.

Each test runs on the CPU and, marked `gpu`, on CUDA.
"""

import contextlib
import importlib.util
import shutil
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from cat_kernels import backends
from cat_kernels import spec as S
from cat_kernels.specs import FOLDERS, specs

SPECS = specs()
ON_GPU = pytest.mark.gpu


def other_backends():
    """The operators by every backend that "auto" does not pick on the CPU and that can run there or on a GPU. Not
    "dense": it is the reference."""
    for spec in SPECS:
        for name in backends.OPERATORS[spec.name]:
            runs = [backends.why_not(spec.name, name, device) is None for device in ("cpu", "cuda")]
            if any(runs) and name not in ("dense", backends.resolve(spec.name)):
                marks = () if runs[0] else ON_GPU
                other = spec.with_backend(name)
                yield pytest.param(other, marks=marks, id=other.name)


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]

every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
every_backend = pytest.mark.parametrize("spec", [*SPECS, *other_backends()], ids=lambda s: s.name)
differentiable_specs = pytest.mark.parametrize(
    "spec",
    [s for s in SPECS if next(s.samples(CPU, torch.float32)).differentiable]
    + [p for p in other_backends() if next(p.values[0].samples(CPU, torch.float32)).differentiable],
    ids=lambda s: s.name,
)
registered_specs = pytest.mark.parametrize("spec", [s for s in SPECS if s.overload_calls], ids=lambda s: s.name)
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


@pytest.fixture(autouse=True)
def _backend_runs_here(request):
    """On a GPU machine Triton's kernels run on CUDA tensors only."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "spec" not in params:
        return
    operator, _, backend = params["spec"].name.removesuffix("]").partition("[")
    device = params.get("device", CUDA if torch.cuda.is_available() else CPU)
    reason = backends.why_not(operator, backend, device.type) if backend else None
    if reason is not None:
        pytest.skip(reason)


every_spec_with_large_samples = pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.large_samples], ids=lambda s: s.name
)


def first_sample(spec, device, dtype=torch.float32):
    return next(spec.samples(device, dtype))


def named_sample(spec, name, device):
    return next(s for s in spec.samples(device, torch.float32) if s.name == name)


def supports(spec, dtype):
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} does not take {dtype}")


def assert_same(actual, expected, what):
    """Bit for bit, NaN equal to NaN."""
    assert len(actual) == len(expected), what
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def assert_finite(run, what):
    for tensor in run.outputs + run.grads:
        assert bool(torch.isfinite(tensor).all()), f"{what}: not finite"


def interpreted(spec, device):
    return spec.name.endswith("[triton]") and device.type == "cpu"


@contextlib.contextmanager
def poisoned_memory():
    """All memory that PyTorch hands out holds NaN, or the largest integer."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


# --- values -----------------------------------------------------------------------------------------------------------


@every_device
@every_dtype
@every_backend
def test_parity(spec, dtype, device):
    """In the interpreter, which takes its time, in poisoned memory at once."""
    supports(spec, dtype)
    with poisoned_memory() if interpreted(spec, device) else contextlib.nullcontext():
        for sample in spec.samples(device, dtype):
            S.check_parity(spec, sample)


@every_device
@every_backend
def test_float64(spec, device):
    """float64 inputs are computed in float64 throughout."""
    if not spec.float64:
        pytest.skip("computes in float32")
    for sample in spec.samples(device, torch.float64):
        sample = S.to_float64(sample)
        incoming = S.incoming_gradients(S.run(spec, spec.operator, sample).outputs) if sample.differentiable else None
        actual, expected = (S.run(spec, f, sample, incoming) for f in (spec.operator, spec.reference))
        for a, e in zip(actual.outputs + actual.grads, expected.outputs + expected.grads, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10, msg=lambda m, name=sample.name: f"{name}: {m}")


@every_device
@every_dtype
@every_backend
def test_awkward_inputs(spec, dtype, device):
    supports(spec, dtype)
    if interpreted(spec, device) and dtype != torch.float32:
        pytest.skip("strides are the same in every dtype; the interpreter takes its time")
    for sample in S.awkward_layouts(first_sample(spec, device, dtype), spec.mutates):
        S.check_parity(spec, sample)


@every_device
@differentiable_specs
def test_awkward_incoming_gradients(spec, device):
    sample = first_sample(spec, device)
    for layout in S.LAYOUTS.values():
        S.check_parity(spec, sample, layout)
    # What y.sum().backward() hands over: one number, expanded to the shape of y.
    S.check_parity(spec, sample, lambda g: g.new_ones(()).expand(g.shape))


@differentiable_specs
def test_gradcheck(spec):
    """The backward against finite differences of the forward, in float64."""
    if not spec.float64:
        pytest.skip("computes in float32")
    checked = 0
    for sample in spec.samples(CPU, torch.float64):
        sample = S.to_float64(sample)
        inputs = S.fresh(sample)
        leaves = S.floats([inputs[name] for name in sample.differentiable])
        size = sum(leaf.numel() for leaf in leaves)
        if size == 0:
            continue
        names = {id(leaf): i for i, leaf in enumerate(leaves)}

        def function(*tensors, inputs=inputs, names=names):
            return spec.operator(**S.map_floats(lambda t: tensors[names[id(t)]] if id(t) in names else t, inputs))

        # Every entry of the Jacobian where it is small, random projections of it elsewhere.
        assert torch.autograd.gradcheck(function, leaves, fast_mode=size > 100, nondet_tol=1e-12), sample.name
        checked += len(leaves)
        # Enough for every sample of an operator with a few inputs; a network of many weights stops earlier.
        if checked > 80:
            break
    assert checked


@every_device
@every_dtype
@every_backend
def test_outputs_are_written_whole(spec, dtype, device):
    """Nothing of what lay in the memory before may show."""
    supports(spec, dtype)
    if interpreted(spec, device):
        pytest.skip("test_parity runs in poisoned memory there")
    with poisoned_memory():
        for sample in spec.samples(device, dtype):
            if sample.differentiable:
                outputs = S.run(spec, spec.reference, sample).outputs
                run = S.run(spec, spec.operator, sample, S.incoming_gradients(outputs))
            else:
                run = S.run(spec, spec.operator, sample)
            assert_finite(run, sample.name)


@every_device
@every_backend
def test_inputs_and_incoming_gradients_stay(spec, device):
    samples = [first_sample(spec, device)]
    samples += S.awkward_layouts(samples[0], spec.mutates)
    for sample in samples:
        inputs = S.fresh(replace(sample, inputs=S.clone_tensors(dict(sample.inputs))))
        kept = {name: value for name, value in inputs.items() if name not in spec.mutates}
        before = S.clone_tensors(pytree.tree_leaves(kept))
        result = spec.operator(**inputs)
        if sample.differentiable:
            outputs = pytree.tree_leaves(result)
            incoming = S.incoming_gradients(outputs)
            incoming_before = S.clone_tensors(incoming)
            leaves = S.floats([inputs[name] for name in sample.differentiable])
            S.gradients(outputs, leaves, incoming)
            assert_same(incoming, incoming_before, f"{sample.name}, incoming gradient")
        tensors = [(a, b) for a, b in zip(pytree.tree_leaves(kept), before, strict=True) if isinstance(a, torch.Tensor)]
        assert_same([a for a, _ in tensors], [b for _, b in tensors], f"{sample.name}, inputs")


@every_device
@differentiable_specs
def test_two_backward_passes(spec, device):
    sample = first_sample(spec, device)
    inputs = S.fresh(sample)
    outputs = pytree.tree_leaves(spec.operator(**inputs))
    leaves = S.floats([inputs[name] for name in sample.differentiable])
    incoming = S.incoming_gradients(outputs)
    first = S.gradients(outputs, leaves, incoming, retain_graph=True)
    second = S.gradients(outputs, leaves, incoming)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_device
@registered_specs
def test_second_derivatives_are_right_or_refused(spec, device):
    """Never silently zero: a linear operator has them, the others say that they do not."""
    sample = S.to_float64(first_sample(spec, device))
    if not sample.differentiable:
        pytest.skip("not differentiable")

    def second_derivatives(function):
        inputs = S.fresh(sample)
        outputs = pytree.tree_leaves(function(**inputs))
        leaves = S.floats([inputs[name] for name in sample.differentiable])
        # The square makes the gradient depend on the inputs also where the operator is linear.
        total = sum(out.square().sum() for out in outputs)
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    try:
        actual = second_derivatives(spec.operator)
    except RuntimeError as error:
        assert "second derivatives are not implemented" in str(error)  # noqa: PT017
        return
    for a, e in zip(actual, second_derivatives(spec.reference), strict=True):
        torch.testing.assert_close(a, e)


# --- other derivatives ------------------------------------------------------------------------------------------------


def of_its_tensors(function, sample):
    """(function of the differentiable tensors alone, a tuple of outputs; these tensors)."""
    leaves, tree = pytree.tree_flatten({name: sample.inputs[name] for name in sample.differentiable})
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

    def call(*tensors):
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return tuple(pytree.tree_leaves(function(**{**sample.inputs, **pytree.tree_unflatten(filled, tree)})))

    return call, tuple(leaves[i] for i in places)


def unpacked(outputs):
    """Tangents; zeros for what carries none."""
    tangents = [forward_ad.unpack_dual(out).tangent for out in outputs]
    return [torch.zeros_like(o) if t is None else t for o, t in zip(outputs, tangents, strict=True)]


def dual(function, tensors, tangents, *, grad):
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.clone().requires_grad_(grad), t) for x, t in zip(tensors, tangents, strict=True)
        ]
        return [t.detach() for t in unpacked(function(*duals))]


def gradient_of(function):
    """Of a sum of sines, so that linear operators have second derivatives too."""

    def total(*tensors):
        return sum(out.sin().sum() for out in function(*tensors))

    return lambda *tensors: torch.func.grad(total, argnums=tuple(range(len(tensors))))(*tensors)


def two(tensors):
    return tuple(torch.stack([x, 0.5 * x]) for x in tensors)


# name: (function, tensors, tangents) -> derivatives
TRANSFORMS = {
    "jvp": lambda f, x, t: torch.func.jvp(f, x, t)[1],
    "dual tensors": lambda f, x, t: dual(f, x, t, grad=False),
    "dual tensors that require gradients": lambda f, x, t: dual(f, x, t, grad=True),
    "grad": lambda f, x, t: gradient_of(f)(*x),
    "jvp of grad": lambda f, x, t: torch.func.jvp(gradient_of(f), x, t)[1],
    "vmap of grad": lambda f, x, t: torch.func.vmap(gradient_of(f))(*two(x)),
    "jvp of vmap": lambda f, x, t: torch.func.jvp(torch.func.vmap(f), two(x), two(t))[1],
    "vmap of jvp": lambda f, x, t: torch.func.vmap(lambda *x: torch.func.jvp(f, x, t)[1])(*two(x)),
}


@every_device
@pytest.mark.parametrize("transform", TRANSFORMS)
@differentiable_specs
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap of an operator is a loop
def test_forward_mode_and_transforms(spec, device, transform):
    """What an autograd.Function alone gives as silent zeros, or not at all."""
    sample = first_sample(spec, device)
    exact = S.to_float64(sample)
    found = []
    for function, inputs in ((spec.operator, exact if spec.float64 else sample), (spec.reference, exact)):
        call, tensors = of_its_tensors(function, inputs)
        tangents = tuple(S.incoming_gradients(list(tensors), seed=1))
        call(*tensors)  # what it makes once, it makes outside of a transform
        found.append(pytree.tree_leaves(TRANSFORMS[transform](call, tensors, tangents)))
    assert any(bool(expected.any()) for expected in found[1])
    for actual, expected in zip(*found, strict=True):
        tolerance = (1e-9 if spec.float64 else 1e-4) * float(expected.abs().max())
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@every_device
@pytest.mark.parametrize("transform", ["jvp", "grad"])
@registered_specs
def test_compiled_transforms(spec, device, transform):
    sample = first_sample(spec, device)
    if not sample.differentiable:
        pytest.skip("not differentiable")
    torch._dynamo.reset()
    call, tensors = of_its_tensors(spec.operator, sample)
    tangents = tuple(S.incoming_gradients(list(tensors), seed=1))

    def whole(*tensors):
        return TRANSFORMS[transform](call, tensors, tangents)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager", dynamic=False)
    for actual, expected in zip(compiled(*tensors), whole(*tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@every_device
@pytest.mark.parametrize("grad", [False, True])
@registered_specs
def test_no_registered_operator_drops_a_tangent(spec, device, grad):
    """Nor do those of the backward pass and those that write in place: they have it, or say that they do not."""
    sample = first_sample(spec, device)
    for overload, arguments in spec.overload_calls(replace(sample, inputs=S.clone_tensors(dict(sample.inputs)))):
        before = [t.clone() for t in S.floats(arguments)]
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            duals = S.map_floats(lambda t: forward_ad.make_dual(t, torch.ones_like(t)), arguments)
            try:
                outputs = pytree.tree_leaves(overload(*duals))
            except NotImplementedError as error:
                assert overload._schema.name in str(error)  # noqa: PT017
                assert "use the operator's reference" in str(error)  # noqa: PT017
            else:
                assert not overload._schema.is_mutable
                assert any(forward_ad.unpack_dual(out).tangent is not None for out in outputs)
        assert_same(S.floats(arguments), before, "inputs")


@pytest.mark.parametrize("spec", [s for s in SPECS if s.mutates], ids=lambda s: s.name)
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_transforms_of_what_writes_in_place_are_refused(spec, transform):
    sample = first_sample(spec, CPU)
    sample = replace(sample, inputs=S.clone_tensors(dict(sample.inputs)), differentiable=tuple(sample.inputs))
    call, tensors = of_its_tensors(spec.operator, sample)
    written = S.floats([sample.inputs[name] for name in spec.mutates])
    before = [t.clone() for t in written]
    attempt = {
        "jvp": lambda: torch.func.jvp(call, tensors, tensors),
        "grad": lambda: torch.func.grad(lambda *x: (call(*x), x[0].sum())[1])(*tensors),
        "vmap": lambda: torch.func.vmap(call)(*two(tensors)),
    }[transform]
    with pytest.raises((NotImplementedError, ValueError), match=r"detach|requires gradients"):
        attempt()
    assert_same(written, before, spec.name)


@every_device
@every_backend
def test_the_default_device_does_not_matter(spec, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # of two calls by PyTorch's operations too
    sample = first_sample(spec, device)
    incoming = S.incoming_gradients(S.run(spec, spec.operator, sample).outputs) if sample.differentiable else None
    expected = S.run(spec, spec.operator, sample, incoming)
    with torch.device("meta"):
        actual = S.run(spec, spec.operator, sample, incoming)
    assert_same(actual.outputs + actual.grads, expected.outputs + expected.grads, spec.name)


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------


@every_device
@registered_specs
def test_opcheck(spec, device):
    samples = [sample for dtype in (torch.float32, torch.bfloat16) for sample in spec.samples(device, dtype)]
    for i, sample in enumerate(samples):
        sample = replace(sample, inputs=S.fresh(replace(sample, inputs=S.clone_tensors(dict(sample.inputs)))))
        # Schemas (aliases, mutation) and fake results on every sample; the rest, which compiles, on the first.
        checks = {} if i == 0 else {"test_utils": ("test_schema", "test_faketensor")}
        for overload, arguments in spec.overload_calls(sample):
            torch.library.opcheck(overload, arguments, **checks)


def run_compiled(spec, compiled, sample):
    """Outputs and gradients of the operator and of its compiled form, which must agree."""
    incoming = None
    if sample.differentiable:
        incoming = S.incoming_gradients(S.run(spec, spec.operator, sample).outputs)
    expected = S.run(spec, spec.operator, sample, incoming)
    actual = S.run(spec, compiled, sample, incoming)
    for a, e in zip(actual.outputs + actual.grads, expected.outputs + expected.grads, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@every_device
@every_backend
def test_compile_without_graph_breaks(spec, device):
    torch._dynamo.reset()
    run_compiled(spec, torch.compile(spec.operator, fullgraph=True, backend="aot_eager"), first_sample(spec, device))


@every_device
@registered_specs
def test_compile_with_inductor(spec, device):
    if device.type == "cpu" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler for the CPU")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        pytest.skip("inductor needs Triton for CUDA")
    torch._dynamo.reset()
    run_compiled(spec, torch.compile(spec.operator, fullgraph=True), first_sample(spec, device))


@every_device
@pytest.mark.parametrize("spec", [s for s in SPECS if s.resized], ids=lambda s: s.name)
def test_new_sizes_do_not_recompile(spec, device):
    torch._dynamo.reset()
    first, second = (named_sample(spec, name, device) for name in spec.resized)
    compiled = torch.compile(spec.operator, fullgraph=True, backend="aot_eager", dynamic=True)
    run_compiled(spec, compiled, first)
    with torch.compiler.set_stance("fail_on_recompile"):
        run_compiled(spec, compiled, second)


class Call(torch.nn.Module):
    """The operator as a module of its tensors, for export; everything else is constant."""

    def __init__(self, spec, inputs):
        super().__init__()
        self.spec, self.inputs = spec, inputs

    def forward(self, tensors):
        leaves, tree = pytree.tree_flatten(self.inputs)
        given = iter(tensors)
        inputs = pytree.tree_unflatten([next(given) if isinstance(v, torch.Tensor) else v for v in leaves], tree)
        return self.spec.operator(**inputs)


@registered_specs
def test_export(spec):
    sample = first_sample(spec, CPU)
    inputs = S.clone_tensors(dict(sample.inputs))
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    program = torch.export.export(Call(spec, inputs), (S.clone_tensors(tensors),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(spec.name in name for name in names) != spec.open_in_torch, names
    actual_inputs = S.clone_tensors(tensors)
    actual = program.module()(actual_inputs)
    expected = S.run(spec, spec.operator, sample).outputs
    result = pytree.tree_leaves(actual) if not spec.mutates else actual_inputs[: len(expected)]
    assert_same(result, expected, spec.name)


@every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@registered_specs
def test_autocast(spec, dtype, device):
    """Under autocast an operator gives what it gives for inputs cast by hand, and gradients in the inputs' dtypes."""
    sample = first_sample(spec, device)
    cast = {name: S.map_floats(lambda t: t.to(dtype), sample.inputs[name]) for name in spec.autocast_inputs}
    incoming = None
    by_hand = S.run(spec, spec.operator, sample.with_inputs("cast by hand", **cast))
    if sample.differentiable:
        incoming = S.incoming_gradients(by_hand.outputs)
        by_hand = S.run(spec, spec.operator, sample.with_inputs("cast by hand", **cast), incoming)

    def under_autocast(**inputs):
        with torch.autocast(device.type, dtype=dtype):
            return spec.operator(**inputs)

    actual = S.run(spec, under_autocast, sample, incoming)
    assert_same(actual.outputs, by_hand.outputs, spec.name)
    leaves = S.floats([sample.inputs[name] for name in sample.differentiable])
    for grad, leaf, hand in zip(actual.grads, leaves, by_hand.grads, strict=True):
        assert grad.dtype == leaf.dtype
        torch.testing.assert_close(grad, hand.to(leaf.dtype), rtol=1e-6, atol=1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------


@every_device
@every_spec
def test_bad_inputs(spec, device):
    assert spec.bad_inputs is not None, f"{spec.name} has no bad inputs"
    for bad in spec.bad_inputs(device):
        with pytest.raises(bad.error, match=bad.message) as caught:
            spec.operator(**bad.inputs)
        # A message names the operator or the argument; raised by a check, not by accident deep inside.
        assert type(caught.value) is bad.error, f"{spec.name}, {bad.name}: {caught.value!r}"


# --- the specifications themselves ------------------------------------------------------------------------------------


def test_every_folder_has_a_specification():
    names = [spec.name for spec in SPECS]
    assert len(names) == len(FOLDERS) == len(set(names))


@every_spec
def test_costs_are_positive(spec):
    inputs = first_sample(spec, CPU).inputs
    for cost in (spec.bytes_forward, spec.bytes_backward, spec.flops_forward, spec.flops_backward):
        assert cost is None or cost(inputs) > 0
    assert spec.bytes_forward is not None


def test_the_tolerance_rule_notices_small_errors():
    """An operator that is off by 8 units in the last place of the scale, or NaN in one place, must not pass."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    sample = S.Sample(name="x", inputs={"x": x}, differentiable=("x",))
    right = S.OperatorSpec(
        name="double", operator=lambda x: 2 * x, reference=lambda x: 2 * x, samples=lambda d, t: iter(())
    )
    S.check_parity(right, sample)
    off = 2 * (1 + 8 * torch.finfo(torch.float32).eps)
    with pytest.raises(AssertionError, match="double, x: output 0: error"):
        S.check_parity(replace(right, operator=lambda x: off * x), sample)
    with pytest.raises(AssertionError, match="output 0: error nan"):
        S.check_parity(replace(right, operator=lambda x: torch.where(x == x[3], torch.nan, 2 * x)), sample)
    with pytest.raises(AssertionError, match="grad 0: error"):
        S.check_parity(replace(right, operator=lambda x: 2 * x.detach() + off * (x - x.detach())), sample)
    with pytest.raises(AssertionError, match=r"dtype torch\.float64"):
        S.check_parity(replace(right, operator=lambda x: 2 * x.double()), sample)


# --- large tensors and GPUs -------------------------------------------------------------------------------------------


def ramp(out):
    """An incoming gradient that takes no memory: the same ramp over the last dimension at every place."""
    if out.ndim == 0:
        return torch.ones_like(out)
    return torch.linspace(-1, 1, out.shape[-1], device=out.device).to(out.dtype).expand(out.shape)


def bytes_of_large(spec, elements):
    """What the largest of the large calls holds at its worst moment: inputs and outputs, a gradient of each, and half
    as much of what the operator needs beside them. On tensors without storage."""
    worst = 0
    for large in spec.large_samples(torch.device("meta"), elements):
        outputs = [] if spec.mutates else list(dict.fromkeys(S.floats(spec.operator(**large.inputs))))
        leaves = S.floats([large.inputs[name] for name in large.differentiable])
        held = S.nbytes(*S.floats(dict(large.inputs)), *outputs)
        worst = max(worst, held + S.nbytes(*leaves, *(outputs if leaves else [])))
    return 1.5 * worst + (1 << 30)


@every_spec_with_large_samples
def test_large_tensors_ask_for_what_they_need(spec):
    """Not for a fixed size: an 80 GB card runs them all. What they hold grows with the elements."""
    needed = bytes_of_large(spec, 1 << 31)
    assert 8 << 30 < needed < 40 << 30
    assert bytes_of_large(spec, 1 << 30) < 0.6 * needed


@pytest.mark.parametrize(
    ("device", "elements"),
    [
        pytest.param(CPU, 1 << 16, id="cpu"),
        pytest.param(CUDA, 1 << 31, id="cuda", marks=(ON_GPU, pytest.mark.alone)),
    ],
)
@every_spec_with_large_samples
def test_large_tensors(spec, device, elements, gpu_memory):
    """Offsets past 2^31 elements on a GPU; the CPU runs the same check at a small size."""
    if device.type == "cuda":
        gpu_memory(bytes_of_large(spec, elements))
    for large in spec.large_samples(device, elements):
        results = []
        for inputs in (large.inputs, large.small):
            sample = S.Sample(name=large.name, inputs=inputs, differentiable=large.differentiable)
            inputs = S.fresh(sample)
            result = spec.operator(**inputs)
            outputs = pytree.tree_leaves(tuple(inputs[name] for name in spec.mutates) if spec.mutates else result)
            grads = []
            if large.differentiable:
                leaves = S.floats([inputs[name] for name in large.differentiable])
                grads = S.gradients(outputs, leaves, [ramp(out) for out in outputs])
            results.append((outputs, grads))
        (outputs, grads), (small_outputs, small_grads) = results
        largest = max(t.numel() for t in S.floats(dict(large.inputs)) + outputs)
        assert largest > elements
        for actual, expected in zip([large.part(out) for out in outputs], small_outputs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        for part, grad, expected in zip(large.grad_parts, grads, small_grads, strict=True):
            torch.testing.assert_close(part(grad), expected)


@pytest.mark.gpu
@every_backend
def test_device_that_is_not_current(spec):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(0):
        S.check_parity(spec, first_sample(spec, torch.device("cuda", 1)))


@pytest.mark.gpu
@every_backend
def test_no_synchronisation(spec):
    sample = first_sample(spec, CUDA)
    incoming = S.incoming_gradients(S.run(spec, spec.operator, sample).outputs) if sample.differentiable else None
    inputs = S.fresh(sample)
    leaves = S.floats([inputs[name] for name in sample.differentiable])
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = spec.operator(**inputs)
        if incoming is not None:
            S.gradients(pytree.tree_leaves(result), leaves, incoming)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@every_backend
def test_cuda_graph_replays_with_new_inputs(spec):
    """Captured once, replayed on other values in the same places."""
    sample = first_sample(spec, CUDA)
    inputs = S.clone_tensors(dict(sample.inputs))
    tensors = S.floats(inputs)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            spec.operator(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = spec.operator(**inputs)
        for tensor, original in zip(tensors, S.floats(dict(sample.inputs)), strict=True):
            tensor.copy_(original.flip(0) if original.ndim else original)
        expected = S.run(spec, spec.operator, replace(sample, inputs=S.clone_tensors(inputs))).outputs
        graph.replay()
    outputs = pytree.tree_leaves(tuple(inputs[name] for name in spec.mutates) if spec.mutates else result)
    for actual, wanted in zip([o for o in outputs if o is not None], expected, strict=True):
        torch.testing.assert_close(actual, wanted)
