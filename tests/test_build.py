"""Installing with a compiler, with nvcc, with neither; the source distribution; the C++ tests.

All but the C++ tests build from an unpacked source distribution and install into an environment of their own, which
sees the packages of this one. Nothing is downloaded; `make test` itself begins with an isolated build.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.resources import find_nvcc

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
NOT_SOURCES = {".git", ".venv", "build", "dist", "data", "runs", "gpu-suite", "docs/build", "docs/api"}
OURS = ("CXX", "CC", "CUDACXX", "CAT_KERNELS_EXTENSION", "CAT_KERNELS_CUDA", "CMAKE_ARGS", "PYTHONPATH")

compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)
cmake = pytest.mark.skipif(not shutil.which("cmake", path=PATH), reason="needs CMake")
pip = pytest.mark.skipif(
    # By their distributions: before Python 3.12, looking for the module pip makes setuptools unusable in this process.
    not {"pip", "setuptools", "pybind11"} <= {d.name for d in importlib.metadata.distributions()},
    reason="needs pip, setuptools and pybind11",
)
pytestmark = pytest.mark.slow

# What an installed package says of itself, and whether its features are PyTorch's.
REPORT = """
import json, torch, cat_kernels
from cat_kernels import extension
from cat_kernels.backends import resolve

waveform = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
error = (cat_kernels.fbank(waveform) - cat_kernels.fbank(waveform, backend="torch")).abs().max().item()
module = extension.load()
print(json.dumps({
    "file": cat_kernels.__file__, "backend": resolve("fbank", "auto", "cpu"), "error": error,
    "about": module and module.about(), "cpu": extension.why_not("cpu"), "cuda": extension.why_not("cuda"),
    "explain": str(cat_kernels.explain()),
}))
"""


def run(command: list[str], cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Standard output and error together; of our variables only those named are set."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"PATH": PATH, "CMAKE_CUDA_ARCHITECTURES": "90", "PIP_NO_INDEX": "1", **changes}
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own that also has this one's packages, but not what is installed in place."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Environment:
        venv.create(folder, with_pip=False)
        outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "outer.pth").write_text("\n".join(outer) + "\n")
        return cls(folder)

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def pip(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python, *arguments]
        return run(command, self.folder, **changes)

    def wheel(self, source: Path, **changes: str) -> tuple[Path, str]:
        """Builds and installs; the wheel, and what was printed."""
        options = ("--no-build-isolation", "--no-deps", "-v")
        done = self.pip("wheel", *options, "-w", str(self.folder), str(source), **changes)
        assert done.returncode == 0, done.stdout[-3000:]
        (wheel,) = self.folder.glob("*.whl")
        installed = self.pip("install", "--no-deps", "--ignore-installed", str(wheel))
        assert installed.returncode == 0, installed.stdout
        return wheel, done.stdout

    def report(self) -> dict[str, Any]:
        """Run elsewhere than in the sources."""
        done = subprocess.run([self.python, "-c", REPORT], cwd=self.folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, from a tree in which the extension had been built in place."""
    if not importlib.util.find_spec("setuptools"):
        pytest.skip("needs setuptools")
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(ROOT, folder / "tree", ignore=_ignored)
    for name in ("_C.cpython-311-x86_64-linux-gnu.so", "_build.json"):
        (folder / "tree" / "cat_kernels" / name).write_text("built for another machine")
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    done = run([sys.executable, "-c", code, str(folder)], folder / "tree")
    assert done.returncode == 0, done.stdout[-3000:]
    return next(folder.glob("*.tar.gz"))


def _ignored(folder: str, names: list[str]) -> set[str]:
    relative = Path(folder).relative_to(ROOT)
    return {
        name
        for name in names
        if str(relative / name) in NOT_SOURCES or name.endswith(("__pycache__", "_cache", ".egg-info", ".so"))
        or name.startswith(".venv")
    }  # fmt: skip


@pytest.fixture(scope="module")
def source(archive: Path) -> Path:
    with tarfile.open(archive) as opened:
        opened.extractall(archive.parent, filter="data")
    return archive.parent / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """A wheel of a machine whose nvcc is broken, and where it is installed."""
    folder = tmp_path_factory.mktemp("built")
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal   : Could not open libdevice' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    environment = Environment.make(folder / "venv")
    return environment, environment.wheel(source, CUDACXX=str(nvcc))[0]


def test_source_distribution_is_complete(source: Path) -> None:
    """Every tracked file is in it, and nothing that was built."""
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    tracked = {name for name in done.stdout.splitlines() if (ROOT / name).exists()} - {".gitignore"}
    packaged = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert tracked - packaged == set()
    assert [name for name in packaged if name.endswith((".so", "_build.json", ".o"))] == []


@pip
def test_without_a_compiler_pytorch_takes_over(source: Path, tmp_path: Path) -> None:
    environment = Environment.make(tmp_path / "venv")
    wheel, said = environment.wheel(source, PATH=str(tmp_path), CC="/nowhere/cc")
    assert wheel.name.endswith("-py3-none-any.whl")
    reason = "no C++ compiler was found (c++, g++ or clang++)"
    lines = [line.strip() for line in said.splitlines() if "cat_kernels: " in line]
    assert lines == [f"cat_kernels: installed without its C++ extension: {reason}."]
    report = environment.report()
    assert report["backend"] == "torch"
    assert report["error"] == 0
    assert report["about"] is None
    assert reason in report["cpu"]
    assert reason in report["explain"]


