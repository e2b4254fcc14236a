"""`gather_tokens` in Triton: what is special about it. Parity over all samples is test_operators.py's part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cat_kernels import gather_tokens
from cat_kernels.backends import BackendError
from cat_kernels.gather.spec import SPEC

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.either


def sample(name="few"):
    return next(s for s in SPEC.samples(DEVICE, torch.float32) if s.name == name)


def test_opcheck():
    for name in ("few", "few, select=False", "few, all patches", "few, without positions and cls_token"):
        for overload, arguments in SPEC.overload_calls(sample(name)):
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(overload, arguments, {"backend": "triton"}, test_utils=checks)


def test_what_the_kernels_do_not_take():
    inputs = sample().inputs
    wide = {**inputs, "positions": inputs["positions"].double()}
    with pytest.raises(BackendError, match=r"not torch.float64; use backend='torch' or 'auto'"):
        gather_tokens(**wide, backend="triton")
    assert torch.equal(gather_tokens(**wide), gather_tokens(**wide, backend="torch"))


def test_a_patch_that_there_is_not_gives_nan():
    """What a GPU does with it: values are looked at on the CPU, before the kernels are called."""
    from cat_kernels.gather import kernels

    tokens, positions = torch.ones(1, 4, 8, device=DEVICE), torch.ones(5, 8, device=DEVICE)
    visible = torch.tensor([[0, 4, -1, 1 << 40, 3]], device=DEVICE)
    out = kernels.gather(tokens, visible, positions)
    assert out.isnan().all(2).tolist() == [[False, True, True, True, False]]
    assert (out[0, [0, 4]] == 2).all()
    grad = kernels.sum_rows(torch.ones(1, 5, 8, device=DEVICE), visible, 1, 4, torch.float32)
    assert grad[0, :, 0].tolist() == [1, 0, 0, 1]


def test_slots_chain_a_patch_s_places():
    from cat_kernels.gather import kernels

    visible = torch.tensor([[3, 0, 3, 3, 0]], device=DEVICE)
    table = kernels.slots(visible, 4, chained=True)
    assert table.tolist() == [[1, -1, -1, 0] + [2, 4, 3, -1, -1]]
    assert kernels.slots(torch.tensor([[2, 0]], device=DEVICE), 4).tolist() == [[1, -1, 0, -1]]


def test_long_lists_and_rows():
    """More patches than a program looks up at once, more columns than a program has."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.stack([torch.randperm(150, generator=generator)[:140] for _ in range(2)]).to(DEVICE)
    tokens = torch.randn(2, 150, 3, generator=generator).to(DEVICE).requires_grad_()
    results = []
    for backend in ("triton", "torch"):
        out = gather_tokens(tokens, visible, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, tokens, out.detach().square())))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    wide = torch.randn(1, 3, 300, generator=generator).to(DEVICE)
    assert torch.equal(gather_tokens(wide, visible[:, :1] % 3, backend="triton"), wide[0, visible[:, :1] % 3])


COMPILED = """
import torch
from compile_only import instantiations, kernels
from cat_kernels import gather_tokens, restore_tokens

def compiled(B, M, L, K):
    visible = torch.rand(B * M, L).argsort(1)[:, :K]
    tokens = torch.randn(B, L, 32, requires_grad=True)
    positions, cls_token = torch.randn(L, 32, requires_grad=True), torch.randn(32)
    x = gather_tokens(tokens, visible, positions, cls_token, backend="triton")
    y = restore_tokens(x[:, 1:], visible, L, torch.tensor([B, K]), noise_std=0.01 * B, backend="triton")
    y.backward(torch.ones_like(y))
    return instantiations()

for shape in ((2, 3, 32, 3), (1, 1, 16, 1), (3, 16, 64, 16), (2, 1, 24, 24)):
    print(compiled(*shape), len(kernels))
"""


def test_a_new_batch_length_or_seed_compiles_nothing():
    """Of both operators. Kernels are compiled, and not run, in a process with a GPU's name but no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.path.dirname(__file__)  # compile_only
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [tuple(int(word) for word in line.split()) for line in done.stdout.splitlines()]
    assert len(counts) == 4
    assert counts[0][1] == 4
    assert set(counts) == {counts[0]}, done.stdout


def test_indices_are_looked_at_inside_transforms():
    """Where they have values: not in vmap."""
    tokens, visible = torch.randn(2, 9, 8), torch.tensor([[1, 2], [3, 4]])

    def total(tokens, visible, more):
        return gather_tokens(tokens, visible + more).sum()

    with pytest.raises(IndexError, match=r"visible\[1, 1\] = 10, but there are 9 patches"):
        torch.func.grad(total)(tokens, visible, 6)
    with pytest.raises(IndexError, match=r"visible\[1, 1\] = 10, but there are 9 patches"):
        torch.func.jvp(lambda t: total(t, visible, 6), (tokens,), (tokens,))
    both = torch.stack([visible, visible.flip(1)])
    found = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0, None))(tokens, both, 1)
    expected = [torch.func.grad(total)(tokens, v, 1) for v in both]
    torch.testing.assert_close(found, torch.stack(expected))
