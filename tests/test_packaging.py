"""What users get: complete metadata, imports that need no extra, tests that collect on a bare machine, no pickles."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cat
import cat_kernels
from cat_kernels import _requires

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA_MODULES = (
    "soundfile", "soxr", "yaml", "tqdm", "tensorboard", "matplotlib", "sklearn", "scipy", "transformers", "triton",
    "huggingface_hub", "pyarrow", "h5py", "onnx", "onnxruntime", "onnxscript", "mteb", "sed_eval", "ai_edge_litert",
    "kaldi_native_fbank", "librosa", "torchaudio", "kernels", "shtab", "threadpoolctl",
)  # fmt: skip
SOURCES = [path for folder in ("cat_kernels", "cat", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]

HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run_without(hidden: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that does not have the modules `hidden`."""
    command = [sys.executable, "-c", HIDE.format(hidden=set(hidden)) + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def is_kernel(path: Path) -> bool:
    """Triton kernels are imported when one is first asked for, and need Triton."""
    return path.name == "kernels.py" or path.name.endswith("_triton.py") or path.parent.name == "kernels"


def is_of_transformers(path: Path) -> bool:
    """What goes to the hub with a model, for transformers to import."""
    return path.parent.name == "remote"


def module_names(folder: str) -> list[str]:
    apart = (is_kernel, is_of_transformers)
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in SOURCES if not any(of(path) for of in apart)]
    names = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts if p[0] == folder and p[-1] != "__main__"]
    assert len(names) > 10
    return names


def test_version_is_one() -> None:
    assert cat.__version__ == cat_kernels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", cat_kernels.__version__)


def test_every_requirement_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[\d.a-z]+", version) for version in pins.values())  # and no local suffix such as +cpu
    pinned = {name.lower().replace("_", "-") for name in pins}
    wanted = [*PROJECT["dependencies"], *(r for group in PROJECT["optional-dependencies"].values() for r in group)]
    names = {re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-") for requirement in wanted} - {"cat-kernels"}
    assert (
        names | {"torchaudio", "xares", "loguru", "hearvalidator", "kernels"} <= pinned
    )  # which the Makefile installs apart


def test_what_pip_checks_the_package_checks() -> None:
    """Where it is loaded without pip: as the first thing, so that nothing fails in its place."""
    torch = next(requirement for requirement in PROJECT["dependencies"] if requirement.startswith("torch"))
    assert PROJECT["requires-python"] == f">={'.'.join(map(str, _requires.PYTHON))}"
    assert torch == f"torch>={'.'.join(map(str, _requires.TORCH))}"
    tree = ast.parse((ROOT / "cat_kernels" / "__init__.py").read_text())
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert [alias.name for alias in first.names] == ["_requires"]


@pytest.mark.parametrize(
    ("python", "pytorch"),
    [((3, 10, 14), "2.13.0"), ((3, 11, 7), "2.10.1+cu128"), ((2, 99), "2.13.0"), ((3, 11), "1.99")],
)
def test_an_older_version_is_refused_with_both_named(python: tuple[int, ...], pytorch: str) -> None:
    with pytest.raises(ImportError, match=rf"Python 3\.11 and PyTorch 2\.11.*{python[0]}\.{python[1]}.*{pytorch[:4]}"):
        _requires.check(python, pytorch)


@pytest.mark.parametrize("pytorch", ["2.11.0", "2.11.0a0+git1234567", "2.12.0.dev20260101+cu130", "3.0.0"])
def test_a_newer_version_is_taken(pytorch: str) -> None:
    _requires.check((3, 11, 0), pytorch)
    _requires.check((4, 0), pytorch)


def test_the_command_exists() -> None:
    module, function = PROJECT["scripts"]["cat-audio"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_module_imports_without_the_extras() -> None:
    """The commands say what to install when they run, not when they are imported."""
    imports = "\n".join(f"import {name}" for name in module_names("cat_kernels") + module_names("cat"))
    done = run_without(EXTRA_MODULES, imports)
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_kernels_import_triton() -> None:
    for path in SOURCES:
        if path.is_relative_to(ROOT / "cat_kernels") and not is_kernel(path):
            assert not re.search(r"^(from|import) triton\b", path.read_text(), re.MULTILINE), path


def test_operators_need_only_torch() -> None:
    """cat_kernels imports neither cat nor anything but torch and the standard library."""
    imports = "\n".join(f"import {name}" for name in module_names("cat_kernels"))
    done = run_without((*EXTRA_MODULES, "safetensors", "cat"), imports)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [(["synth", "{tmp}/set"], "soundfile"), (["pretrain", "recipes/tiny.yaml"], "yaml")],
)
def test_a_missing_extra_is_named_with_its_remedy(arguments: list[str], missing: str, tmp_path: Path) -> None:
    argv = [argument.format(tmp=tmp_path) for argument in arguments]
    done = run_without((missing,), f"from cat.commands import main\nsys.exit(main({argv!r}))")
    assert done.returncode == 1
    assert "pip install 'cat-kernels[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_tests_collect_without_the_extras() -> None:
    """`pytest -m gpu` must work on a machine that has torch, numpy and pytest but none of the extras."""
    code = (
        "import pytest\nsys.exit(pytest.main(['-q', '--collect-only', '-m', 'gpu', '-p', 'no:cacheprovider', 'tests']))"
    )
    done = run_without((*EXTRA_MODULES, "pytest_benchmark"), code)
    assert done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), done.stdout[-3000:] + done.stderr[-1000:]
    assert "error" not in done.stdout.lower()


