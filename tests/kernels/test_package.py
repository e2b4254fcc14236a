"""The package as a whole: which way its imports point, and that it loads under another name, as kernel hubs load it."""

import ast
import copy
import graphlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cat_kernels

ROOT = Path(cat_kernels.__path__[0])
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in sorted(ROOT.rglob("*.py"))}


def dotted(parts):
    """A module's name below the package; the package itself is ""."""
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(parts): path for parts, path in FILES.items()}


def imports(name, text):
    """(absolute names, modules of the package) that a module imports: anywhere, in functions and for types too."""
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    absolute, own = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            absolute |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = ".".join(part for part in base if part)
            for alias in node.names:
                inside = f"{base}.{alias.name}".lstrip(".")
                own.add(inside if inside in MODULES else base)
    return absolute, own


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "__init__")
def test_imports_are_relative_or_need_nothing_installed(name):
    """But for torch and Triton."""
    absolute, own = imports(name, MODULES[name].read_text())
    roots = {module.split(".")[0] for module in absolute}
    assert roots <= {*sys.stdlib_module_names, "torch", "triton"}
    assert own <= set(MODULES)


def test_no_module_is_imported_by_what_it_imports():
    arrows = {name: imports(name, path.read_text())[1] for name, path in MODULES.items()}
    assert arrows["stem.module"] >= {"stem.weights", "stem.reference"}
    tuple(graphlib.TopologicalSorter(arrows).static_order())  # a CycleError names the circle


def test_only_one_module_names_the_namespace():
    """Others ask it: a hub replaces it."""
    for name, path in MODULES.items():
        if name != "_ops":
            assert "cat_kernels::" not in path.read_text(), name
            assert "torch.ops.cat_kernels" not in path.read_text(), name


def test_every_package_names_what_it_exports():
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "stem.kernels":
            assert "__all__ = [" in path.read_text(), name


BESIDE = """
import copy
import torch
import cat_kernels as ours
import another as theirs

assert theirs.MultiResConv is not ours.MultiResConv
torch.manual_seed(0)
stem = ours.MultiResConv((4, 8), (16,), 32)
other = theirs.MultiResConv((4, 8), (16,), 32)
other.load_state_dict(stem.state_dict())
spec, visible = torch.randn(2, 1, 16, 16), torch.tensor([[0, 3], [2, 1]])
assert torch.equal(stem(spec, visible), other(spec, visible))

tokens = torch.randn(2, 4, 8, requires_grad=True)
seed = torch.tensor([1, 2])
results = []
for package, namespace in ((ours, torch.ops.cat_kernels), (theirs, torch.ops.another_1234abc)):
    called = []
    real = namespace.gather_tokens
    namespace.gather_tokens = lambda *args, **options: called.append(1) or real(*args, **options)
    found = package.gather_tokens(tokens, visible, cls_token=torch.ones(8))
    loss = package.masked_regression_loss(package.restore_tokens(found[:, 1:], visible, 4, seed), tokens, visible)
    results.append([found, *loss, *torch.autograd.grad(loss.loss, tokens)])
    assert called
assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
assert torch.equal(ours.fbank(torch.ones(1, 800), backend="torch"), theirs.fbank(torch.ones(1, 800), backend="torch"))
from another import specs as theirs_specs
assert {type(spec).__module__ for spec in theirs_specs.specs()} == {"another.spec"}
print("fallback:", theirs.explain())
"""


def test_loads_under_another_name_beside_itself(tmp_path):
    """As Hugging Face's kernel hub does: Python files only, another name, operators in a namespace of their own."""
    for parts, path in FILES.items():
        target = tmp_path / "another" / Path(*parts).with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    ops = tmp_path / "another" / "_ops.py"
    ops.write_text(
        "import torch\nops = torch.ops.another_1234abc\n"
        "def add_op_namespace_prefix(op_name):\n    return f'another_1234abc::{op_name}'\n"
    )
    code = f"import sys\nsys.path[:0] = [{str(ROOT.parent)!r}, {str(tmp_path)!r}]\n{BESIDE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the extension was not built" in done.stdout


# --- modules that are not made the usual way --------------------------------------------------------------------------

MAKERS = {
    "MultiResConv": lambda: cat_kernels.MultiResConv((4, 8), (16,), 32),
    "LogMelFbank": lambda: cat_kernels.LogMelFbank("beats", target_length=9, num_mel_bins=16),
}
INPUTS = {
    "MultiResConv": lambda: (torch.linspace(-1, 1, 512).view(2, 1, 16, 16), torch.tensor([[0, 3], [2, 1]])),
    "LogMelFbank": lambda: (torch.linspace(-1, 1, 1600).view(2, 800) ** 3,),
}


def from_meta(make, good):
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu").load_state_dict(good.state_dict())
    return module


def assigned(make, good):
    with torch.device("meta"):
        module = make()
    module.load_state_dict(copy.deepcopy(good.state_dict()), assign=True)
    return module


def pickled(make, good):
    return pickle.loads(pickle.dumps(good))


def there_and_back(make, good):
    return copy.deepcopy(good).double().float()


WAYS = [from_meta, assigned, lambda make, good: copy.deepcopy(good), pickled, there_and_back]


@pytest.mark.parametrize("way", WAYS, ids=["meta", "assign", "deepcopy", "pickle", "double and float"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_module_is_all_in_its_state_dict(name, way):
    torch.manual_seed(0)
    good, inputs = MAKERS[name](), INPUTS[name]()
    expected = good(*inputs)
    with torch.device("meta"):  # what is kept from call to call must not come from here
        other = way(MAKERS[name], good)
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    assert torch.equal(other(*inputs), expected)
    assert list(other.state_dict()) == list(good.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_in_another_dtype(dtype):
    torch.manual_seed(0)
    stem, (spec, visible) = MAKERS["MultiResConv"](), INPUTS["MultiResConv"]()
    found = copy.deepcopy(stem).to(dtype)(spec.to(dtype), visible)
    assert found.dtype == dtype
    tolerance = 10 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found.float(), stem(spec, visible), rtol=tolerance, atol=tolerance)
    features, waveform = MAKERS["LogMelFbank"](), INPUTS["LogMelFbank"]()[0].to(dtype)
    assert torch.equal(copy.deepcopy(features).to(dtype)(waveform), features(waveform))
