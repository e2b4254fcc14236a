"""Whether gradients of our own may stand in for PyTorch's."""

import torch
from torch.autograd import forward_ad


def records_gradients() -> bool:
    """PyTorch runs eagerly and records what a backward needs. What compiles, exports, traces or transforms
    (`torch.func`, forward mode) sees PyTorch's operations, not ours."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return torch.is_grad_enabled() and not transformed
