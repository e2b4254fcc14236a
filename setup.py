"""Build script: drives CMake, and goes without the extension where nothing can compile it.

All metadata lives in pyproject.toml. The environment variables are explained in docs/install.md:
CAT_KERNELS_EXTENSION, CAT_KERNELS_CUDA, CMAKE_CUDA_ARCHITECTURES, MAX_JOBS, CMAKE_ARGS, CXX, CUDACXX.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "cat_kernels"
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
RECORD = "_build.json"  # what was built and why not more; cat_kernels.explain() reads it
OLDEST_CMAKE = (3, 20)  # also in CMakeLists.txt
OLDEST_SETUPTOOLS = 77  # also in pyproject.toml, which older ones do not understand
ROOM = 32  # MiB; building takes 22 of the temporary folder and 11 of its own
PATIENCE = 60  # seconds for a tool to say its version or to compile a few lines
TRY = "#include <optional>\n#include <string_view>\n#include <variant>\n" + (
    "int main() { if constexpr (true) return int(std::optional<std::string_view>().has_value()); }\n"
)
WITHOUT = "CAT_KERNELS_EXTENSION=off installs without the extension (PyTorch operations only)"


def switch(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{name}={value} is none of auto, on and off.")
    return value


class Missing(Exception):
    """What the extension cannot be built without, in words."""


@functools.cache
def why_no_extension() -> str:
    """Empty where the extension can be built, otherwise the reason; a compile error of ours is none."""
    if switch("CAT_KERNELS_EXTENSION") == "off":
        return "CAT_KERNELS_EXTENSION=off when it was installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python.h is missing in {sysconfig.get_path('include')}; install it (on Debian and Ubuntu: python3-dev)"
    try:
        for find in (temporary_folder, compiler, cmake, generator, pybind11):
            find()
    except Missing as missing:
        return str(missing)
    return ""


def run(command: list[str], times: int = 1) -> "subprocess.CompletedProcess[str]":
    """Its standard output and error together, in English; what cannot start or does not end has failed as well."""
    patience = times * PATIENCE
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "LANGUAGE": "en"}
    try:
        process = subprocess.Popen(
            command, **streams, env=environment, encoding="utf-8", errors="replace", start_new_session=True
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, f"{command[0]}: {error.strerror}")
    try:
        said, _ = process.communicate(timeout=patience)
        return subprocess.CompletedProcess(command, process.returncode, said)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started, which may hold the pipe
        process.communicate()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        return subprocess.CompletedProcess(command, 124, f"it did not end within {patience} seconds")


def complaint(done: "subprocess.CompletedProcess[str]") -> str:
    """The line of the output that tells most."""
    lines = [line.strip() for line in printable(done.stdout).splitlines() if line.strip()]
    lines.sort(key=lambda line: not re.search("error|fatal|not found", line, re.IGNORECASE))  # stable
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return lines[0][:300] if lines else f"it ended with {ended}"


def printable(text: str) -> str:
    """Without the colours and whatever else a program may put out."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def no_room(folder: Path) -> str:
    """Why files of the size that building needs cannot be written there, or empty."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM << 20))
    except OSError as error:
        return str(error.strerror)
    return ""


@functools.cache
def temporary_folder() -> Path:
    """One with room, which becomes everybody's: compilers fail where TMPDIR is full or missing."""
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    unusable = []
    for folder in [*(Path(name).absolute() for name in named if name), Path("/tmp"), Path("/var/tmp")]:
        problem = no_room(folder)
        if not problem:
            if unusable:
                print(f"cat_kernels: {folder} is the temporary folder, not {', '.join(unusable)}.", file=sys.stderr)
            os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
            return folder
        unusable.append(f"{folder} ({problem})")
    raise Missing(
        f"no temporary folder has room for {ROOM} MiB: {', '.join(dict.fromkeys(unusable))}; TMPDIR names one"
    )


