"""Visible tokens back on the patch grid, noise at the masked places."""

from .op import restore_tokens
from .reference import restore_tokens_reference

__all__ = ["restore_tokens", "restore_tokens_reference"]