@pip
@cmake
@compiler
def test_a_wheel_runs_in_a_fresh_environment(built: tuple[Environment, Path]) -> None:
    """And a broken nvcc costs only the GPU code."""
    environment, wheel = built
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}" in wheel.name
    report = environment.report()
    assert Path(report["file"]).is_relative_to(environment.folder)
    assert report["backend"] == "native"
    assert 0 < report["error"] < 3e-3
    assert report["about"]["cuda"] == ""
    assert report["about"]["architectures"] == []
    record = json.loads((Path(report["file"]).parent / "_build.json").read_text())
    assert record["built"]
    assert "does not work here: nvcc fatal   : Could not open libdevice" in record["cuda_reason"]


@pip
@cmake
@compiler
def test_code_for_other_processors_stays_apart(built: tuple[Environment, Path], source: Path) -> None:
    """No object for a special instruction set holds a function that the linker could choose for all."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    objects = sorted(source.glob("build/cmake-*/CMakeFiles/cat_frames_*/**/*.o"))
    assert objects
    for path in objects:
        said = subprocess.run([nm, "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        kinds = {line.split()[-1]: line.split()[-2] for line in said.splitlines()}
        assert [name for name, kind in kinds.items() if kind in "WVu"] == [], path


@pip
@cmake
@compiler
def test_an_editable_install_has_gpu_code_where_nvcc_works(source: Path, tmp_path: Path) -> None:
    """Neither building for a GPU nor importing what was built needs one."""
    nvcc = find_nvcc()
    environment = Environment.make(tmp_path / "venv")
    options = ("install", "--no-build-isolation", "--no-deps", "--ignore-installed", "-e", str(source))
    done = environment.pip(*options, **({"CUDACXX": nvcc, "CAT_KERNELS_CUDA": "on"} if nvcc else {}))
    assert done.returncode == 0, done.stdout[-3000:]
    report = environment.report()
    assert Path(report["file"]).is_relative_to(source)
    assert report["backend"] == "native"
    assert report["error"] < 3e-3
    if nvcc is None:
        pytest.skip("installed; there is no nvcc for the rest")
    assert report["about"]["cuda"]
    assert report["about"]["architectures"] == ["90", "90-virtual"]
    assert "sm_90" in report["explain"]


@pip
@cmake
@compiler
def test_pip_shows_one_sentence_where_nvcc_was_demanded(source: Path, tmp_path: Path) -> None:
    environment = Environment.make(tmp_path / "venv")
    options = ("wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(source))
    done = environment.pip(*options, CAT_KERNELS_CUDA="on", CUDACXX="/no/nvcc")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    shown = done.stdout.partition("lines of output]")[2].partition("[end of output]")[0]
    *before, said = (line.strip() for line in shown.strip().splitlines())
    assert said == "CAT_KERNELS_CUDA=on, but the compiler CUDACXX=/no/nvcc was not found."
    assert before == ["running bdist_wheel", "running build", "running build_ext"]


@cmake
@compiler
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("CAT_KERNELS_CUDA=on CXX=/no/c++", "CAT_KERNELS_CUDA=on, but the compiler CXX=/no/c++ was not found."),
        ("CAT_KERNELS_EXTENSION=on CXX=no", "CAT_KERNELS_EXTENSION=on, but the compiler CXX=no was not found."),
        ("CAT_KERNELS_CUDA=yes", "CAT_KERNELS_CUDA=yes is none of auto, on and off."),
        ("CAT_KERNELS_EXTENSION=1", "CAT_KERNELS_EXTENSION=1 is none of auto, on and off."),
        # any program passes for nvcc here: it is not run before the architectures are understood
        ("CMAKE_CUDA_ARCHITECTURES=hopper CUDACXX=sh", "CMAKE_CUDA_ARCHITECTURES=hopper is no list of architectures"),
        ("MAX_JOBS=0", "MAX_JOBS=0 is no positive number."),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(changes: str, sentence: str, source: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = run(build, source, **dict(change.split("=") for change in changes.split()))
    assert done.returncode == 1
    (said,) = done.stdout.splitlines()
    assert said.startswith(sentence)


@cmake
@compiler
def test_a_compile_error_is_shown_with_its_remedy(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    (copy / "csrc" / "fbank" / "tables.cpp").write_text("int broken = missing;\n")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = run(build, copy, CAT_KERNELS_CUDA="off")
    assert done.returncode == 1
    assert "tables.cpp:1:14: error" in done.stdout
    assert "CAT_KERNELS_EXTENSION=off" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stdout
    assert run(build, copy, CAT_KERNELS_EXTENSION="off").returncode == 0
    record = json.loads((copy / "cat_kernels" / "_build.json").read_text())
    assert record == {"built": False, "reason": "CAT_KERNELS_EXTENSION=off when it was installed"}


@cmake
@compiler
def test_cpp_tests_pass_under_sanitizers() -> None:
    """Address and undefined behaviour; the folder is kept, so that only what changed is compiled again."""
    folder = ROOT / "build" / "cmake-tests"
    ninja = shutil.which("ninja", path=PATH)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    options = ["TESTS=ON", "SANITIZE=ON", "PYTHON=OFF", "CUDA=off"]
    cmake = str(shutil.which("cmake", path=PATH))
    ctest = str(Path(cmake).with_name("ctest"))
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *generator, *(f"-DCAT_KERNELS_{option}" for option in options)],
        [cmake, "--build", str(folder), "--parallel", jobs],
        [ctest, "--test-dir", str(folder), "--output-on-failure", "--no-tests=error"],
    ):
        done = run(command, ROOT)
        assert done.returncode == 0, done.stdout[-6000:]
