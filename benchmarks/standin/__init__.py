"""A GPU that is not there: code for CUDA runs as on one, on tensors without values, and Triton compiles the kernels.

Nothing is computed. Tensors on the CPU are real, those on "cuda" have shape, dtype, strides and an address (PyTorch's
FakeTensor), so that autocast, autograd, `device.type` and Triton's specialisation (divisibility, alignment, equal to 1)
are those of a GPU, at any size. For a process of its own:

    from benchmarks import standin      # before torch is imported
    standin.install(architecture=90)
    with standin.gpu():
        ...

`gpu(strict=True)` raises where a real GPU would be waited for: a value is read, or memory is copied from or to the CPU.
Otherwise a value that is asked for is made up (1), and what depends on it takes its largest size.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def _load_guard() -> None:
    """Compile guard.cpp (seconds) and load it; PyTorch asks once, when it is imported, whether there is CUDA."""
    if "torch" in sys.modules:
        raise RuntimeError("benchmarks.standin must be imported before torch, in a process of its own")
    torch = Path(importlib.util.find_spec("torch").origin).parent
    if list((torch / "lib").glob("libtorch_cuda*")):
        raise RuntimeError(
            "this PyTorch was built with CUDA, whose place the stand-in would take; use one for the CPU: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        source = Path(__file__).with_name("guard.cpp")
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
        flags += [f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        try:
            subprocess.run(["c++", source, "-o", library, *flags], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(
                "the stand-in needs a C++ compiler, c++; on Debian and Ubuntu: apt install g++"
            ) from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"guard.cpp does not compile against this PyTorch:\n{error.stderr[-2000:]}") from None
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_load_guard()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.cuda._utils import _get_device_index  # noqa: E402
from torch.utils import _foreach_utils  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "bincount")
COPIES = ("_to_copy", "to", "copy_", "copy")


LAUNCHERS: set[str] = set()  # C sources of what Triton builds to launch each signature


class Waits(RuntimeError):
    """What a GPU would be waited for."""


class _Mode(TorchDispatchMode):
    """Fake whatever touches "cuda", real the rest; our operators run their own implementation for CUDA."""

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.fake, self.strict = FakeTensorMode(allow_non_fake_inputs=True), strict

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_gpu = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if not on_gpu and not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves):
            return func(*args, **kwargs)
        name = func.name().partition("::")[2].partition(".")[0]
        if name.startswith("_fused_"):
            return None  # an optimiser's step in place, of which PyTorch has no fake form
        if func.namespace == "cat_kernels":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        if self.strict:
            _refuse_waiting(name, leaves, args, kwargs)
        args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        try:
            with self.fake:
                return _as_cudnn(name, args, func(*args, **kwargs))
        except DataDependentOutputException:
            return self._made_up(args[0])
        except DynamicOutputShapeException:
            with self.fake:
                return _largest(name, args)

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    @staticmethod
    def _made_up(tensor: torch.Tensor) -> bool | int | float:
        return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


def _refuse_waiting(name: str, leaves: list[Any], args: Any, kwargs: Any) -> None:
    fakes = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
    masks = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in fakes[1:])
    if (name in READS and fakes) or (masks and name != "index_fill"):
        raise Waits(f"{name} reads values of a tensor on the GPU")
    if name in COPIES and not kwargs.get("non_blocking"):
        places = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim}
        places |= {leaf.device.type for leaf in args[:1]}
        to = kwargs.get("device")
        if len(places | ({to.type} if to is not None else set())) > 1:
            raise Waits(f"{name} copies between the CPU and the GPU")


def _largest(name: str, args: Any) -> Any:
    """The result of an operation whose shape depends on values, as if all were true or different."""
    first = args[0]
    if name == "nonzero":
        return first.new_empty((first.numel(), first.ndim), dtype=torch.int64)
    if name == "index":  # by one mask over the leading dimensions
        mask = next(index for index in args[1] if index is not None)
        return first.new_empty((mask.numel(), *first.shape[mask.ndim :]))
    if name == "repeat_interleave":
        return first.new_empty((first.numel(),), dtype=torch.int64)
    return first.new_empty((first.numel(),))


def _as_cudnn(name: str, args: Any, result: Any) -> Any:
    """Convolutions of channels-last images give such; PyTorch without cuDNN has no fake form of that."""
    if name not in ("convolution", "convolution_backward"):
        return result
    image = args[0 if name == "convolution" else 1]
    if image.ndim != 4 or image.is_contiguous() or not image.is_contiguous(memory_format=torch.channels_last):
        return result
    return tree_map_only(
        torch.Tensor, lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t, result
    )


def _address(tensor: FakeTensor) -> int:
    """Different for every storage, and as aligned as PyTorch's allocator makes them."""
    if tensor.numel() == 0:
        return 0
    return (tensor.untyped_storage()._cdata << 9) + tensor.storage_offset() * tensor.element_size()


