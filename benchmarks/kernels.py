"""Each kernel of the stem alone, at a model's sizes: as fused kernel, as PyTorch's operations, and as both.

    python -m benchmarks.kernels            # 96 clips on a GPU, one on a CPU; base model, 4 masks

Candidates: "triton" is the kernel that the stem runs. "pytorch" is the same result by PyTorch's operations, that is by
the vendor's libraries. "triton, cublas" is a chain that holds a matrix product with the product left to the library and
the rest in kernels. "pytorch" alone: plain products and sums, which the stem leaves to the library too. Which is faster
decides which the stem should use.

A kernel's least bytes are its arguments and its results, each once; its multiply-adds are PyTorch's. ``forward`` and
``backward`` say how often the stem's passes run it: `benchmarks.predict` adds them up.

Shapes: N clone rows, K visible patches each, p x p positions a patch, R = N * K * p * p rows, c channels.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import composed
from benchmarks.composed import EPS
from benchmarks.flops import multiply_adds
from benchmarks.results import Key, Results
from benchmarks.runner import DTYPES, Case, Groups, Settings, arguments, finish, floor_ms, reason, run_case, say
from benchmarks.stem import sizes, stem_inputs
from cat_kernels.stem.layout import block_places, halo_rows, strides

CHECKED_CLIPS = 4  # in float64, of which a GPU has few units
RADIUS, BLOCKS = 2, 2  # of the 5x5, conv blocks a stage
MIXED = "triton, cublas"
PROVIDERS = ("pytorch", "triton", MIXED)


@dataclass(frozen=True)
class Kernel:
    """One kernel of the stem with what it is compared with. The callables take ``inputs`` in order."""

    name: str  # that of the compiled instantiation (`ahead()`), where it is one of ours
    inputs: tuple[Tensor | None, ...]  # rows and matrices in the precision measured, vectors in float32
    pytorch: Callable[..., Any]
    triton: Callable[..., Any] | None = None
    mixed: Callable[..., Any] | None = None
    forward: int = 0  # times in a stem's forward,
    backward: int = 0  # and in its backward
    scalar: dict[str, int] = field(default_factory=dict)  # elements that go through "gelu", "depthwise", ...
    scratch: int = 0  # bytes of hidden layer a row, where the stem takes a slice of rows at a time

    def providers(self) -> dict[str, Callable[..., Any]]:
        found = dict(zip(PROVIDERS, (self.pytorch, self.triton, self.mixed), strict=True))
        return {name: function for name, function in found.items() if function is not None}

    def work(self) -> tuple[int, int]:
        """Bytes that must move, multiply-adds of matrix products and convolutions; nothing is computed for it."""
        given = [t if t is None else t.to("meta") for t in self.inputs]
        precision = next(t.dtype for t in given if t is not None and t.is_floating_point())
        inputs = converted(given, precision)
        results = tensors(self.pytorch(*inputs))
        moved = sum(t.numel() * t.element_size() for t in (*given, *results) if t is not None)
        return moved, multiply_adds(lambda: self.pytorch(*inputs))


def tensors(results: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]


# ---------------------------------------------------------------- in Triton, and with the library's products


def ours(function: str) -> Callable[..., Any]:
    """`cat_kernels.stem.kernels.<module>.<function>`, imported when it is called: it needs Triton."""
    module, name = function.split(".")

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(f"cat_kernels.stem.kernels.{module}"), name)(*args, **options)

    return call


def norm_linear_mixed(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(ours("rows.layer_norm")(x, ln_weight, ln_bias, EPS), weight, bias.to(x.dtype))


def conv_linear_mixed(
    x: Tensor, y: Tensor, halo: Tensor, places: Tensor, taps: Tensor, taps_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    return torch.addmm(x + bias.to(x.dtype), ours("conv.depthwise")(y, halo, places, taps, taps_bias), weight.t())


def norm_mlp_mixed(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor, b2: Tensor
) -> Tensor:
    pre = F.linear(ours("rows.layer_norm")(x, ln_weight, ln_bias, EPS), fc1, b1.to(x.dtype))
    return torch.addmm(x + b2.to(x.dtype), F.gelu(pre), fc2.t())


# ---------------------------------------------------------------- the list


@dataclass(frozen=True)
class Maker:
    """Random arguments."""

    device: torch.device
    dtype: torch.dtype

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def matrix(self, n: int, k: int) -> Tensor:
        return self.rows(n, k) * k**-0.5

    def vector(self, *shape: int) -> Tensor:
        """In float32, but numbers that ``dtype`` has: all candidates start from the same."""
        return (0.5 * self.rows(*shape)).float()


def kernels(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Iterator[Kernel]:
    """In the order of a stem's forward, each with its backward; one at a time in memory.

    ``shape["masks"]`` 0: dense input, all patches of every clip once.
    """
    config, make = sizes(shape), Maker(device, dtype)
    factors, P = strides(config.resolutions), config.resolutions[-1]
    spec, visible = stem_inputs(shape, torch.device("cpu"))
    grid = (spec.shape[2] // P, spec.shape[3] // P)
    if visible is None:
        visible = torch.arange(grid[0] * grid[1]).expand(spec.shape[0], -1)
    spec, visible = spec.to(device, dtype), visible.to(device)
    patches = visible.numel()
    widths = (*config.channels, config.embed_dim)
    yield from pixel_kernels(spec, visible, config.resolutions, widths[0], make)
    for i, c in enumerate(widths):
        p = P // config.resolutions[i]
        if i:
            inner = widths[i - 1] * factors[i] ** 2
            yield from products(f"embed {i}", patches * p * p, inner, c, make, passes=(1, 1, 1))
        last = i == len(widths) - 1
        yield from norm_kernels(patches * p * p, c, make, embedding=i > 0, blocks=not last)
        if last:
            break
        coarser = factors[:i:-1]
        halo = halo_rows(visible, grid, coarser, RADIUS)
        halo = torch.where(halo == patches * p * p, -1, halo).int()
        yield from block_kernels(halo, block_places(coarser, device).int(), c, make)
        yield from products(f"side {i}", patches, p * p * c, config.embed_dim, make, passes=(1, 1, 1))
        yield Kernel(  # what the next embedding and the side output send back
            f"sum of gradients c={c} p={p}",
            (make.rows(patches * p * p, c), make.rows(patches * p * p, c)),
            pytorch=torch.add,
            backward=1,
        )
    yield from products("last Linear", patches, config.embed_dim, config.embed_dim, make, passes=(1, 1, 1))


def pixel_kernels(spec: Tensor, visible: Tensor, resolutions: Any, c: int, make: Maker) -> Iterator[Kernel]:
    r0, P = resolutions[0], resolutions[-1]
    inner, R = r0 * r0, visible.numel() * (P // r0) ** 2
    weights = (make.matrix(c, inner), make.vector(c), make.vector(c))
    last = make.vector(c)
    rows = {"norm": R * c}
    triton = ours("pixels.embed_pixels")
    yield Kernel(
        f"embed r0={r0} c={c}",
        (spec, visible, *weights, last),
        pytorch=functools.partial(composed.embed_pixels, resolutions=resolutions),
        triton=functools.partial(triton, resolutions=resolutions, eps=EPS),
        forward=1,
        scalar=rows,
    )
    backward = functools.partial(
        ours("pixels.embed_pixels_backward"), resolutions=resolutions, eps=EPS, need_pixels=False
    )
    yield Kernel(
        f"backward_weight r0={r0} c={c}",
        (make.rows(R, c), spec, visible, *weights),
        pytorch=functools.partial(composed.embed_pixels_backward, resolutions=resolutions),
        triton=backward,
        backward=1,
        scalar={"norm_backward": R * c},
    )


def norm_kernels(R: int, c: int, make: Maker, *, embedding: bool, blocks: bool) -> Iterator[Kernel]:
    """Of an embedding, and of its stage's blocks: their backward runs LayerNorm again, in front of products."""
    again = 2 * BLOCKS * blocks
    yield Kernel(
        f"layer_norm c={c}",
        (make.rows(R, c), make.vector(c), make.vector(c)),
        pytorch=composed.layer_norm,
        triton=functools.partial(ours("rows.layer_norm"), eps=EPS),
        forward=int(embedding),
        backward=again,
        scalar={"norm": R * c},
    )
    triton = ours("rows.layer_norm_backward")
    yield Kernel(
        f"layer_norm_backward c={c}",
        (make.rows(R, c), make.rows(R, c), make.vector(c), make.rows(R, c)),
        pytorch=composed.layer_norm_backward,
        triton=lambda grad, x, weight, residual: triton(grad, x, weight, EPS, residual),
        backward=embedding + again,
        scalar={"norm_backward": R * c},
    )


