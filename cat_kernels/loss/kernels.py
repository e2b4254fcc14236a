"""`masked_regression_loss` in Triton: loss, deviations and gradient in one pass over predictions and targets.

A program of one warp takes some channels of a row at a time, reads the targets once and goes through the clones, past
those that do not mask the patch. Every channel keeps sums of differences from one of the tokens and of their
squares: as exact as Welford's running means, however far a channel's mean is from zero, in half the instructions.
Nothing is exchanged between threads before the end; the programs are merged in a fixed order.

Shapes: B clips, M masks a clip, N = B * M, L patches, K visible ones, D width; R = B * L rows of targets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import Ahead, launch, padded

FLAGS = 256  # patches of a program that marks masked ones
LISTED = 32  # visible patches that it compares with at once
MERGED = 32  # channels, and programs at once, of a program that merges sums
SCALED = 2048  # elements of a program that scales a gradient


def config(D: int) -> dict[str, int]:
    """8 channels for each thread of one warp, 512 contiguous bytes in bf16; two more clones on their way. With one row
    and one warp, whether a patch is masked is a branch, and nobody waits for another warp."""
    return {"BLOCK_D": min(256, padded(D)), "BLOCK_L": 512, "STAGES": 3, "num_warps": 1}


def held(major: int, smooth: bool) -> int:
    """Programs that run at once on a multiprocessor of this compute capability, by registers: 96, or up to 123."""
    return 20 if major in (9, 10) and not smooth else 16


def programs(device: torch.device, smooth: bool) -> int:
    """That share rows and channels: as many as run at once. Their sums are 11 MB at the base width on an H200."""
    if device.type != "cuda":
        return 4  # the interpreter takes them one by one
    chip = torch.cuda.get_device_properties(device)
    return held(chip.major, smooth) * int(chip.multi_processor_count)


def config_backward(D: int) -> dict[str, int]:
    """A tile of 1024 elements, 8 for each thread of 4 warps."""
    BLOCK_D = min(256, padded(D))
    return {"BLOCK_R": 1024 // BLOCK_D, "BLOCK_D": BLOCK_D, "STAGES": 3, "num_warps": 4}


# --- masked patches ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["L", "K"])
def _flags(visible_ptr, masked_ptr, L, K, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr):
    blocks = tl.cdiv(L, BLOCK_L)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    patches = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    seen = tl.zeros((BLOCK_L,), tl.int32)
    for first in range(0, K, BLOCK_K):
        listed = first + tl.arange(0, BLOCK_K)
        visible = tl.load(visible_ptr + n * K + listed, listed < K, -1)
        seen = tl.maximum(seen, tl.max((patches[:, None] == visible).to(tl.int32), 1))
    tl.store(masked_ptr + n * L + patches, 1 - seen, patches < L)


def flags(visible: Tensor, L: int) -> Tensor:
    """(N, K) int64 -> (N, L) int8, 1 where a patch is not listed."""
    N, K = visible.shape
    masked = visible.new_empty((N, L), dtype=torch.int8)
    launch(_flags, (N * triton.cdiv(L, FLAGS),), visible.contiguous(), masked, L, K, BLOCK_L=FLAGS, BLOCK_K=LISTED)
    return masked


# --- the distance -----------------------------------------------------------------------------------------------------


@triton.jit
def _distance(difference, beta, SMOOTH: tl.constexpr):
    if SMOOTH:
        size = tl.abs(difference)
        result = tl.where(size < beta, difference * difference / (2 * beta), size - beta / 2)
    else:
        result = difference * difference
    return result


@triton.jit
def _slope(difference, beta, SMOOTH: tl.constexpr):
    if SMOOTH:
        # Written so that a NaN stays one.
        inside = tl.where(difference > beta, 1.0, difference / beta)
        result = tl.where(difference < -beta, -1.0, inside)
    else:
        result = 2 * difference
    return result


@triton.jit
def _scaled_slope(difference, beta, scale, SMOOTH: tl.constexpr):
    if SMOOTH:
        result = _slope(difference, beta, SMOOTH) * scale
    else:
        result = difference * (2 * scale)
    return result


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _first_masked(masked_ptr, L, BLOCK_L: tl.constexpr):
    """The first of a clone's L patches that is masked, or L."""
    found = L
    for first in range(0, L, BLOCK_L):
        l = first + tl.arange(0, BLOCK_L)
        masked = tl.load(masked_ptr + l, l < L, 0) != 0
        found = tl.minimum(found, tl.min(tl.where(masked, l, L)))
    return found


@triton.jit
def _moments(total, squares, count):
    """Mean, and sum of squared deviations from it, of numbers with this sum and sum of squares."""
    mean = total / tl.maximum(count, 1)
    around = squares - total * mean
    return mean, tl.where(around < 0, 0.0, around)  # a NaN stays one


