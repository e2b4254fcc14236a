"""Multiply-adds of a call, counted on tensors without storage."""

from __future__ import annotations

from collections.abc import Callable

from cat.training.flops import flops


def multiply_adds(call: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention in ``call`` (elementwise work is not counted)."""
    return flops(call) // 2
