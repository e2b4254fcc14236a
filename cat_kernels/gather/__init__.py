"""Visible tokens + positions + CLS row, in one pass."""

from cat_kernels.gather.op import gather_tokens
from cat_kernels.gather.reference import gather_tokens_reference

__all__ = ["gather_tokens", "gather_tokens_reference"]