@functools.cache
def build_folder() -> Path:
    """`build` in the source tree, or a temporary folder where that cannot be written."""
    folder = ROOT / "build"
    problem = no_room(folder if folder.exists() else ROOT)
    if problem:
        try:
            folder = Path(tempfile.mkdtemp(prefix="cat-kernels-", dir=temporary_folder()))
        except Missing as missing:
            raise SystemExit(f"{folder} cannot be written ({problem}), and {missing}.") from None
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        print(f"cat_kernels: built in {folder}, since {ROOT / 'build'} cannot be: {problem}.", file=sys.stderr)
    return folder


@functools.cache
def compiler() -> str:
    """CXX, or else the first of the usual compilers that compiles and links a few lines of C++17."""
    whole = os.environ.get("CXX", "").strip()
    named = [whole] if shutil.which(whole) else words("CXX")  # a path may hold spaces
    said = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text(TRY)
        for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
            if shutil.which(command[0]):
                done = run([*command, "-std=c++17", str(source), "-o", str(Path(folder, "try"))])
                if done.returncode == 0:
                    return command[0] if len(command) == 1 else shlex.join(command)
                what = complaint(done).replace(str(source), "try.cpp")
                said.append(f"{shlex.join(command)} does not compile C++17: {what}")
    if said:
        raise Missing(said[0])
    if named:
        what = "is no program that can be run" if Path(named[0]).exists() else "was not found"
        raise Missing(f"the compiler CXX={whole} {what}")
    raise Missing("no C++ compiler was found (c++, g++ or clang++)")


def words(name: str) -> list[str]:
    """What the environment variable holds, as a shell would take it apart."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        raise SystemExit(f"{name}={os.environ[name]} cannot be understood: {error}.") from None


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


@functools.cache
def cmake() -> str:
    for path in tools("cmake"):
        version = re.search(r"version (\d+)\.(\d+)", run([path, "--version"]).stdout)
        if version and (int(version[1]), int(version[2])) >= OLDEST_CMAKE:
            return path
    raise Missing(f"CMake {OLDEST_CMAKE[0]}.{OLDEST_CMAKE[1]} or newer was not found; {install('cmake')}")


@functools.cache
def generator() -> tuple[str, ...]:
    for name, title in (("ninja", "Ninja"), ("make", "Unix Makefiles")):
        for path in tools(name):
            if run([path, "--version"]).returncode == 0:
                return ("-G", title, f"-DCMAKE_MAKE_PROGRAM={path}")
    raise Missing(f"neither ninja nor make was found; {install('ninja')}")


@functools.cache
def pybind11() -> str:
    """The folder of its headers."""
    script = ROOT / "cmake" / "pybind11.cmake"
    done = run([cmake(), f"-DPython_EXECUTABLE={sys.executable}", "-P", str(script)])
    found = re.search(r"^-- pybind11: (.+)$", done.stdout, re.MULTILINE)
    if not found:
        raise Missing(f"pybind11's headers were not found; {install('pybind11')}")
    return found[1]


def install(package: str) -> str:
    return f"install it with: {sys.executable} -m pip install {package}"


def configure(folder: Path, build_type: str) -> None:
    """Anew each time: the cache may name the tools of an isolated build that is gone. Object files are kept."""
    for leftover in folder.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(leftover)
    for name in ("CMakeCache.txt", "error.txt"):
        (folder / name).unlink(missing_ok=True)
    command = [cmake(), "-S", str(ROOT), "-B", str(folder), *generator(), f"-DCAT_PYBIND11_INCLUDE={pybind11()}"]
    os.environ["CXX"] = compiler()  # CMake takes the one that was tried
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_BUILD_TYPE={build_type}"]
    command += [f"-DCAT_KERNELS_CUDA={switch('CAT_KERNELS_CUDA')}"]
    if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES", "").strip():
        command += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    done = run([*command, *words("CMAKE_ARGS")], times=20)
    if done.returncode:
        told = folder / "error.txt"  # ours, one sentence; CMake wraps it in a report
        said = f"{done.stdout}\nCMake failed, see above; {space(folder)}{WITHOUT}."
        raise SystemExit(told.read_text(encoding="utf-8", errors="replace").strip() if told.exists() else said)
    print(*re.findall(r"^-- (cat_kernels: .*)", done.stdout, re.MULTILINE), sep="\n", flush=True)


def compile_(folder: Path, parallel: int) -> None:
    environment = dict(os.environ)
    # nvcc's architectures in parallel; in the environment, so that another MAX_JOBS compiles nothing again.
    environment["NVCC_APPEND_FLAGS"] = f"{environment.get('NVCC_APPEND_FLAGS', '')} --threads {parallel}".strip()
    done = subprocess.run([cmake(), "--build", str(folder), "--parallel", str(parallel)], env=environment)
    if done.returncode:
        raise SystemExit(
            f"Compiling csrc/ failed, the compiler's message is above; {space(folder)}"
            f"CAT_KERNELS_CUDA=off leaves out GPU code, {WITHOUT}."
        )


def space(folder: Path) -> str:
    """Which disk is full, where one is: compilers say it in many ways."""
    places = {str(place): no_room(place) for place in (folder, temporary_folder())}
    return "".join(f"there is no room for {ROOM} MiB in {name} ({why}); " for name, why in places.items() if why)


def replace(files: dict[Path, bytes]) -> None:
    """Each whole or not at all, and none where the disk is full. A process that has loaded the old module keeps it."""
    parts = {path.with_name(f"{path.name}.part"): path for path in files}
    try:
        for part, path in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(files[path])
        for part, path in parts.items():
            part.replace(path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error.strerror}); what was there is as before.") from None
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


class Build(build):
    """The extension first, so that what stops it is not below a hundred lines about copied files."""

    # A list, as setuptools has it: other packages' plugins append to it.
    sub_commands: ClassVar = [
        ("build_ext", None),
        *(command for command in build.sub_commands if command[0] != "build_ext"),
    ]


class BuildPackages(build_py):
    """With the recipes, which stand beside the packages in a checkout, and in `cat` where there is none."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
                self.mkpath(str(Path(self.build_lib, "cat", "recipes")))
                self.copy_file(str(recipe), str(Path(self.build_lib, "cat", "recipes", recipe.name)))


