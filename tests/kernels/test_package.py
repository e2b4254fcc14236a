"""The package as a whole: which way its imports point, and that it loads under another name, as kernel hubs load it."""

import ast
import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
from another import spec as theirs_spec
assert len(theirs_spec.specs()) == 7
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