@pytest.mark.parametrize("pattern", [r"pickle\.loads?\b", r"allow_pickle=True", r"weights_only=False", r"joblib"])
def test_nothing_is_unpickled(pattern: str) -> None:
    assert [str(path) for path in SOURCES if re.search(pattern, path.read_text())] == []


def test_torch_load_reads_weights_only() -> None:
    for path in SOURCES:
        text = path.read_text()
        for match in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[match.start() : match.start() + 300], path


def test_layers_point_one_way() -> None:
    for path in SOURCES:
        if path.is_relative_to(ROOT / "cat_kernels"):
            assert not re.search(r"^\s*(from|import) cat\b", path.read_text(), re.MULTILINE), path


def test_operator_folders_hold_the_same_files() -> None:
    folders = [path.parent for path in (ROOT / "cat_kernels").glob("*/__init__.py")]
    assert len(folders) >= 6
    for folder in folders:
        missing = {"README.md", "reference.py", "spec.py"} - {path.name for path in folder.iterdir()}
        assert not missing, f"{folder}: {missing}"


def test_source_distribution_lists_every_top_level_name() -> None:
    """MANIFEST.in names every tracked folder and file of the top level, so that a new one is not forgotten."""
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    text = (ROOT / "MANIFEST.in").read_text()
    packaged = {"cat", "cat_kernels", "MANIFEST.in", ".gitignore"}
    for name in sorted({path.split("/")[0] for path in done.stdout.split()} - packaged):
        assert re.search(rf"(^| ){re.escape(name)}( |$)", text, re.MULTILINE), f"{name} is missing in MANIFEST.in"


def test_recipes_are_installed_and_found_as_the_pages_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    installed = tmp_path / "cat" / "recipes"
    assert {path.name for path in installed.iterdir()} == {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.yaml").touch()  # of the user's own
    code = "from cat.training.recipe import find_recipe\nprint(*map(find_recipe, sys.argv[1:]), sep='\\n')"
    names = ["tiny", "recipes/tiny.yaml", "recipes/base.yaml", "recipes/nosuch.yaml", "other/tiny.yaml", "tiny.yaml"]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *names],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    tiny = str(installed / "tiny.yaml")
    assert found.stdout.splitlines() == [tiny, tiny, *names[2:]], found.stderr
