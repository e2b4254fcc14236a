"""The backend table: what is picked, what is refused and what is told."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cat_kernels
from cat_kernels import backends
from cat_kernels import spec as S
from cat_kernels.specs import specs

ROOT = Path(cat_kernels.__file__).parent.parent


def test_the_table_and_the_specifications_name_the_same_operators():
    assert set(backends.OPERATORS) == {spec.name for spec in specs()}
    for names in backends.OPERATORS.values():
        assert names
        assert set(names) <= set(backends.BACKENDS)


@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_auto_picks_a_backend_that_runs(operator):
    for device in ("cpu", "cuda"):
        chosen = backends.resolve(operator, "auto", device)
        assert backends.why_not(operator, chosen, device) is None
        assert backends.resolve(operator, chosen, device) == chosen


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown operator 'gather'; expected one of MultiResConv, gather_tokens"):
        backends.resolve("gather")
    with pytest.raises(ValueError, match=r"unknown backend 'cudnn'; expected 'auto' or one of .*'torch'"):
        backends.resolve("gather_tokens", "cudnn")
    with pytest.raises(ValueError, match=r"unknown device 'tpu'"):
        cat_kernels.explain("tpu")


def test_a_backend_that_an_operator_lacks_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setitem(backends.OPERATORS, "gather_tokens", ("torch",))
    message = (
        r"backend='triton' cannot run gather_tokens on cpu: .* has no triton implementation.*backend='torch' or 'auto'"
    )
    with pytest.raises(backends.BackendError, match=message):
        backends.resolve("gather_tokens", "triton", "cpu")


def test_a_backend_that_cannot_run_here_says_why(monkeypatch):
    """What the table says once an operator has a Triton implementation."""
    monkeypatch.setitem(backends.OPERATORS, "gather_tokens", ("triton", "torch"))
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(backends.BackendError, match=r"Triton is not installed; install it with: pip install triton"):
        backends.resolve("gather_tokens", "triton", "cuda")
    assert backends.resolve("gather_tokens", "auto", "cuda") == "torch"

    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(backends, "INTERPRETED", False)
    with pytest.raises(backends.BackendError, match=r"take CUDA tensors; move them with .cuda\(\)"):
        backends.resolve("gather_tokens", "triton", "cpu")
    assert backends.resolve("gather_tokens", "auto", "cpu") == "torch"
    assert backends.resolve("gather_tokens", "auto", "cuda") == "triton"

    monkeypatch.setitem(backends.OPERATORS, "gather_tokens", ("triton",))
    with pytest.raises(backends.BackendError, match=r"no backend can run gather_tokens on cpu: triton: .* move them"):
        backends.resolve("gather_tokens", "auto", "cpu")


@pytest.mark.parametrize("spec", [s for s in specs() if s.overload_calls], ids=lambda s: s.name)
def test_every_operator_takes_a_backend(spec):
    sample = next(spec.samples(torch.device("cpu"), torch.float32))
    assert inspect.signature(spec.operator).parameters["backend"].default == "auto"

    def call(backend):
        inputs = S.clone_tensors(dict(sample.inputs))
        spec.operator(**inputs, backend=backend)

    call("torch")
    if "triton" in backends.OPERATORS[spec.name]:
        return  # the interpreter runs it
    with pytest.raises(backends.BackendError, match=rf"backend='triton' cannot run {spec.name} on cpu"):
        call("triton")


def test_explain_tells_every_operator_and_version():
    told = cat_kernels.explain("cpu")
    assert [row.operator for row in told.rows] == list(backends.OPERATORS)
    for row in told.rows:
        assert row.backend == backends.resolve(row.operator, "auto", "cpu")
        assert "triton" in (row.backend, *row.others)
    assert told.versions["PyTorch"] == torch.__version__
    assert told.versions["cat_kernels"] == cat_kernels.__version__
    text = str(told)
    for word in (*backends.OPERATORS, "Triton", "GPU", torch.__version__):
        assert word in text
    assert str(told) == repr(told)
    assert text.count("Triton kernels take") <= 1  # a reason is told once, for all its operators


def test_explain_has_a_column_a_device():
    rows = [
        backends.Row("fbank", "cpu", "native", {"torch": "can run; native is preferred"}),
        backends.Row("fbank", "cuda", "torch", {"native": "the extension was built without CUDA"}),
    ]
    assert str(backends.Explanation({"GPU": "one"}, tuple(rows))).splitlines() == [
        "GPU         one",
        "",
        "operator  on cpu    on cuda",
        "fbank     native    torch",
        "",
        "torch    PyTorch operations",
        "native   C++ on CPU tensors, CUDA on CUDA tensors (the extension)",
        "",
        "not used:",
        "torch    on cpu: can run; native is preferred",
        "         fbank",
        "native   on cuda: the extension was built without CUDA",
        "         fbank",
    ]


@pytest.mark.gpu
def test_explain_names_the_gpu():
    told = cat_kernels.explain()
    assert torch.cuda.get_device_name(0) in told.versions["GPU"]
    assert {row.device for row in told.rows} == {"cpu", "cuda"}


def test_import_needs_nothing_but_torch():
    """Import, `explain()` and an operator in a process in which only PyTorch and its own needs can be imported."""
    code = """
import sys
import torch

for name in ("triton", "cat", "soundfile", "soxr", "yaml", "sklearn", "matplotlib", "safetensors", "transformers"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import cat_kernels
y = cat_kernels.gather_tokens(torch.ones(1, 2, 3), None, torch.ones(2, 3), torch.zeros(3))
assert y.tolist() == [[[0] * 3, [2] * 3, [2] * 3]]
print(cat_kernels.explain())
assert "torch._dynamo" not in sys.modules  # it would make the import several times slower
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "gather_tokens" in done.stdout


def test_triton_is_not_imported_by_the_package():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    code = "import sys, torch; old = 'triton' in sys.modules; import cat_kernels; print(old, 'triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    before, after = done.stdout.split()
    assert before == after
