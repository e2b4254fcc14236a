"""Visible tokens back on the patch grid, noise at the masked places."""

from cat_kernels.restore.op import restore_tokens
from cat_kernels.restore.reference import restore_tokens_reference

__all__ = ["restore_tokens", "restore_tokens_reference"]