def block_kernels(halo: Tensor, places: Tensor, c: int, make: Maker) -> Iterator[Kernel]:
    """The conv blocks of one stage."""
    S, h = places.numel(), 4 * c
    R, p = halo.shape[0] * S, math.isqrt(places.numel())
    norm = lambda: (make.vector(c), make.vector(c))  # noqa: E731
    taps = lambda: make.vector(c, (2 * RADIUS + 1) ** 2)  # noqa: E731
    yield Kernel(
        f"norm_linear c={c}",
        (make.rows(R, c), *norm(), make.matrix(c, c), make.vector(c)),
        pytorch=composed.norm_linear,
        triton=functools.partial(ours("linear.norm_linear"), eps=EPS),
        mixed=norm_linear_mixed,
        forward=BLOCKS,
        scalar={"norm": 3 * R * c},
    )
    yield Kernel(
        f"conv_linear_residual c={c} p={p}",
        (make.rows(R, c), make.rows(R, c), halo, places, taps(), make.vector(c), make.matrix(c, c), make.vector(c)),
        pytorch=composed.conv_linear_residual,
        triton=ours("conv.conv_linear_residual"),
        mixed=conv_linear_mixed,
        forward=BLOCKS,
        scalar={"depthwise": R * c},
    )
    mlp = (*norm(), make.matrix(h, c), make.vector(h), make.matrix(c, h))
    yield Kernel(
        f"norm_mlp_residual c={c}",
        (make.rows(R, c), *mlp, make.vector(c)),
        pytorch=composed.norm_mlp_residual,
        triton=functools.partial(ours("mlp.norm_mlp_residual"), eps=EPS),
        mixed=norm_mlp_mixed,
        forward=BLOCKS,
        scalar={"norm": R * c, "gelu": R * h},
    )
    yield Kernel(  # the whole of it; its parts are those that follow
        f"norm_mlp_backward c={c}",
        (make.rows(R, c), make.rows(R, c), *mlp),
        pytorch=composed.norm_mlp_backward,
        triton=functools.partial(ours("mlp.norm_mlp_backward"), eps=EPS),
    )
    scratch = 2 * h * make.dtype.itemsize
    yield Kernel(
        f"gelu_backward h={h}",
        (make.rows(R, h), make.rows(R, h)),
        pytorch=composed.gelu_backward,
        triton=ours("mlp.gelu_backward"),
        backward=BLOCKS,
        scalar={"gelu_backward": R * h},
        scratch=scratch,
    )
    again = make.rows(R, c), make.matrix(h, c), make.vector(h)
    yield Kernel(f"fc1, {c} to {h}: again", again, pytorch=F.linear, backward=BLOCKS, scratch=scratch)
    yield from products("fc1", R, c, h, make, passes=(0, BLOCKS, BLOCKS), scratch=scratch)
    yield from products("fc2", R, h, c, make, passes=(0, BLOCKS, BLOCKS), scratch=scratch)
    yield Kernel(
        f"depthwise c={c} p={p}",
        (make.rows(R, c), halo, places, taps(), make.vector(c)),
        pytorch=composed.depthwise,
        triton=ours("conv.depthwise"),
        backward=BLOCKS,
        scalar={"depthwise": R * c},
    )
    transposed = ours("conv.depthwise")
    yield Kernel(
        f"depthwise transposed c={c} p={p}",
        (make.rows(R, c), halo, places, taps()),
        pytorch=composed.depthwise_transposed,
        triton=lambda grad, halo, places, taps: transposed(grad, halo, places, taps, None, transpose=True),
        backward=BLOCKS,
        scalar={"depthwise": R * c},
    )
    yield Kernel(
        f"depthwise_backward_weight c={c} p={p}",
        (make.rows(R, c), make.rows(R, c), halo, places),
        pytorch=composed.depthwise_backward_weight,
        triton=functools.partial(ours("conv.depthwise_backward_weight"), kernel_size=2 * RADIUS + 1),
        backward=BLOCKS,
        scalar={"depthwise": R * c},
    )
    yield from products("1x1", R, c, c, make, passes=(0, 2 * BLOCKS, 2 * BLOCKS))
    yield Kernel(
        f"sum of rows c={c}",
        (make.rows(R, c),),
        pytorch=lambda grad: grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)),
        backward=BLOCKS,
    )


