"""`make kernel-hub`: what it writes, and that the hub's own loader takes it beside the installed package."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import cat_kernels
from cat_kernels import _requires
from cat_kernels.specs import specs
from release import kernel_hub
from tests.lookalikes import kernel_hub as write

ROOT = Path(__file__).parents[1]
HERE = ROOT / "release" / "kernel-hub"
VARIANTS = ("torch-cpu", "torch-cuda")
GENERATED = {"_ops.py", "metadata.json"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds of the same files, under two ids."""
    folder = tmp_path_factory.mktemp("kernel-hub")
    write(folder / "first")
    write(folder / "second", "--id", "second", "--repo-id", "me/my-cats")
    return folder / "first", folder / "second"


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "__pycache__" not in name}


# ---------------------------------------------------------------- what is written


def test_what_the_folder_holds(folders: tuple[Path, Path]) -> None:
    source = contents(folders[0] / "torch-ext" / "cat_kernels")
    package = {path.relative_to(ROOT / "cat_kernels").as_posix() for path in (ROOT / "cat_kernels").rglob("*.py")}
    assert {name for name in source if name.endswith(".py")} == package - {"_ops.py"}  # which kernel-builder writes
    assert not [name for name in source if name.endswith((".so", ".pyc"))]
    for variant in VARIANTS:
        found = contents(folders[0] / "build" / variant)
        assert set(found) == {*source, *GENERATED}
        assert all(found[name] == content for name, content in source.items())
    for name in ("build.toml", "CARD.md", "flake.nix", "LICENSE", "tests/test_cat_kernels.py", "build/CARD.md"):
        assert (folders[0] / name).is_file()


def test_the_repository_is_named_everywhere(folders: tuple[Path, Path]) -> None:
    for folder, name, other in (
        (folders[0], b"OWNER/cat-kernels", b"me/my-cats"),
        (folders[1], b"me/my-cats", b"OWNER"),
    ):
        for file in ("build.toml", "CARD.md", "build/CARD.md", "tests/test_cat_kernels.py"):
            text = (folder / file).read_bytes()
            assert name in text
            assert other not in text


def test_the_id_says_what_is_in_the_files() -> None:
    files = {"a.py": b"x = 1\n", "b.py": b""}
    same = kernel_hub.unique_id(files)
    assert same == kernel_hub.unique_id(dict(reversed(files.items())))
    others = [{**files, "b.py": b"\n"}, {"a.py": b"x = 1\n", "c.py": b""}, {"a.py": b"x = 1\n"}]
    assert len({same, *(kernel_hub.unique_id(other) for other in others)}) == 4
    assert kernel_hub.UNIQUE_ID.fullmatch(same)


def test_the_card_comes_out_of_kernel_builder_as_it_is() -> None:
    """Which takes it for a template, of Jinja's kind."""
    assert not re.search(r"\{\{|\{%|\{#", (HERE / "CARD.md").read_text())