class _Nothing:
    """A stream, an event, a graph: every method does nothing, every context is itself."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: 1.0

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *args: Any) -> None: ...


def _set_device(device: Any) -> None:
    _get_device_index(device)  # raises as CUDA's does: of a device without a number, say


def _fake_cuda(architecture: int) -> None:
    """`torch.cuda`, as far as this project asks it."""
    memory = 80 << 30
    properties = SimpleNamespace(
        name="stand-in", major=architecture // 10, minor=architecture % 10, multi_processor_count=132,
        total_memory=memory, max_threads_per_multi_processor=2048, warp_size=32, L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "stand-in",
        "get_device_capability": (architecture // 10, architecture % 10), "get_device_properties": properties,
        "is_initialized": False, "_lazy_init": None, "init": None, "synchronize": None,
        "empty_cache": None, "mem_get_info": (memory, memory), "is_current_stream_capturing": False,
        "is_bf16_supported": True, "get_sync_debug_mode": 0, "set_sync_debug_mode": None, "memory_allocated": 0,
        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "memory_reserved": 0, "manual_seed_all": None,
        "current_stream": _Nothing(), "default_stream": _Nothing(), "memory_stats": {},
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.set_device = _set_device
    for name in ("Stream", "Event", "CUDAGraph", "graph", "stream", "device"):
        setattr(torch.cuda, name, _Nothing)
    torch.Tensor.pin_memory = lambda self, *args: self
    torch.nn.functional.scaled_dot_product_attention = _attention
    _foreach_utils._foreach_supported_types.append(FakeTensor)  # lists go to the kernels for lists
    torch.Tensor.record_stream = lambda self, *args: None
    FakeTensor.data_ptr = _address
    FakeTensor.tolist = lambda self: torch.ones(self.shape, dtype=self.dtype).tolist()


_plain_attention = torch.nn.functional.scaled_dot_product_attention


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PyTorch's choice on a GPU in 16 bits; it asks the device, which has no answer here."""
    plain = args or any(value is not None for value in kwargs.values())
    if plain or not isinstance(q, FakeTensor) or q.element_size() != 2:
        return _plain_attention(q, k, v, *args, **kwargs)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


class _Driver:
    """Triton's: compiles for `target`, loads and launches nothing."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)
        properties = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (0, 0, 0, 0, 1024), get_device_properties=lambda device: properties
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Any:
        from triton.backends.nvidia.driver import make_launcher

        places = {(source.fn.arg_names.index(k),) if isinstance(k, str) else k: v for k, v in source.constants.items()}
        LAUNCHERS.add(make_launcher(places, dict(source.signature), getattr(metadata, "tensordesc_meta", None)))
        return lambda *args: None

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int = 0) -> int:
        return 0


def install(architecture: int = 90) -> None:
    """For the rest of this process. Compilers, which would run what they compile, hand functions back as they are."""
    import triton

    _fake_cuda(architecture)
    triton.runtime.driver.set_active(_Driver(architecture))
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") shows its copy
    torch.autograd.set_multithreading_enabled(False)  # the engine has no thread for this device
    torch.compile = lambda function=None, **options: function or (lambda f: f)
    torch.nn.Module.compile = lambda self, *args, **options: None
    torch.library.opcheck = lambda op, args, kwargs=None, **options: op(*args, **(kwargs or {}))


@contextlib.contextmanager
def gpu(*, strict: bool = False) -> Iterator[None]:
    with _Mode(strict=strict):
        yield
