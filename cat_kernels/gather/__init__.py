"""Visible tokens + positions + CLS row, in one pass."""

from .op import gather_tokens
from .reference import gather_tokens_reference

__all__ = ["gather_tokens", "gather_tokens_reference"]