def test_the_card_names_all_there_is_and_what_it_needs() -> None:
    card = (HERE / "CARD.md").read_text()
    listed = {name for row in re.findall(r"^\| (`.*?) \|", card, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert listed == {*cat_kernels.__all__} - {"__version__"}
    python, torch = (".".join(map(str, numbers)) for numbers in (_requires.PYTHON, _requires.TORCH))
    assert f"Needs Python {python} and PyTorch {torch}, or newer" in card


def test_the_benchmark_names_every_operator() -> None:
    tree = ast.parse((HERE / "benchmarks" / "benchmark.py").read_text())
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert set(ast.literal_eval(assigned["OPERATORS"])) == {spec.name for spec in specs()}


# ---------------------------------------------------------------- how it is written


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for name in ("mine", "file"):
        assert kernel_hub.main([str(tmp_path / name)]) == 1
        assert f"{name} exists and is not empty; delete it or name another folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine/note.txt": b"keep me", "file": b"keep me"}
    (tmp_path / "empty").mkdir()
    assert kernel_hub.main([str(tmp_path / "empty")]) == 0


def test_a_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, written = Path.write_bytes, []

    def full_disk(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) > 20:
            raise OSError(28, "No space left on device", str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert kernel_hub.main([str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--id", "A_b"], "'A_b' is no id: small letters and digits"),
        (["--id", ""], "'' is no id"),
        (["--repo-id", "cat-kernels"], "'cat-kernels' is no repository of the hub, such as me/cat-kernels"),
    ],
)
def test_bad_options(options: list[str], told: str, capsys: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        kernel_hub.main([str(tmp_path / "out"), *options])
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what the hub's library makes of it


def test_the_hubs_library_reads_configuration_and_metadata(folders: tuple[Path, Path]) -> None:
    rust = pytest.importorskip("kernels._rust")
    config = tomllib.loads((HERE / "build.toml").read_text())
    assert config["general"]["edition"] == 5
    assert len(rust.Build.open(folders[0]).general.backends) == len(VARIANTS)  # it refuses what it does not know
    for folder in folders:
        for variant in VARIANTS:
            path = folder / "build" / variant
            told = rust.Metadata.read_from_file(path / "metadata.json")
            assert (str(told.name), told.version, told.license) == ("cat-kernels", 0, "MIT")
            assert str(told.backend.backend_type).lower() == variant.removeprefix("torch-")
            told.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, path))
            assert f"torch.ops.{told.id}\n" in (path / "_ops.py").read_text()


BESIDE = """
import importlib, sys
from pathlib import Path
import torch
from kernels import get_local_kernel

exec(compile(Path(sys.argv[3]).read_text(), "the card's example", "exec"))
assert tokens.shape == (8, 26, 768)
assert "cat_kernels" not in sys.modules  # nothing of the installed package was needed
import cat_kernels as installed
first, second = (get_local_kernel(Path(folder)) for folder in sys.argv[1:3])
assert cat_kernels is first  # the card's
assert len({id(k.MultiResConv) for k in (installed, first, second)}) == 3
assert first.__all__ == second.__all__ == installed.__all__
assert "the kernel hub's build is Python only" in first.explain().versions["extension"]

cuda = get_local_kernel(Path(sys.argv[1]) / "build" / "torch-cuda")  # the same files for a PyTorch with CUDA
assert cuda.__name__.startswith("_cat_kernels_cuda_")

cpu = torch.device("cpu")
for kernel in (first, second):
    own = importlib.import_module(".spec", kernel.__name__)
    for spec in importlib.import_module(".specs", kernel.__name__).specs():
        assert sys.modules[spec.operator.__module__].__name__.startswith(kernel.__name__)
        own.check_parity(spec, next(iter(spec.samples(cpu, torch.float32))))
        if spec.name in ("gather_tokens", "ema_update_"):
            triton = spec.with_backend("triton")
            own.check_parity(triton, next(iter(triton.samples(cpu, torch.float32))))

x, visible = torch.randn(2, 4, 8), torch.tensor([[0, 3], [2, 1]])
for package in (installed, first, second, cuda):
    name = package.__name__
    namespace, called = getattr(torch.ops, name), []
    real = namespace.gather_tokens
    namespace.gather_tokens = lambda *args, **options: called.append(name) or real(*args, **options)
    package.gather_tokens(x, visible)
    assert called == [name]
    namespace.gather_tokens = real
compiled = torch.compile(second.gather_tokens, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(x, visible), installed.gather_tokens(x, visible))

script = importlib.util.spec_from_file_location("benchmark_module", Path(sys.argv[1]) / "benchmarks" / "benchmark.py")
module = importlib.util.module_from_spec(script)
script.loader.exec_module(module)
for name in ("gather_tokens", "masked_regression_loss", "ema_update_"):  # one result, several, none
    bench = module.CatKernels()
    bench.kernel = first
    for step in ("setup", "benchmark"):
        getattr(bench, f"{step}_{name}")()
    assert torch.allclose(bench.out, getattr(bench, f"verify_{name}")(), atol=1e-2)
print(first.__name__, second.__name__)
"""


def run(folders: tuple[Path, Path], *arguments: str | Path) -> str:
    pytest.importorskip("kernels")
    repositories = f"OWNER/cat-kernels={folders[0]}:me/my-cats={folders[1]}"
    environment = {"LOCAL_KERNELS": repositories, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_loads_beside_the_installed_package_twice(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Two builds under two ids and the installed package in one process: parity of every operator, the card's example,
    the benchmark."""
    (example,) = re.findall(r"^```python\n(.*?)^```", (folders[0] / "CARD.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    told = run(folders, "-c", BESIDE, *folders, tmp_path / "example.py")
    assert re.search(r"_cat_kernels_\w+_[a-z0-9]{10} _cat_kernels_\w+_second$", told.strip())


@pytest.mark.slow
def test_its_own_tests_pass(folders: tuple[Path, Path]) -> None:
    told = run(folders, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folders[0], folders[0] / "tests")
    assert f"{len(specs()) + 1} passed" in told
