"""Every Triton kernel that the GPU suite will launch, compiled where there is no GPU, packed into one file.

    python -m benchmarks.cache make gpu-cache.tar.xz            # for sm_90; shows afterwards that nothing is left
    python -m benchmarks.cache make FILE --arch 80 --processes 2 --only launch,tests/kernels/test_loss.py
    python -m benchmarks.cache unpack gpu-cache.tar.xz DIR      # what the suite does first; DIR is TRITON_CACHE_DIR

The suite's tests and benchmarks are run on a stand-in (`benchmarks.jobs`), and what they launch is compiled. Triton's
name of an entry is a hash of the compiler (its own files, which differ between Pythons), the kernel's source, its
options and the target. Packed is all but the first, so that the machine with the GPU makes the name anew; for it to
find an entry, its version of Triton must be the same, which unpacking checks.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.jobs import jobs, run_all

FORMAT = 1
FOLDER = Path(tempfile.gettempdir()) / "cat-kernels-triton"  # the suite's TRITON_CACHE_DIR, unless the user has one
FILE = re.compile(r"[\w.-]+\.(cubin|json)")


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("Triton is not installed; install it with: pip install triton") from None


# ---------------------------------------------------------------- packing


def make(out: Path, architecture: int, processes: int, only: Sequence[str], work: Path | None) -> int:
    """Compile, pack, and show with what was packed that nothing is left to compile.

    work: folder for what is compiled; of one that an earlier run left, nothing is compiled again.
    """
    names = list(only) or jobs()
    unknown = [name for name in names if name not in jobs()]
    if unknown:
        raise ValueError(f"unknown job {unknown[0]!r}; expected some of: {' '.join(jobs())}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        made = work or Path(temporary) / "made"
        done = run_all(names, architecture, made, processes)
        keys = {name: key for job in done for name, key in job.found["keys"].items()}
        launchers = sorted({source for job in done for source in job.found["launchers"]})
        raw = sum(path.stat().st_size for name in keys for path in (made / folder_of(name)).iterdir())
        pack(out, made, keys, launchers, architecture)
        compiled = time.monotonic() - began
        print(
            f"{len(keys)} instantiations and {len(launchers)} launchers in {compiled:.0f} s: {raw / 1e6:.1f} MB, "
            f"packed {out.stat().st_size / 1e6:.1f} MB; running all again with {out} unpacked",
            flush=True,
        )
        again = Path(temporary) / "again"
        unpack(out, again)
        left = [name for job in run_all(names, architecture, again, processes) for name in job.found["cold"]]
    print(f"cold compiles left: {len(left)} {' '.join(sorted(set(left)))}".rstrip(), flush=True)
    return 1 if left else 0


def folder_of(name: str) -> str:
    """Triton's name of the folder of an entry."""
    from triton.runtime.cache import _base32

    return _base32(name)


def pack(out: Path, made: Path, keys: dict[str, str], launchers: Sequence[str], architecture: int) -> None:
    """The machine code and Triton's notes on it, without the intermediate stages; whole or not at all."""
    entries, unfinished = [], out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with tarfile.open(unfinished, "w:xz") as archive:
            for number, (name, key) in enumerate(sorted(keys.items())):
                files = sorted(p for p in (made / folder_of(name)).iterdir() if FILE.fullmatch(p.name))
                files = [path for path in files if not path.name.startswith("__grp__")]
                entries.append({"key": key, "files": [path.name for path in files]})
                for path in files:
                    _add(archive, f"{number}/{path.name}", path.read_bytes())
            manifest = {"format": FORMAT, "triton": triton_version(), "architecture": architecture}
            manifest |= {"entries": entries, "launchers": list(launchers)}
            _add(archive, "manifest.json", json.dumps(manifest).encode())
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def unpack(path: Path, folder: Path) -> str:
    """Put the entries where Triton looks for them; a sentence that says what there is now.

    Paths and names are made for this machine. ValueError for a file of another Triton, another GPU, or no such file.
    """
    began = time.monotonic()
    manifest, contents = _read(path)
    here = triton_version()
    if manifest["triton"] != here:
        raise ValueError(
            f"{path} was made with Triton {manifest['triton']}, and here is {here}, which would compile everything "
            f"again; make it with that one (pip install triton=={here}), or do without: remove the file"
        )
    import torch
    from triton.runtime.cache import triton_key

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        major, minor = torch.cuda.get_device_capability()
        if manifest["architecture"] != 10 * major + minor:
            raise ValueError(
                f"{path} was made for sm_{manifest['architecture']}, and this GPU is sm_{major}{minor}; make it with "
                f"make gpu-cache ARCH={major}{minor}, or do without: remove the file"
            )
    compiler, new = triton_key(), 0
    for number, entry in enumerate(manifest["entries"]):
        name = hashlib.sha256((compiler + entry["key"]).encode()).hexdigest()
        files = {file: contents[f"{number}/{file}"] for file in entry["files"]}
        new += _place(folder / folder_of(name), name, files)
    told = f"{path}: {len(manifest['entries'])} compiled kernels ({new} new) in {folder}"
    if on_gpu:
        try:
            with _environment(TRITON_CACHE_DIR=str(folder)):
                told += f", {_build_launchers(manifest['launchers'])} launchers built"
        except Exception as error:  # Triton tries again, and says more, when it launches
            told += f", launchers not built ({error})"
    return f"{told}, {time.monotonic() - began:.1f} s"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        with tarfile.open(path, "r:xz") as archive:
            members = [member for member in archive if member.isfile()]
            contents = {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
        manifest = json.loads(contents["manifest.json"])
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}")
        for number, entry in enumerate(manifest["entries"]):
            for file in entry["files"]:
                if not FILE.fullmatch(file) or f"{number}/{file}" not in contents:
                    raise ValueError(f"file {file!r}")
    except (tarfile.TarError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of make gpu-cache, or is damaged ({error}); make it again") from None
    return manifest, contents


def _place(folder: Path, name: str, files: dict[str, bytes]) -> bool:
    """One entry, whole or not at all; False where it is there already."""
    if folder.exists():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as temporary:
        unfinished = Path(temporary) / "entry"
        unfinished.mkdir()
        for file, content in files.items():
            if file.endswith(".json"):
                content = json.dumps(json.loads(content) | {"hash": name}).encode()
                group = {each: str(folder / each) for each in files}
                (unfinished / f"__grp__{file}").write_text(json.dumps({"child_paths": group}))
            (unfinished / file).write_bytes(content)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(unfinished, folder)
    return True


def _build_launchers(sources: Sequence[str]) -> int:
    """Triton builds a small C module for every signature when it first launches it: here all at once."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    def build(source: str) -> int:
        compile_module_from_src(
            src=source,
            name="__triton_launcher",
            library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )
        return 1

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return sum(pool.map(build, sources))


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="compile and pack")
    making.add_argument("file", type=Path)
    making.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="jobs at once (default: one a core)")
    making.add_argument("--work", type=Path, help="folder for what is compiled, to go on where a run was stopped")
    making.add_argument("--only", default="", help="comma-separated jobs: test files, and the suite's pieces")
    unpacking = commands.add_parser("unpack", help="put the entries where Triton looks for them")
    unpacking.add_argument("file", type=Path)
    unpacking.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    making.add_argument("--arch", type=int, default=90, help="compute capability, e.g. 90 (default) or 80")
    options = parser.parse_args()
    try:
        if options.command == "make":
            only = [name for name in options.only.split(",") if name]
            return make(options.file, options.arch, options.processes, only, options.work)
        print(unpack(options.file, options.folder))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
