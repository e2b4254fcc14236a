"""The namespace of the operators. The Hugging Face kernel hub puts a file of this name and these two names in its
place, with a namespace that is unique to the build; so nothing else in the package may name the namespace."""

import torch

ops = torch.ops.cat_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    return f"cat_kernels::{op_name}"
