"""Every operator against its reference, by the package's own specifications: outputs and gradients, the tolerance rule
of `spec.py`. On a build that is not published yet: LOCAL_KERNELS=OWNER/cat-kernels=FOLDER python -m pytest tests"""

import importlib

import kernels
import pytest
import torch

cat_kernels = kernels.get_kernel("OWNER/cat-kernels", version=0)
specification = importlib.import_module(".spec", cat_kernels.__name__)
specs = importlib.import_module(".specs", cat_kernels.__name__).specs
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECS = {spec.name: spec for spec in specs()}


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # PyTorch's default for convolutions on a GPU


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", SPECS)
def test_parity(name):
    spec = SPECS[name]
    for dtype in (torch.float32, torch.bfloat16):
        if dtype in spec.dtypes:
            for sample in spec.samples(DEVICE, dtype):
                specification.check_parity(spec, sample)


@pytest.mark.kernels_ci
def test_operators_have_a_namespace_of_their_own():
    ops = importlib.import_module("._ops", cat_kernels.__name__)
    assert ops.add_op_namespace_prefix("gather_tokens").startswith(f"{cat_kernels.__name__}::")
    assert "native" not in {row.backend for row in cat_kernels.explain().rows}
