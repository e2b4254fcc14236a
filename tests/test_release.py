"""What a release is made of: what wheels may need of a system, the container images, the conda recipe, the citation.

One wheel is really built, for this Python and without GPU code (slow, and pip gets its tools from the package index).
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cat_kernels

pytest.importorskip("elftools", reason="needs pyelftools")
yaml = pytest.importorskip("yaml")

from benchmarks.resources import find_nvcc  # noqa: E402
from release import trial, wheels  # noqa: E402
from release.contents import ARCHITECTURES, LIBRARIES, Module, problems  # noqa: E402
from tests.test_build import Environment  # noqa: E402

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GCC = {"libstdc++.so.6", "libgcc_s.so.1"}  # of a build for this machine alone
compiler = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")


def library(path: Path, source: str, *options: str) -> Path:
    """A shared library of a few lines of C, stripped as the module is."""
    command = ["gcc", "-shared", "-fPIC", "-s", "-o", str(path), "-x", "c", "-", "-x", "none", *options]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def wheel(folder: Path, module: Path | None, **more: str) -> Path:
    path = folder / "cat_kernels-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat_kernels/__init__.py", "")
        archive.writestr("cat_kernels/_build.json", json.dumps({"architectures": [], "cuda_reason": "no nvcc"}))
        if module:
            archive.write(module, "cat_kernels/_C.cpython-311-x86_64-linux-gnu.so")
        for name, text in more.items():
            archive.writestr(name, text)
    return path


# ---------------------------------------------------------------- wheels


def test_the_extension_here_needs_only_the_system_and_shows_only_its_entry() -> None:
    """Nothing of libcudart or libtorch; the CUDA runtime that is linked in stays inside."""
    path = next(iter(Path(cat_kernels.__path__[0]).glob("_C*.so")), None)
    if path is None:
        pytest.skip("the extension was not built")
    module = Module.read(io.BytesIO(path.read_bytes()))
    assert module.needed <= LIBRARIES | GCC
    assert module.strangers(also=("GLIBCXX_", "CXXABI_", "GCC_")) == []
    assert module.exported == {"PyInit__C"}


TWICE = """
import importlib.util, sys
from importlib.machinery import ExtensionFileLoader
for name, path in zip(("one._C", "two._C"), sys.argv[1:]):
    loader = ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    assert module.about()["cpu"], name
"""


def test_two_copies_of_the_extension_run_in_one_process(tmp_path: Path) -> None:
    """As when a kernel hub's copy of the package is loaded beside the installed one."""
    path = next(iter(Path(cat_kernels.__path__[0]).glob("_C*.so")), None)
    if path is None:
        pytest.skip("the extension was not built")
    copies = [str(shutil.copy(path, tmp_path / name)) for name in ("one.so", "two.so")]
    done = subprocess.run([sys.executable, "-c", TWICE, *copies], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@compiler
def test_symbols_of_other_libraries_and_of_a_new_glibc_are_found(tmp_path: Path) -> None:
    source = """
    extern int cudaMalloc(void **, unsigned long), PyLong_AsLong(void *), perhaps(void) __attribute__((weak));
    extern void *memcpy(void *, const void *, unsigned long);
    void *PyInit__C(void *a) {
      void *p;
      cudaMalloc(&p, PyLong_AsLong(a));
      return perhaps ? a : memcpy(p, a, *(long *)a);
    }
    """
    module = Module.read(io.BytesIO(library(tmp_path / "library.so", source).read_bytes()))
    assert module.exported == {"PyInit__C"}
    assert module.strangers() == ["cudaMalloc"]
    assert module.too_new() == []
    assert module.too_new(glibc=(2, 13)) == ["memcpy (GLIBC_2.14)"]


@compiler
def test_a_wheel_that_must_not_be_published_says_why(tmp_path: Path) -> None:
    other = library(tmp_path / "z.so", "int z;", "-Wl,-soname,libz.so.1")
    source = "extern int cudaFree(void *); int another(void *a) { return cudaFree(a); }"
    bad = library(tmp_path / "bad.so", source, "-Wl,--no-as-needed", str(other))
    strays = {"setup.py": "", "cat_kernels.libs/libgomp.so.1": ""}
    said = "; ".join(problems(wheel(tmp_path, bad, **strays), cuda=True))
    for part in (
        "libraries were put into it: cat_kernels.libs/libgomp.so.1",
        "it would install cat_kernels.libs, setup.py beside the two packages",
        "needs libz.so.1, which are not of glibc",
        "symbols that neither glibc nor Python has: cudaFree",
        "shows more than PyInit__C: another",
        f"its GPU code is for none (no nvcc); wheels are for {', '.join(ARCHITECTURES)}",
    ):
        assert part in said
    assert "0 modules cat_kernels/_C" in problems(wheel(tmp_path, None), cuda=False)[0]


def test_wheels_are_for_all_architectures_of_a_build_and_all_pythons_of_the_package() -> None:
    text = (ROOT / "cmake" / "nvcc.cmake").read_text()
    default = re.search(r"set\(CAT_DEFAULT_ARCHITECTURES ([\d ]+)\)", text)
    assert default is not None
    assert [*default[1].split(), f"{default[1].split()[-1]}-virtual"] == ARCHITECTURES
    named = {found[1] for line in PROJECT["project"]["classifiers"] if (found := re.search(r":: (3\.\d+)$", line))}
    assert {f"python{version}" for version in named} == set(wheels.PYTHONS)


def test_a_python_that_is_not_here_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(wheels.Failed, match=r"none of /nowhere/python3\.12, false is here; name one: make wheel"):
        wheels.make(tmp_path / "dist", ["/nowhere/python3.12", "false"], "off", [])
    assert "no wheel for /nowhere/python3.12, which is not here" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()


@pytest.mark.slow
def test_the_cuda_source_calls_no_cpp_library(tmp_path: Path) -> None:
    """nvcc's host compiler may have another one than the compiler that links."""
    nvcc, nm = find_nvcc(), shutil.which("nm")
    if nvcc is None or nm is None:
        pytest.skip("needs nvcc and nm")
    source, made = ROOT / "csrc" / "fbank" / "cuda.cu", tmp_path / "cuda.o"
    subprocess.run([nvcc, "-std=c++17", "-arch=sm_90", "-c", source, "-o", made], check=True, cwd=tmp_path)
    said = subprocess.run([nm, "--undefined-only", made], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in said.splitlines()]
    assert "cudaSetDevice" in names
    # The guards and the personality are what nvcc's own code asks for, and the same in every C++ runtime.
    assert [name for name in names if re.match(r"_ZN?K?S|_Zn|_Zd|__cxa_(?!guard_)", name)] == []


@pytest.mark.slow
def test_a_wheel_for_old_systems_runs_with_the_same_numbers(tmp_path: Path) -> None:
    for package in ("ziglang", "auditwheel", "build"):
        pytest.importorskip(package, reason="needs the extra [release]")
    probe = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path / "probe"), "pybind11"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs a package index")
    made, sources = wheels.make(tmp_path / "dist", [sys.executable], "off", [])
    assert made.name.endswith("-manylinux_2_28_x86_64.whl")
    assert sorted(path.name for path in (tmp_path / "dist").iterdir()) == sorted([made.name, sources.name])
    environment = Environment.make(tmp_path / "venv")
    installed = environment.pip("install", "--no-deps", "--ignore-installed", str(made))
    assert installed.returncode == 0, installed.stdout
    report = environment.report()
    assert report["backend"] == "native"
    assert 0 < report["error"] < 3e-3
    assert report["about"]["compiler"].startswith("Clang")
    assert report["about"]["cpus"] == trial.instruction_sets()


