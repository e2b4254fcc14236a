"""Build script: drives CMake, and goes without the extension where nothing can compile it.

All metadata lives in pyproject.toml. The environment variables are explained in docs/install.md:
CAT_KERNELS_EXTENSION, CAT_KERNELS_CUDA, CMAKE_CUDA_ARCHITECTURES, MAX_JOBS, CMAKE_ARGS, CXX, CUDACXX.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = "cat_kernels"
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
RECORD = "_build.json"  # what was built and why not more; cat_kernels.explain() reads it
OLDEST_CMAKE = (3, 20)  # also in CMakeLists.txt
OLDEST_SETUPTOOLS = 77  # also in pyproject.toml, which older ones do not understand
WITHOUT = "CAT_KERNELS_EXTENSION=off installs without the extension (PyTorch operations only)"


def switch(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{name}={value} is none of auto, on and off.")
    return value


@functools.cache
def why_no_extension() -> str:
    """Empty where the extension can be built, otherwise the reason; a compile error of ours is none."""
    if switch("CAT_KERNELS_EXTENSION") == "off":
        return "CAT_KERNELS_EXTENSION=off when it was installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python.h is missing in {sysconfig.get_path('include')}; install it (on Debian and Ubuntu: python3-dev)"
    return why_no_compiler()


def why_no_compiler() -> str:
    """Compiles and links a line of C++17 with CXX, or else the usual compilers."""
    named = os.environ.get("CXX", "").strip()
    commands = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    command = next((command for command in commands if shutil.which(command[0])), None)
    if command is None:
        return f"the compiler CXX={named} was not found" if named else "no C++ compiler was found (c++, g++ or clang++)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text("#include <string>\nint main() { if constexpr (true) return (int)std::string().size(); }\n")
        done = run([*command, "-std=c++17", str(source), "-o", str(Path(folder, "try"))])
    if done.returncode:
        said = next((line for line in done.stdout.splitlines() if "error" in line), done.stdout.strip())
        return f"{shlex.join(command)} does not compile C++17: {said.replace(str(source), 'try.cpp')}"
    os.environ["CXX"] = shlex.join(command)  # CMake takes the one that was tried
    return ""


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Its standard output and error together, decoded whatever they hold."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def jobs() -> int:
    """MAX_JOBS, or the processors this process may use."""
    value = os.environ.get("MAX_JOBS", "").strip()
    if value:
        if not value.isdecimal() or int(value) == 0:
            raise SystemExit(f"MAX_JOBS={value} is no positive number.")
        return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tools(name: str) -> list[str]:
    """Where `name` is: on PATH (where an isolated build has its own), or beside this Python."""
    places = (None, sysconfig.get_path("scripts"))
    return [path for path in (shutil.which(name, path=place) for place in places) if path]


def cmake() -> str:
    for path in tools("cmake"):
        version = re.search(r"version (\d+)\.(\d+)", run([path, "--version"]).stdout)
        if version and (int(version[1]), int(version[2])) >= OLDEST_CMAKE:
            return path
    raise SystemExit(
        f"CMake {OLDEST_CMAKE[0]}.{OLDEST_CMAKE[1]} or newer was not found; install what building needs with: "
        f"{sys.executable} -m pip install cmake ninja pybind11; {WITHOUT}."
    )


def generator() -> list[str]:
    if ninja := tools("ninja"):
        return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja[0]}"]
    if make := tools("make"):
        return ["-G", "Unix Makefiles", f"-DCMAKE_MAKE_PROGRAM={make[0]}"]
    raise SystemExit(f"Neither ninja nor make was found; install one with: {sys.executable} -m pip install ninja")


def configure(folder: Path, build_type: str) -> None:
    """Anew each time: the cache may name the tools of an isolated build that is gone. Object files are kept."""
    for leftover in folder.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(leftover)
    for name in ("CMakeCache.txt", "error.txt"):
        (folder / name).unlink(missing_ok=True)
    command = [cmake(), "-S", str(ROOT), "-B", str(folder), *generator()]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_BUILD_TYPE={build_type}"]
    command += [f"-DCAT_KERNELS_CUDA={switch('CAT_KERNELS_CUDA')}"]
    if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
        command += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    done = run([*command, *shlex.split(os.environ.get("CMAKE_ARGS", ""))])
    if done.returncode:
        told = folder / "error.txt"  # ours, one sentence; CMake wraps it in a report
        said = told.read_text().strip() if told.exists() else f"{done.stdout}\nCMake failed, see above; {WITHOUT}."
        raise SystemExit(said)
    print(*re.findall(r"^-- (cat_kernels: .*)", done.stdout, re.MULTILINE), sep="\n", flush=True)


def compile_(folder: Path, parallel: int) -> None:
    environment = dict(os.environ)
    # nvcc's architectures in parallel; in the environment, so that another MAX_JOBS compiles nothing again.
    environment["NVCC_APPEND_FLAGS"] = f"{environment.get('NVCC_APPEND_FLAGS', '')} --threads {parallel}".strip()
    done = subprocess.run([cmake(), "--build", str(folder), "--parallel", str(parallel)], env=environment)
    if done.returncode:
        raise SystemExit(
            "Compiling csrc/ failed, the compiler's message is above; "
            f"CAT_KERNELS_CUDA=off leaves out GPU code, {WITHOUT}."
        )


class Build(build):
    """The extension first, so that what stops it is not below a hundred lines about copied files."""

    sub_commands = (("build_ext", None), *(command for command in build.sub_commands if command[0] != "build_ext"))


class BuildExtension(build_ext):
    """CMake's module, or none with its reason; either way a record beside it."""

    def run(self) -> None:
        self.record: dict[str, object] = {"built": False, "reason": why_no_extension()}
        if reason := why_no_extension():
            for name in ("CAT_KERNELS_EXTENSION", "CAT_KERNELS_CUDA"):
                if switch(name) == "on":
                    raise SystemExit(f"{name}=on, but {reason}.")
            print(f"cat_kernels: installed without its C++ extension: {reason}.", file=sys.stderr)
            if self.inplace:
                (ROOT / PACKAGE / MODULE).unlink(missing_ok=True)  # of an earlier build, not of these sources
        super().run()
        for folder in (Path(self.build_lib, PACKAGE), *([ROOT / PACKAGE] if self.inplace else [])):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORD).write_text(json.dumps(self.record, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        parallel = jobs()
        configure(folder, "Debug" if self.debug else "Release")
        compile_(folder, parallel)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not over the old one: a process that has loaded it would crash.
        part = target.with_name(target.name + ".part")
        shutil.copyfile(folder / MODULE, part)
        os.replace(part, target)
        self.record = json.loads((folder / "build.json").read_text())


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"setuptools {OLDEST_SETUPTOOLS} or newer is needed, this is {setuptools.__version__}; "
        f"renew it with: {sys.executable} -m pip install --upgrade setuptools"
    )
setup(
    # Without it the wheel fits every platform.
    ext_modules=[] if why_no_extension() else [Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build": Build, "build_ext": BuildExtension},
)