def products(
    what: str, R: int, inner: int, outer: int, make: Maker, *, passes: tuple[int, int, int], scratch: int = 0
) -> Iterator[Kernel]:
    """A linear layer by the library: forward, gradient of its input, gradient of its weight; how often each is run."""
    forward, dinput, dweight = passes
    name = f"{what}, {inner} to {outer}"
    if forward:
        weights = make.matrix(outer, inner), make.vector(outer)
        yield Kernel(name, (make.rows(R, inner), *weights), pytorch=F.linear, forward=forward)
    if dinput:
        both = make.rows(R, outer), make.matrix(outer, inner)
        yield Kernel(f"{name}: input's gradient", both, pytorch=torch.matmul, backward=dinput, scratch=scratch)
    if dweight:
        both = make.rows(R, outer), make.rows(R, inner)
        weight = composed.weight_gradient
        yield Kernel(f"{name}: weight's gradient", both, pytorch=weight, backward=dweight, scratch=scratch)


# ---------------------------------------------------------------- measuring


class KernelProvider:
    """One candidate. PyTorch's operations get vectors too in the rows' precision, as they want them."""

    def __init__(self, kernel: Kernel, name: str, dtype: torch.dtype) -> None:
        self.function = kernel.providers()[name]
        self.inputs = converted(kernel.inputs, dtype) if name == "pytorch" else kernel.inputs

    def call(self) -> object:
        with torch.no_grad():
            return self.function(*self.inputs)

    def check(self) -> Groups:
        return {str(i): [t] for i, t in enumerate(tensors(self.call()))}

    def persistent_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.inputs if t is not None)


