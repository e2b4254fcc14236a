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
OURS = (
    "CXX",
    "CC",
    "CUDACXX",
    "CUDAHOSTCXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "CAT_KERNELS_EXTENSION",
    "CAT_KERNELS_CUDA",
    "CMAKE_ARGS",
    "PYTHONPATH",
)

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
        options: dict[str, Any] = {"cwd": self.folder, "capture_output": True, "text": True, "timeout": 120}
        environment = {name: value for name, value in os.environ.items() if name not in OURS}
        done = subprocess.run([self.python, "-c", REPORT], env=environment, **options)
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
    # Its words hold what could spoil the record: colours, quotes, tabs, a byte that is no text.
    nvcc = tool(folder / "nvcc", r"""printf 'nvcc fatal   : no \033[1m"libdevice"\t\\1;\377\n' >&2; exit 1""")
    environment = Environment.make(folder / "venv")
    return environment, environment.wheel(source, CUDACXX=nvcc, CMAKE_CUDA_ARCHITECTURES="")[0]


def tool(path: Path, script: str) -> str:
    """A program that only seems to be a compiler."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_plugins_may_add_commands_to_a_build() -> None:
    """scikit-build-core's, which setuptools loads wherever that is installed, appends one."""
    code = "import setup; assert type(setup.Build.sub_commands) is list; print(setup.Build.sub_commands[0][0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "build_ext"


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
    assert 'does not work here: nvcc fatal   : no  [1m"libdevice" \\1;\ufffd' in record["cuda_reason"]
    assert f"no CUDA: {record['cuda_reason']}" in report["explain"]
    assert record["module"] == f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


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


# --- what decides, without compiling ----------------------------------------------------------------------------------

# A compiler's every way to fail, as shell scripts; {tmp} is the test's folder.
NVCC = {
    "none": ("/no/nvcc", "the compiler CUDACXX=/no/nvcc was not found"),
    "a folder": ("{tmp}", "CUDACXX={tmp} is no program that can be run"),
    "not executable": ("{tmp}/text", "CUDACXX={tmp}/text is no program that can be run"),
    "a dangling link": ("{tmp}/dangling", "the compiler CUDACXX={tmp}/dangling was not found"),
    "without its interpreter": (
        "{tmp}/orphan",
        "{tmp}/orphan does not work here: it ended with: No such file or directory",
    ),
    "silent": ("exit 1", "{nvcc} does not work here: it ended with: 1"),
    "before --list-gpu-arch": (
        "echo 'nvcc fatal   : Unknown option' >&2; exit 1",
        "{nvcc} does not work here: nvcc fatal   : Unknown option",
    ),
    "up to sm_75": ("echo compute_75", "{nvcc} knows none of the architectures 80, 86, 89, 90, 100, 120"),
    "without a library": (
        "echo 'nvcc: error while loading shared libraries: libz' >&2; exit 127",
        "{nvcc} does not work here: nvcc: error while loading shared libraries: libz",
    ),
    "killed": ("kill -SEGV $$", "{nvcc} does not work here: it ended with: Segmentation fault"),
    "waiting": ("sleep 600", "{nvcc} does not work here: it did not end within 1 seconds"),
    "waiting when it compiles": (
        "case $1 in --list*) echo compute_90;; *) sleep 600;; esac",
        "{nvcc} does not work here: it did not end within 1 seconds",
    ),
    "with an unsupported compiler": (
        "case $1 in --list*) echo compute_90;; *) echo; echo 'x.h(1): error: unsupported GNU version'; exit 2;; esac",
        "{nvcc} does not work here: x.h(1): error: unsupported GNU version",
    ),
    "garbage": (r"printf '\000\377\033'", "{nvcc} knows none of the architectures 80, 86, 89, 90, 100, 120"),
}
ARCHITECTURES = {
    "": "80-real;90",
    " ": "80-real;90",
    "all": "80-real;90",
    "sm_90": "90",
    "compute_80, 90a": "80;90a",
    "90-real;90-virtual": "90-real;90-virtual",
}


