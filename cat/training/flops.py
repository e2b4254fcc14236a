"""Multiply-adds of an update, counted on tensors without storage, and how many a GPU does in a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_kernels._ops import ops


def _convolution_backward(
    grad_out: tuple[int, ...],
    x: tuple[int, ...],
    weight: tuple[int, ...],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """2 FLOPs for every output position and weight it meets, once for each gradient asked for.

    PyTorch's own formula takes a grouped convolution for a full one when it counts the gradient of its weight.
    """
    per_gradient = 2 * torch.Size(grad_out).numel() * (torch.Size(weight).numel() // weight[0])
    output_mask = args[-1]
    return per_gradient * sum(bool(wanted) for wanted in output_mask[:2])


def _bmm(a: tuple[int, ...], b: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """PyTorch's own takes the dtype of a float32 sum for a shape."""
    return 2 * torch.Size(a).numel() * b[-1]


def _grouped_conv2d(x: tuple[int, ...], weight: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(x[:3]).numel() * torch.Size(weight).numel()


def _grouped_conv2d_backward(
    grad_out: tuple[int, ...], x: tuple[int, ...], weight: tuple[int, ...], groups: int, *wanted: bool, **kwargs: Any
) -> int:
    return _grouped_conv2d(x, weight) * sum(wanted[:2])


# In place of PyTorch's own, or for operators of ours that do products in one kernel; of shapes.
FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.bmm: _bmm,
    torch.ops.aten.convolution_backward: _convolution_backward,
    ops.grouped_conv2d: _grouped_conv2d,
    ops.grouped_conv2d_backward: _grouped_conv2d_backward,
}


def flops(call: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention in ``call``, two a multiply-add; elementwise work is not
    counted."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


# Dense peak rates by the makers' data sheets, FLOP/s in bf16 and fp16 with sums in float32. The first name that a GPU's
# has in it counts.
PEAKS = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_rate(device: torch.device, precision: str) -> float | None:
    """FLOP/s that this device's matrix units reach at most; None where that is not known, as in float32."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in PEAKS.items() if known in name), None)
