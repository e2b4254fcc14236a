"""Registers, shared memory and spills of the CUDA and Triton kernels, read from the compilers; no GPU is needed."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import resources
from benchmarks.resources import Kernel, parse

SAID = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void cat::(anonymous namespace)::fbank_400<cat::Half>(cat::View)' for 'sm_90'
ptxas info    : Function properties for void cat::(anonymous namespace)::fbank_400<cat::Half>(cat::View)
    64 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 127 registers, used 1 barriers, 41500 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'void cat::fbank_400<float>(cat::View)' for 'sm_100'
ptxas info    : Function properties for void cat::fbank_400<float>(cat::View)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_what_the_compiler_says_is_understood() -> None:
    assert parse(SAID) == [
        Kernel("fbank_400", "Half", "90", 127, 41500, 64, 24),
        Kernel("fbank_400", "float", "100", 40, 0, 0, 0),
    ]


def test_a_number_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing of the registers"):
        parse(SAID.replace("Used 40 registers", ""))


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = resources.find_nvcc()
    if found is None:
        pytest.skip("nvcc was not found")
    return found


@pytest.fixture(scope="module")
def kernels(nvcc: str) -> list[Kernel]:
    architectures = resources.known(nvcc)
    found = parse(resources.compiler_output(nvcc, architectures))
    assert {kernel.architecture for kernel in found} == set(architectures)
    return found


@pytest.mark.slow
def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.spill_bytes or kernel.stack_bytes] == []


@pytest.mark.slow
def test_launch_bounds_are_kept_and_blocks_fit(nvcc: str, kernels: list[Kernel]) -> None:
    """Every kernel can be launched, and the fast one fills a multiprocessor with several blocks."""
    sizes = resources.launch_sizes(nvcc)
    for kernel in kernels:
        blocks = resources.blocks_of_a_multiprocessor(kernel, *sizes[kernel.name])
        assert blocks >= 3, kernel
        assert kernel.static_shared_bytes + sizes[kernel.name][1] <= 48 * 1024, kernel  # what a launch may ask for


@pytest.mark.slow
def test_no_triton_kernel_spills_and_blocks_fit() -> None:
    """For GPUs that are not here: nothing is spilled, and a block's shared memory is no more than they have."""
    pytest.importorskip("triton")
    from benchmarks.ahead import ARCHITECTURES
    from cat_kernels._triton import SHARED_KIB
    from cat_kernels.loss import kernels as loss

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ahead", "--json"],
        cwd=resources.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    names = [{r["name"] for r in found if r["architecture"] == a and "fp32" not in r["name"]} for a in ARCHITECTURES]
    assert len(names[0]) >= 50
    assert names[2] == names[3]
    for r in found:
        assert r["stack_bytes"] == 0, r
        assert r["shared_bytes"] <= SHARED_KIB[r["architecture"]] * 1024, r
        assert r["registers"] * 32 * r["warps"] <= 65536, r
        if r["folder"] == "loss" and r["name"].startswith("forward"):
            held = loss.held(r["architecture"] // 10, "smooth" in r["name"])
            assert 65536 // (32 * -(-r["registers"] // 8) * 8) >= held, r  # all programs are to run at once
