"""Largest difference between `philox.normal` and Triton's `tl.randn4x`; run by test_philox.py in a process of its own,
because TRITON_INTERPRET must be set before Triton is imported.

python triton_randn4x.py cpu|cuda
"""

import sys

import torch
import triton
import triton.language as tl

from cat_kernels import philox


@triton.jit
def fill(rng, out, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randn4x(tl.load(rng), tl.load(rng + 1) + block)
    tl.store(out + 4 * block, a)
    tl.store(out + 4 * block + 1, b)
    tl.store(out + 4 * block + 2, c)
    tl.store(out + 4 * block + 3, d)


def main(device: str) -> None:
    worst = 0.0
    for seed, offset in [(0, 0), (1234567890123, (5 << 32) + 3), (-7, -2), (1, (1 << 32) - 10)]:
        rng = torch.tensor([seed, offset], device=device)
        out = torch.full((4 * 256,), float("nan"), device=device)
        fill[(4,)](rng, out, BLOCK=64)
        worst = max(worst, float((out - philox.normal(rng, out.numel())).abs().max()))
    print(worst)


if __name__ == "__main__":
    main(sys.argv[1])