# ---------------------------------------------------------------- containers


def test_the_container_images_take_only_what_is_there() -> None:
    text = (ROOT / "release" / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)
    assert {"cpu", "cuda"} <= set(stages)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert [name for name in allowed if not (ROOT / name).exists()] == []
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "cmake", "csrc", "cat", "cat_kernels"} <= allowed
    copied = re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE)
    assert set(copied) - {"."} <= allowed
    extras = {name for group in re.findall(r"\*\.whl\)\[([\w,]+)\]", text) for name in group.split(",")}
    assert extras
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    python = re.search(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE)
    assert python is not None
    assert f"(Python {python[1]})" in (ROOT / "constraints.txt").read_text()


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint, which the extra [release] has")
    done = subprocess.run([hadolint, "--no-color", ROOT / "release" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- conda, citation

CONDA = {"torch": "pytorch", "soundfile": "pysoundfile", "soxr": "soxr-python", "matplotlib": "matplotlib-base"}


def conda_names(requirements: list[str]) -> set[str]:
    """soundfile>=0.12 -> pysoundfile >=0.12."""
    split = [re.fullmatch(r"([\w-]+)(.*)", requirement) for requirement in requirements]
    return {f"{CONDA.get(found[1], found[1])} {found[2]}".strip() for found in split if found}


def test_the_conda_recipe_asks_for_what_the_package_asks_for() -> None:
    recipe = yaml.safe_load((ROOT / "release" / "recipe.yaml").read_text())
    wanted = recipe["requirements"]
    assert recipe["context"]["version"] == cat_kernels.__version__
    assert conda_names(PROJECT["project"]["dependencies"]) == set(wanted["run"]) - {"python"}
    assert conda_names(PROJECT["project"]["optional-dependencies"]["train"]) == set(wanted["run_constraints"])
    plain = {line for part in ("build", "host") for line in wanted[part] if isinstance(line, str)}
    assert conda_names(PROJECT["build-system"]["requires"]) <= plain


def test_rattler_build_understands_the_recipe() -> None:
    rattler_build = pytest.importorskip("rattler_build", reason="needs the extra [release]")
    recipe = rattler_build.Stage0Recipe.from_file(str(ROOT / "release" / "recipe.yaml"))
    variants = rattler_build.VariantConfig.from_file(str(ROOT / "release" / "variants.yaml"))
    made = [one.recipe.to_dict() for one in recipe.render(variants)]
    assert len(made) == len(wheels.PYTHONS)
    for one in made:
        assert one["build"]["script"]["env"]["CAT_KERNELS_CUDA"] == "off"
        assert "sysroot_linux-64 2.28.*" in one["requirements"]["build"]


def test_the_citation_is_of_this_version() -> None:
    """Validated with cffconvert, which does not install beside what is pinned here; see docs/release.md."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == cat_kernels.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert {"message", "title", "authors"} <= set(citation)
    assert [one["name"] for one in citation["authors"]] == [one["name"] for one in PROJECT["project"]["authors"]]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2601.21612"