@triton.jit(do_not_specialize=["R", "L", "M", "beta", "scale"])
def _forward(
    p_ptr,
    y_ptr,
    masked_ptr,
    gradient_ptr,
    loss_ptr,
    count_ptr,
    sums_ptr,
    p_n,
    p_l,
    p_d,
    y_b,
    y_l,
    y_d,
    R,
    L,
    M,
    beta,
    scale,
    D: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    # The chunks of a row are neighbours, so that they are read at the same time.
    program = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    programs = tl.num_programs(0) // CHUNKS
    d = (chunk * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    in_D = d < D
    # Differences are taken from the first token that the first clone masks. There is one, or nothing is masked at all.
    first = L
    if M > 0:
        first = _first_masked(masked_ptr, L, BLOCK_L)
    found = (first < L) & in_D
    p_shift = tl.load(p_ptr + first.to(tl.int64) * p_l + d * p_d, found, 0.0).to(tl.float32)
    y_shift = tl.load(y_ptr + first.to(tl.int64) * y_l + d * y_d, found, 0.0).to(tl.float32)
    loss = tl.zeros((BLOCK_D,), tl.float32)
    p_total = tl.zeros((BLOCK_D,), tl.float32)
    p_squares = tl.zeros((BLOCK_D,), tl.float32)
    y_total = tl.zeros((BLOCK_D,), tl.float32)
    y_squares = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.full((), 0, tl.int32)
    b = program // L
    l = program % L
    for _ in range(program, R, programs):
        clip = b.to(tl.int64)
        patch = l.to(tl.int64)
        y = tl.load(y_ptr + clip * y_b + patch * y_l + d * y_d, in_D, 0.0).to(tl.float32)
        masked_row = masked_ptr + clip * M * L + patch
        p_row = p_ptr + clip * M * p_n + patch * p_l
        gradient_row = gradient_ptr + (clip * M * L + patch) * D
        before = count
        for m in tl.range(M, num_stages=STAGES):
            masked = tl.load(masked_row + m * L) != 0
            p = tl.load(p_row + tl.full((), m, tl.int64) * p_n + d * p_d, masked & in_D, 0.0)
            at = tl.full((), m * L, tl.int64) * D + d
            if masked:
                difference = p.to(tl.float32) - y
                loss += _distance(difference, beta, SMOOTH)
                if GRADIENT:
                    tl.store(gradient_row + at, _scaled_slope(difference, beta, scale, SMOOTH), in_D)
                apart = p.to(tl.float32) - p_shift
                p_total += apart
                p_squares += apart * apart
                count += 1
            else:
                if GRADIENT:
                    tl.store(gradient_row + at, tl.zeros((BLOCK_D,), tl.float32), in_D)
        # The target counts as often as a clone masks it.
        times = count - before
        if times > 0:
            apart = y - y_shift
            weighted = times.to(tl.float32) * apart
            y_total += weighted
            y_squares += weighted * apart
        # The row `programs` on, without a division.
        b += programs // L
        l += programs % L
        if l >= L:
            b += 1
            l -= L
    tl.store(loss_ptr + tl.program_id(0), tl.sum(loss))
    total = count.to(tl.float32)
    tl.store(count_ptr + program, total, chunk == 0)
    p_mean, p_around = _moments(p_total, p_squares, total)
    y_mean, y_around = _moments(y_total, y_squares, total)
    out = program * D + d
    stride = programs * D
    tl.store(sums_ptr + out, p_mean, in_D)
    tl.store(sums_ptr + stride + out, p_around, in_D)
    tl.store(sums_ptr + 2 * stride + out, y_mean, in_D)
    tl.store(sums_ptr + 3 * stride + out, y_around, in_D)


@triton.jit(do_not_specialize=["programs", "degrees", "eps"])
def _merge(
    count_ptr,
    sums_ptr,
    deviation_ptr,
    programs,
    degrees,
    eps,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Deviation of some channels: of predictions (program_id(1) = 0) or targets (1). Means are of differences from the
    same token."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    kind = tl.program_id(1)
    mean_ptr = sums_ptr + 2 * kind * programs * D
    squares_ptr = mean_ptr + programs * D
    total = tl.zeros((BLOCK_P,), tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        count = tl.load(count_ptr + program, program < programs, 0.0)
        read = (program < programs)[:, None] & (d < D)
        total += count
        sums += count[:, None] * tl.load(mean_ptr + (program * D)[:, None] + d, read, 0.0)
    mean = tl.sum(sums, 0) / tl.maximum(tl.sum(total), 1)
    squares = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        count = tl.load(count_ptr + program, program < programs, 0.0)
        read = (program < programs)[:, None] & (d < D)
        apart = tl.load(mean_ptr + (program * D)[:, None] + d, read, 0.0) - mean
        squares += tl.load(squares_ptr + (program * D)[:, None] + d, read, 0.0) + count[:, None] * apart * apart
    tl.store(deviation_ptr + kind * D + d, tl.sqrt(tl.sum(squares, 0) / degrees + eps), d < D)


@triton.jit(do_not_specialize=["parts", "scale"])
def _finish(losses_ptr, deviation_ptr, loss_ptr, p_ptr, y_ptr, parts, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    loss = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        loss += tl.load(losses_ptr + part, part < parts, 0.0)
    tl.store(loss_ptr, tl.sum(loss) * scale)
    p = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        p += tl.load(deviation_ptr + d, d < D, 0.0)
        y += tl.load(deviation_ptr + D + d, d < D, 0.0)
    tl.store(p_ptr, tl.sum(p) / D)
    tl.store(y_ptr, tl.sum(y) / D)


def forward(
    prediction: Tensor, target: Tensor, visible: Tensor, beta: float, scale: float, eps: float, gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the deviations of predictions and targets, 0-dim float32.

    prediction (N, L, D), target (B, L, D): any strides. visible: (N, K) int64. scale: of the sum of distances.
    gradient: (N, L, D) contiguous, receives the loss's gradient with respect to prediction.
    """
    N, L, D = prediction.shape
    B = target.shape[0]
    options = config(D)
    chunks = triton.cdiv(D, options["BLOCK_D"])
    sharing = max(1, min(programs(prediction.device, beta > 0) // chunks, B * L))
    losses, count, sums, deviation, loss, p, y = (
        prediction.new_empty(shape, dtype=torch.float32)
        for shape in ((sharing * chunks,), (sharing,), (4, sharing, D), (2, D), (), (), ())
    )
    launch(
        _forward,
        (sharing * chunks,),
        prediction,
        target,
        flags(visible, L),
        prediction if gradient is None else gradient,
        losses,
        count,
        sums,
        *prediction.stride(),
        *target.stride(),
        B * L,
        L,
        N // max(B, 1),
        beta,
        scale,
        D=D,
        SMOOTH=beta > 0,
        GRADIENT=gradient is not None,
        **options,
    )
    degrees = float(max(N * (L - visible.shape[1]) - 1, 1))
    grid = (triton.cdiv(D, MERGED), 2)
    launch(_merge, grid, count, sums, deviation, sharing, degrees, eps, D=D, BLOCK_P=MERGED, BLOCK_D=MERGED)
    launch(_finish, (1,), losses, deviation, loss, p, y, sharing * chunks, scale, D=D, BLOCK=512)
    return loss, p, y


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "L", "M", "beta", "scale"])
def _backward(
    grad_ptr,
    p_ptr,
    y_ptr,
    masked_ptr,
    dp_ptr,
    dy_ptr,
    p_n,
    p_l,
    p_d,
    y_b,
    y_l,
    y_d,
    R,
    L,
    M,
    beta,
    scale,
    D: tl.constexpr,
    SMOOTH: tl.constexpr,
    OF_PREDICTION: tl.constexpr,
    OF_TARGET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d = (tl.program_id(0) % CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    row = (tl.program_id(0) // CHUNKS).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = row // L
    l = row % L
    inside = (row < R)[:, None] & (d < D)
    factor = tl.load(grad_ptr).to(tl.float32) * scale
    y = tl.load(y_ptr + (b * y_b + l * y_l)[:, None] + d * y_d, inside, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for m in tl.range(M, num_stages=STAGES):
        n = b * M + m
        read = (tl.load(masked_ptr + n * L + l, row < R, 0) != 0)[:, None] & inside
        p = tl.load(p_ptr + (n * p_n + l * p_l)[:, None] + d * p_d, read, 0.0).to(tl.float32)
        slope = tl.where(read, _slope(p - y, beta, SMOOTH), 0.0)
        if OF_PREDICTION:
            tl.store(dp_ptr + ((n * L + l) * D)[:, None] + d, slope * factor, inside)
        if OF_TARGET:
            total += slope
    if OF_TARGET:
        tl.store(dy_ptr + (row * D)[:, None] + d, -total * factor, inside)


def backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    visible: Tensor,
    beta: float,
    scale: float,
    dp: Tensor | None,
    dy: Tensor | None,
) -> None:
    """Gradients for the incoming `grad` (0-dim) into dp (N, L, D) and dy (B, L, D), contiguous, where given."""
    N, L, D = prediction.shape
    B = target.shape[0]
    options = config_backward(D)
    launch(
        _backward,
        (triton.cdiv(B * L, options["BLOCK_R"]) * triton.cdiv(D, options["BLOCK_D"]),),
        grad,
        prediction,
        target,
        flags(visible, L),
        grad if dp is None else dp,
        grad if dy is None else dy,
        *prediction.stride(),
        *target.stride(),
        B * L,
        L,
        N // max(B, 1),
        beta,
        scale,
        D=D,
        SMOOTH=beta > 0,
        OF_PREDICTION=dp is not None,
        OF_TARGET=dy is not None,
        **options,
    )


@triton.jit(do_not_specialize=["size"])
def _scale(gradient_ptr, grad_ptr, out_ptr, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    grad = tl.load(grad_ptr).to(tl.float32)
    if (grad != 1.0) or not IN_PLACE:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        at = first + tl.arange(0, BLOCK)
        if first + BLOCK <= size:  # with a mask, nothing would be known of neighbours, and every element go alone
            tl.store(out_ptr + at, tl.load(gradient_ptr + at).to(tl.float32) * grad)
        else:
            gradient = tl.load(gradient_ptr + at, at < size, 0.0).to(tl.float32)
            tl.store(out_ptr + at, gradient * grad, at < size)


def scale(gradient: Tensor, grad: Tensor, out: Tensor) -> None:
    """out = gradient * grad, a 0-dim tensor on the device; in place where out is gradient, and at 1 at once done."""
    size = gradient.numel()
    in_place = out.data_ptr() == gradient.data_ptr()
    launch(_scale, (triton.cdiv(size, SCALED),), gradient, grad, out, size, IN_PLACE=in_place, BLOCK=SCALED)


def ahead(dtype: str = "bf16", architecture: int = 90) -> list[Ahead]:
    """The instantiations of the base model: predictions in `dtype`, targets in float32."""
    D = 768
    options, options_backward = config(D), config_backward(D)
    sizes: dict[str, Any] = {"D": D, **{name: options.pop(name) for name in ("BLOCK_D", "BLOCK_L", "STAGES")}}
    sizes_backward = {"D": D, **{name: options_backward.pop(name) for name in ("BLOCK_R", "BLOCK_D", "STAGES")}}
    ends = dict.fromkeys(("R", "L", "M"), "i32") | {"beta": "fp32", "scale": "fp32"}
    contiguous = {"p_n": 512 * D, "p_l": D, "p_d": 1, "y_b": 512 * D, "y_l": D, "y_d": 1}
    read = {"p_ptr": f"*{dtype}", "y_ptr": "*fp32", "masked_ptr": "*i8"}
    outs = dict.fromkeys(("loss_ptr", "count_ptr", "sums_ptr"), "*fp32")
    forward = {**read, "gradient_ptr": f"*{dtype}", **outs, **ends}
    backward = {"grad_ptr": "*fp32", **read, "dp_ptr": f"*{dtype}", "dy_ptr": "*fp32", **ends}
    found = [
        Ahead(
            f"forward{' smooth' * smooth}{' gradient' * gradient}",
            _forward,
            forward,
            {**sizes, **contiguous, "SMOOTH": smooth, "GRADIENT": gradient},
            options,
        )
        for smooth, gradient in ((False, False), (False, True), (True, True))
    ]
    for of_prediction, of_target in ((True, False), (False, True)):
        constexprs = {**sizes_backward, **contiguous, "SMOOTH": False}
        constexprs |= {"OF_PREDICTION": of_prediction, "OF_TARGET": of_target}
        name = "backward prediction" if of_prediction else "backward target"
        found.append(Ahead(name, _backward, backward, constexprs, options_backward))
    merged = {"count_ptr": "*fp32", "sums_ptr": "*fp32", "deviation_ptr": "*fp32"}
    merged |= {"programs": "i32", "degrees": "fp32", "eps": "fp32"}
    found.append(Ahead("merge", _merge, merged, {"D": D, "BLOCK_P": MERGED, "BLOCK_D": MERGED}, {}))
    finish = dict.fromkeys(("losses_ptr", "deviation_ptr", "loss_ptr", "p_ptr", "y_ptr"), "*fp32")
    found.append(Ahead("finish", _finish, finish | {"parts": "i32", "scale": "fp32"}, {"D": D, "BLOCK": 512}, {}))
    scaled = {"gradient_ptr": f"*{dtype}", "grad_ptr": "*fp32", "out_ptr": f"*{dtype}", "size": "i32"}
    found.append(Ahead("scale", _scale, scaled, {"IN_PLACE": True, "BLOCK": SCALED}, {}))
    flags = {"visible_ptr": "*i64", "masked_ptr": "*i8", "L": "i32", "K": "i32"}
    found.append(Ahead("flags", _flags, flags, {"BLOCK_L": FLAGS, "BLOCK_K": LISTED}, {}))
    return found