def converted(inputs: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs)


def reference(kernel: Kernel) -> Groups:
    """By PyTorch's operations in float64, on the same numbers."""
    with torch.no_grad():
        results = tensors(kernel.pytorch(*converted(kernel.inputs, torch.float64)))
    return {str(i): [t] for i, t in enumerate(results)}


def case(kernel: Kernel, small: Kernel, dtype: str, shape: dict[str, Any], names: Sequence[str], s: Settings) -> Case:
    """``small``: the same kernel with fewer rows, which is held to float64."""
    moved, macs = kernel.work()
    copy, matrix = s.ceilings.get("copy_GBps"), floor_ms(macs, dtype, s.ceilings)
    floors = [moved / (copy * 1e9) * 1e3 if copy else None, matrix]
    work = {"bytes": moved, "multiply_adds": macs, "floor_ms": max((f for f in floors if f), default=None)}
    work |= {"per_forward": kernel.forward, "per_backward": kernel.backward}
    return Case(
        key=Key(benchmark="kernels", mode=kernel.name, dtype=dtype, shape=shape),
        providers={name: functools.partial(KernelProvider, kernel, name, DTYPES[dtype]) for name in names},
        baseline="pytorch",
        reference=lambda: reference(small),
        work=dict.fromkeys(names, work),
        checked=lambda name: KernelProvider(small, name, DTYPES[dtype]),
    )


def why_not_triton(device: torch.device) -> str | None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return None
    return "Triton's kernels need a CUDA device; the times of its interpreter mean nothing"


def run(s: Settings, only: str | None = None) -> Results:
    """``only``: part of the names of those to measure."""
    results = Results()
    missing = why_not_triton(s.device)
    if missing:
        results.notes.append(f"kernels: PyTorch's operations only: {missing}")
    shape = {"preset": s.preset, "clips": s.clips, "masks": s.masks, "frames": s.frames}
    for dtype in s.dtypes:
        torch.manual_seed(0)
        few = {**shape, "clips": min(shape["clips"], CHECKED_CLIPS)}
        pairs = zip(*(kernels(sizes, s.device, DTYPES[dtype]) for sizes in (shape, few)), strict=True)
        for kernel, small in pairs:
            if (only and only not in kernel.name) or (missing and kernel.triton is None):
                continue
            names = [name for name in kernel.providers() if name == "pytorch" or not missing]
            try:
                run_case(case(kernel, small, dtype, shape, names, s), results, s)
            except Exception as error:  # the others go on
                key = Key(benchmark="kernels", mode=kernel.name, dtype=dtype, shape=shape)
                results.reject(key, "all", reason(error))
    return results


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", help="measure kernels with this in their name")
    options = parser.parse_args()
    s = Settings.of(options, clips_cpu=1, clips_cuda=96, budget_cpu=0.5, budget_cuda=0.1)
    if options.dtypes is None:
        s.dtypes = s.dtypes[:1]
    results = run(s, options.only)
    for r in results.rows:
        share = f", {100 * r['share_of_floor']:.0f} % of the floor" if r.get("share_of_floor") else ""
        peak = f", peak {r['peak_MiB']:.0f} MiB" if r["peak_MiB"] is not None else ""
        say(f"{r['mode']} {r['dtype']} {r['provider']}: {r['median_ms']:.3f} ms{share}{peak}")
    return finish(results, s, [])


if __name__ == "__main__":
    sys.exit(main())