class BuildExtension(build_ext):
    """CMake's module, or none with its reason; either way a record beside it."""

    def run(self) -> None:
        reason = why_no_extension()
        record: dict[str, object] = {"built": False, "reason": reason}
        module = None
        if reason:
            for name in ("CAT_KERNELS_EXTENSION", "CAT_KERNELS_CUDA"):
                if switch(name) == "on":
                    raise SystemExit(f"{name}=on, but {reason}.")
            print(f"cat_kernels: installed without its C++ extension: {reason}.", file=sys.stderr)
        if self.inplace and (problem := no_room(ROOT / PACKAGE)):
            raise SystemExit(f"{ROOT / PACKAGE} has no room for {ROOM} MiB: {problem}.")
        if not reason:
            folder = build_folder() / f"cmake-{sysconfig.get_config_var('SOABI')}"
            parallel = jobs()
            configure(folder, "Debug" if self.debug else "Release")
            compile_(folder, parallel)
            module = (folder / MODULE).read_bytes()
            text = (folder / "build.json").read_text(encoding="utf-8", errors="replace")
            record = json.loads(printable(text)) | {"module": MODULE}
        for place in (Path(self.build_lib, PACKAGE), *([ROOT / PACKAGE] if self.inplace else [])):
            files = {place / RECORD: json.dumps(record, indent=2).encode() + b"\n"}
            if module is None:
                (place / MODULE).unlink(missing_ok=True)  # of an earlier build, not of these sources
            else:
                files = {place / MODULE: module, **files}
            replace(files)


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"setuptools {OLDEST_SETUPTOOLS} or newer is needed, this is {setuptools.__version__}; "
            f"renew it with: {sys.executable} -m pip install --upgrade setuptools"
        )
    folder = build_folder()
    elsewhere = {"build": {"build_base": str(folder)}, "egg_info": {"egg_base": str(folder)}}
    setup(
        # Without it the wheel fits every platform.
        ext_modules=[] if why_no_extension() else [Extension(f"{PACKAGE}._C", sources=[])],
        cmdclass={"build": Build, "build_ext": BuildExtension, "build_py": BuildPackages},
        options={} if folder.parent == ROOT else elsewhere,  # what setuptools writes beside the sources
    )


if __name__ == "__main__":  # of setuptools and pip as well
    main()
