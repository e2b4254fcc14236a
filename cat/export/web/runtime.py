"""ONNX Runtime Web, which runs the model in a browser: npm brings its package, or it is given as a file or folder."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cat.files import cache_folder, replacing

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"  # with which the page is tested
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# One thread, no GPU: the smallest build, which runs from a file too. Under the names that the page gives them.
FILES = {"runtime": "ort.wasm.min.js", "mjs": "ort-wasm-simd-threaded.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}
LICENCES = ("LICENSE", "ThirdPartyNotices.txt")
_SECONDS = 600


@dataclass(frozen=True)
class Runtime:
    """``files``: the package's, under the page's names; ``licences``: texts, under their files' names."""

    version: str
    files: dict[str, bytes]
    licences: dict[str, bytes]


def find_runtime(path: Path | None = None) -> Runtime:
    """Of ``path``, the package as npm packs it (.tgz) or unpacked; without one of the user's cache, where npm brings it
    the first time.

    Raises: ValueError for what is not that package; FileNotFoundError where there is none, with what to do.
    """
    path = path or _brought()
    if path.is_dir():
        inside = {file.name: file.read_bytes() for file in (path / "dist").glob("ort*") if file.name in FILES.values()}
        package = path / "package.json"
        told = package.read_bytes() if package.is_file() else b"{}"
    else:
        inside, told = _unpacked(path)
    missing = [name for name in FILES.values() if name not in inside]
    about = json.loads(told)
    if missing or about.get("name") != PACKAGE:
        raise ValueError(
            f"{path} is not the npm package {PACKAGE}{f': it has no dist/{missing[0]}' if missing else ''}; expected "
            f"what `npm pack {PACKAGE}@{VERSION}` writes, or its folder in node_modules"
        )
    return Runtime(str(about["version"]), {name: inside[file] for name, file in FILES.items()}, _licences())


def _brought() -> Path:
    cache = cache_folder("npm")
    name = f"{PACKAGE}-{VERSION}.tgz"
    if cache is not None and (cache / name).is_file() and _integrity(cache / name) == INTEGRITY:
        return cache / name
    remedy = f"give --runtime FILE, which `npm pack {PACKAGE}@{VERSION}` writes where npm and a network are"
    npm = shutil.which("npm")
    if npm is None or cache is None:
        what = "there is no npm here to bring it" if npm is None else "there is no home folder to keep it in"
        raise FileNotFoundError(f"the page needs the npm package {PACKAGE}, and {what}; {remedy}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", folder],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        packed = Path(folder, name)
        if done.returncode != 0 or not packed.is_file():
            said = (done.stderr or done.stdout).strip().splitlines()
            raise FileNotFoundError(f"npm could not bring {PACKAGE} {VERSION} ({'; '.join(said[-2:])}); {remedy}")
        if _integrity(packed) != INTEGRITY:
            raise ValueError(f"what npm brought as {PACKAGE} {VERSION} is not that package as published; {remedy}")
        with replacing(cache / name) as temporary:
            shutil.copyfile(packed, temporary)
    return cache / name


def _integrity(path: Path) -> str:
    """As npm writes it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()}"


def _unpacked(path: Path) -> tuple[dict[str, bytes], bytes]:
    wanted = {f"package/dist/{name}": name for name in FILES.values()}
    inside, told = {}, b"{}"
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.name in wanted and (file := archive.extractfile(member)) is not None:
                    inside[wanted[member.name]] = file.read()
                elif member.name == "package/package.json" and (file := archive.extractfile(member)) is not None:
                    told = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path} cannot be read as a .tgz ({error}); expected the npm package {PACKAGE}") from error
    return inside, told


def _licences() -> dict[str, bytes]:
    """The npm package has none in it; they are those of the same project's Python package, which checks the model."""
    spec = importlib.util.find_spec("onnxruntime")
    folder = Path(str(spec.origin)).parent if spec is not None else Path()
    return {name: (folder / name).read_bytes() for name in LICENCES}
