"""average_targets in Triton: both ways it goes, and what decides between them. Parity is test_operators.py's part."""

import pytest
import torch

from cat_kernels import average_targets, backends
from cat_kernels import spec as S
from cat_kernels.targets.spec import SPEC

kernels = pytest.importorskip("cat_kernels.targets.kernels")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if backends.why_not("average_targets", "triton", DEVICE.type) is not None:
    pytest.skip("Triton does not run here", allow_module_level=True)


pytestmark = pytest.mark.either


def blocks(count, B=2, L=24, D=20, dtype=torch.float32):
    """As they come from the teacher: with the CLS row cut off."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, 1 + L, D, generator=g).to(DEVICE, dtype)[:, 1:] for _ in range(count)]


TRITON = SPEC.with_backend("triton")


def assert_right(layers, **options):
    S.check_parity(TRITON, S.Sample(name=str(options), inputs={"layers": layers, **options}))


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("partial", [False, True])
def test_both_ways(monkeypatch, one_pass, num_layers, partial):
    monkeypatch.setattr(kernels, "in_one_pass", lambda layers, final: one_pass and bool(layers))
    layers = blocks(3)
    sum_before = torch.randn(2, 24, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE) if partial else None
    assert_right(layers, num_layers=num_layers, partial=sum_before)


def test_what_decides():
    short, long = (torch.empty(1, L, 4, device="meta", dtype=torch.bfloat16) for L in (kernels.HELD, kernels.HELD + 1))
    assert kernels.in_one_pass([short], final=False)
    assert kernels.in_one_pass([short] * 5, final=True)
    assert not kernels.in_one_pass([short], final=True)
    assert not kernels.in_one_pass([long], final=False)
    assert not kernels.in_one_pass([], final=True)


def test_more_patches_than_a_program_holds():
    """Several tiles of patches, of channels far from zero, and a last tile that is not full."""
    (layer,) = blocks(1, B=1, L=kernels.HELD + 21, D=20)
    layer += 100
    assert_right([layer])
    assert_right([layer[:, :65]], num_layers=1)


def test_blocks_that_share_no_layout():
    one, two, three = blocks(3)
    layers = [one, two, three.bfloat16(), three.mT.contiguous().mT]
    assert_right(layers)
    assert_right(layers, num_layers=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_is_all_at_once(dtype):
    layers, total = blocks(4, dtype=dtype), None
    for i, layer in enumerate(layers, start=1):
        before = None if total is None else total.clone()
        after = average_targets([layer], partial=total, num_layers=4 if i == 4 else None, backend="triton")
        assert total is None or torch.equal(total, before), "partial was written"
        total = after
    torch.testing.assert_close(total, average_targets(layers, num_layers=4, backend="triton"), rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time():
    layers = blocks(3)
    a, b = (average_targets(layers, num_layers=3, backend="triton") for _ in range(2))
    assert torch.equal(a, b)


def test_opcheck_of_the_kernels():
    sample = next(SPEC.samples(DEVICE, torch.float32))
    for overload, arguments in SPEC.overload_calls(sample):
        torch.library.opcheck(overload, arguments, {"backend": "triton"}, test_utils=("test_schema", "test_faketensor"))


def test_float64_is_not_for_the_kernels():
    layers = blocks(2, dtype=torch.float64)
    with pytest.raises(backends.BackendError, match="float64 input; use backend='torch' or 'auto'"):
        average_targets(layers, backend="triton")
    with pytest.raises(backends.BackendError, match="float64 input"):
        average_targets(blocks(1), partial=layers[0], backend="triton")