def decide(folder: Path, nvcc: str, patience: int = 30, **changes: str) -> dict[str, str]:
    """What cmake/nvcc.cmake finds out, waiting no longer than `patience` seconds for a program."""
    script = folder / "decide.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.20)\n"
        f"set(CMAKE_BINARY_DIR {folder}/built)\nset(CMAKE_CXX_COMPILER c++)\nset(CAT_PATIENCE {patience})\n"
        f'set(CMAKE_CUDA_ARCHITECTURES "$ENV{{CMAKE_CUDA_ARCHITECTURES}}")\ninclude({ROOT}/cmake/nvcc.cmake)\n'
        'cat_find_cuda()\nmessage("reason=${cat_reason}\narchitectures=${cat_architectures}")\n'
    )
    done = run([str(shutil.which("cmake", path=PATH)), "-P", str(script)], folder, CUDACXX=nvcc, **changes)
    assert done.returncode == 0, done.stdout
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@cmake
@pytest.mark.parametrize("kind", NVCC)
def test_an_nvcc_that_cannot_be_used_costs_the_gpu_code_and_says_why(kind: str, tmp_path: Path) -> None:
    script, reason = NVCC[kind]
    (tmp_path / "dangling").symlink_to("/no/nvcc")
    (tmp_path / "text").write_text("text")
    (tmp_path / "orphan").write_text("#!/no/shell\n")
    (tmp_path / "orphan").chmod(0o755)
    path = script.startswith(("/", "{tmp}"))
    nvcc = script.format(tmp=tmp_path) if path else tool(tmp_path / "an nvcc", script)
    said = decide(tmp_path, nvcc, 1 if "sleep" in script else 30, CMAKE_CUDA_ARCHITECTURES="")["reason"]
    assert said.lower() == reason.format(tmp=tmp_path, nvcc=nvcc).lower()  # CMake's own words differ in case


@cmake
@pytest.mark.parametrize("wanted", ARCHITECTURES)
def test_architectures_are_understood_in_every_notation(wanted: str, tmp_path: Path) -> None:
    nvcc = tool(tmp_path / "nvcc", "echo compute_75; echo compute_80; echo compute_90; echo compute_900")
    found = decide(tmp_path, nvcc, CMAKE_CUDA_ARCHITECTURES=wanted)
    assert found == {"reason": "", "architectures": ARCHITECTURES[wanted]}


@cmake
def test_the_machines_gpus_are_asked_for_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    tool(tmp_path / "bin" / "nvidia-smi", "sleep 600")
    nvcc = tool(tmp_path / "nvcc", "")
    path = f"{tmp_path}/bin{os.pathsep}{PATH}"
    said = decide(tmp_path, nvcc, 1, CMAKE_CUDA_ARCHITECTURES="native", PATH=path)["reason"]
    assert said.startswith("CMAKE_CUDA_ARCHITECTURES=native needs a GPU that nvidia-smi sees")
    tool(tmp_path / "bin" / "nvidia-smi", "echo 9.0; echo 9.0; echo 8.6")
    found = decide(tmp_path, nvcc, CMAKE_CUDA_ARCHITECTURES="native", PATH=path)
    assert found == {"reason": "", "architectures": "90-real;86-real"}


@cmake
@compiler
def test_an_nvcc_that_only_cmake_cannot_use_costs_the_gpu_code(tmp_path: Path) -> None:
    nvcc = tool(tmp_path / "nvcc", "case $* in *try.cu*) exit 0;; *) echo 'error: no' >&2; exit 1;; esac")
    configure = [str(shutil.which("cmake", path=PATH)), "-S", str(ROOT), "-B", str(tmp_path / "built")]
    configure += ["-DCAT_KERNELS_PYTHON=OFF"]
    done = run(configure, tmp_path, CUDACXX=nvcc)
    assert done.returncode == 0, done.stdout
    record = json.loads((tmp_path / "built" / "build.json").read_text())
    assert f"cannot use {nvcc}" in record["cuda_reason"]
    assert run([*configure, "-DCAT_KERNELS_CUDA=on"], tmp_path, CUDACXX=nvcc).returncode == 1


# setup.py as a module: with the patience, the tools and the largest file that it is given.
PROBE = """
import importlib.util, json, resource, sys
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
script.PATIENCE, found, largest = json.loads(sys.argv[2])
if found:
    script.tools = lambda name: found[name]
if largest:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
print(script.why_no_extension())
"""
CXX = {
    "none": ("/no/c++", "the compiler CXX=/no/c++ was not found"),
    "a folder": ("{tmp}", "the compiler CXX={tmp} is no program that can be run"),
    "of another machine": (
        "{tmp}/orphan",
        "{tmp}/orphan does not compile C++17: {tmp}/orphan: No such file or directory",
    ),
    "quoted badly": ("'c++", "CXX='c++ cannot be understood: No closing quotation."),
    "silent": ("exit 1", "{cxx} does not compile C++17: it ended with exit status 1"),
    "killed": ("kill -SEGV $$", "{cxx} does not compile C++17: it ended with signal 11"),
    "waiting": ("sleep 600", "{cxx} does not compile C++17: it did not end within 1 seconds"),
    "garbage": (r"printf 'x\ny \033 error: \377\n'; exit 1", "{cxx} does not compile C++17: y   error: \ufffd"),
    "before C++17": ("exec c++ -fno-exceptions $* -std=c++11", "{cxx} does not compile C++17: try.cpp:"),
}


def why_no_extension(
    folder: Path, patience: int = 30, found: dict[str, list[str]] | None = None, largest: int = 0, **changes: str
) -> str:
    arguments = [str(ROOT / "setup.py"), json.dumps([patience, found, largest])]
    return run([sys.executable, "-B", "-c", PROBE, *arguments], folder, **changes).stdout.strip()


