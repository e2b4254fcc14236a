"""For a script in a process of its own. After this is imported the Triton backend takes CPU tensors, and where a kernel
would be launched it is compiled, for a GPU that is not there. Results are whatever memory held."""

import triton
from triton.backends.compiler import GPUTarget

from cat_kernels import _triton, backends


class _Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)


kernels = set()


def _compile(kernel, grid, *args, **meta):
    kernels.add(kernel)
    kernel.warmup(*args, grid=tuple(grid), **meta)


def instantiations() -> int:
    """How many have been compiled so far."""
    return sum(len(kernel.device_caches[0][0]) for kernel in kernels)


triton.runtime.driver.set_active(_Driver())
_triton.launch = _compile  # before the kernels' modules take it from there
backends.INTERPRETED = True