@compiler
@pytest.mark.parametrize("kind", CXX)
def test_a_compiler_that_cannot_be_used_costs_the_extension_and_says_why(kind: str, tmp_path: Path) -> None:
    script, reason = CXX[kind]
    (tmp_path / "orphan").write_text("#!/no/shell\n")
    (tmp_path / "orphan").chmod(0o755)
    path = script.startswith(("/", "{tmp}", "'"))
    cxx = script.format(tmp=tmp_path) if path else tool(tmp_path / "cxx", script)
    said = why_no_extension(tmp_path, 1 if "sleep" in script else 30, CXX=cxx)
    assert said.startswith(reason.format(tmp=tmp_path, cxx=cxx)), said


@compiler
def test_the_first_compiler_that_works_is_taken(tmp_path: Path) -> None:
    tool(tmp_path / "c++", "exit 1")
    assert why_no_extension(tmp_path, PATH=f"{tmp_path}{os.pathsep}{PATH}") == ""


@cmake
@compiler
def test_without_cmake_ninja_or_pybind11_there_is_no_extension(tmp_path: Path) -> None:
    real = [str(shutil.which("cmake", path=PATH))]
    old, broken = tool(tmp_path / "old", "echo cmake version 3.19.8"), tool(tmp_path / "broken", "exit 127")
    install = f"install it with: {sys.executable} -m pip install"
    blind = tool(tmp_path / "blind", "echo cmake version 3.20.0")  # finds no headers
    for found, reason in (
        ({"cmake": [old, broken]}, f"CMake 3.20 or newer was not found; {install} cmake"),
        ({"cmake": [old, *real], "ninja": [broken], "make": []}, f"neither ninja nor make was found; {install} ninja"),
        ({"cmake": [blind], "ninja": ["true"]}, f"pybind11's headers were not found; {install} pybind11"),
        ({"cmake": real, "ninja": [broken], "make": ["true"]}, ""),
    ):
        assert why_no_extension(tmp_path, found=found) == reason


@compiler
def test_a_full_temporary_folder_is_not_called_a_missing_compiler(tmp_path: Path) -> None:
    said = why_no_extension(tmp_path, largest=1 << 20, TMPDIR=str(tmp_path))
    assert said.startswith(f"no temporary folder has room for 32 MiB: {tmp_path} (File too large), /tmp (")
    said = why_no_extension(tmp_path, TMPDIR=str(tmp_path / "missing"))  # another one serves
    assert said == f"cat_kernels: /tmp is the temporary folder, not {tmp_path}/missing (No such file or directory)."


def test_nothing_is_written_into_a_source_tree_that_cannot_be(source: Path, tmp_path: Path) -> None:
    """A file in place of the folder `build` stops root as well, whom permissions do not."""
    copy = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (copy / "build").write_text("")
    (tmp_path / "temporary").mkdir()
    before = sorted(copy.rglob("*"))
    wheel = [sys.executable, "-B", "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    done = run(wheel, copy, CAT_KERNELS_EXTENSION="off", TMPDIR=str(tmp_path / "temporary"))
    assert done.returncode == 0, done.stdout
    assert f"since {copy}/build cannot be: Not a directory" in done.stdout
    assert len(list(tmp_path.glob("*-py3-none-any.whl"))) == 1
    assert sorted(copy.rglob("*")) == before
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_full_disk_leaves_module_and_record_as_they_were(tmp_path: Path) -> None:
    module, record = tmp_path / "_C.so", tmp_path / "_build.json"
    module.write_text("module")
    record.write_text("record")
    program = PROBE + (
        "from pathlib import Path\n"
        f"script.replace({{Path({str(module)!r}): b'new', Path({str(record)!r}): bytes(1 << 20)}})\n"
    )
    arguments = [str(ROOT / "setup.py"), json.dumps([30, None, 1 << 16])]
    done = run([sys.executable, "-B", "-c", program, *arguments], tmp_path, CAT_KERNELS_EXTENSION="off")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith(f"{record} cannot be written (File too large)")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"_C.so": "module", "_build.json": "record"}


def test_the_record_of_another_pythons_module_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cat_kernels import extension

    monkeypatch.setattr(extension, "BUILD_RECORD", tmp_path / "_build.json")
    record = {"built": True, "reason": "", "cuda_reason": "no nvcc"}
    for module, expected in (("_C.other.so", None), (extension.MODULE, "no nvcc")):
        extension.BUILD_RECORD.write_text(json.dumps(record | {"module": module}))
        assert extension._recorded("cuda_reason") == expected
    extension.BUILD_RECORD.write_text("[]")
    assert extension._recorded("cuda_reason") is None


# --- the library without Python ---------------------------------------------------------------------------------------


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
