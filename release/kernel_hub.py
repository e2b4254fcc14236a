"""Write `cat_kernels` in the layout of Hugging Face's kernel hub: a source for `kernel-builder`, and builds of it.

    python -m release.kernel_hub OUT [--repo-id OWNER/cat-kernels] [--id 1a2b3c]

Nothing is compiled and only the standard library is needed: the hub's kernels of this kind ([torch-noarch]) are Python
files, operators in plain PyTorch and in Triton, under a namespace that only this build has. OUT then holds

    build.toml, CARD.md, flake.nix, torch-ext/, tests/, benchmarks/    what kernel-builder reads
    build/torch-cpu, build/torch-cuda                                  what `kernels.get_local_kernel(OUT)` loads
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "release" / "kernel-hub"
PLACEHOLDER = "OWNER/cat-kernels"  # the repository's name in the files of HERE
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
UNIQUE_ID = re.compile(r"[a-z0-9]+")  # a part of a Python name; kernels looks for it behind the last underscore
# The file that says why there is no extension: `cat_kernels.explain()` tells it.
NO_EXTENSION = {"reason": "the kernel hub's build is Python only; installed by pip, the package has it"}
NAMESPACE = '''"""Written by the build: the namespace of the operators, which no other build has."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''


def sources(package: Path, suffixes: list[str]) -> dict[str, bytes]:
    """The package's files by their paths in it: all but the namespace, the extension and what it left."""
    found = {}
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package).as_posix()
        if path.suffix.removeprefix(".") in suffixes and path.is_file() and name not in ("_ops.py", "_build.json"):
            found[name] = path.read_bytes()
    if "__init__.py" not in found:
        raise FileNotFoundError(f"{package} is no package: it has no __init__.py; run this from a checkout")
    return {**found, "_build.json": _json(NO_EXTENSION)}


def unique_id(files: Mapping[str, bytes]) -> str:
    """Ten digits that say what is in the files: the same for the same content, whatever the checkout's state."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:10]


def metadata(general: Mapping[str, Any], backend: str, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    hashes = {
        path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in sorted(files.items())
    }
    return {
        "id": name,
        **{key: general[key] for key in ("name", "version", "license")},
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }


def variant(general: Mapping[str, Any], backend: str, unique: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """One build: the files, the namespace of their operators, and what says so."""
    name = f"_{general['name'].replace('-', '_')}_{backend}_{unique}"
    files = {**files, "_ops.py": NAMESPACE.format(id=name).encode()}
    return {**files, "metadata.json": _json(metadata(general, backend, name, files))}


def layout(repo_id: str, unique: str | None) -> dict[str, bytes]:
    """Every file of the folder by its path in it."""
    config = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))
    general, suffixes = config["general"], config["torch-noarch"]["pyext"]
    module = general["name"].replace("-", "_")
    package = sources(ROOT / module, suffixes)
    unique = unique or unique_id(package)
    written = {"LICENSE": (ROOT / "LICENSE").read_bytes()}
    for name in ("build.toml", "CARD.md", "flake.nix", "tests/test_cat_kernels.py"):
        written[name] = (HERE / name).read_bytes()
    written["benchmarks/benchmark.py"] = (HERE / "benchmarks" / "benchmark.py").read_bytes()
    for name, content in written.items():
        written[name] = content.replace(PLACEHOLDER.encode(), repo_id.encode())
    written["build/CARD.md"] = written["CARD.md"]  # what is uploaded as the repository's README
    written.update({f"torch-ext/{module}/{name}": content for name, content in package.items()})
    for backend in general["backends"]:
        for name, content in variant(general, backend, unique, package).items():
            written[f"build/torch-{backend}/{name}"] = content
    return written


def write(out: Path, files: Mapping[str, bytes]) -> None:
    """All of it or nothing: into a folder beside, which then takes its name."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; delete it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for name, content in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
        part.chmod(0o755)  # mkdtemp's is for its owner alone
        part.replace(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _matching(pattern: re.Pattern[str], wanted: str) -> Any:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is no {wanted}")
        return text

    return check


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m release.kernel_hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--repo-id",
        type=_matching(REPO_ID, "repository of the hub, such as me/cat-kernels"),
        default=PLACEHOLDER,
        help="repository that card, tests and build.toml name",
    )
    parser.add_argument(
        "--id",
        type=_matching(UNIQUE_ID, "id: small letters and digits"),
        help="what makes the namespace unique (default: a digest of the files)",
    )
    args = parser.parse_args(argv)
    try:
        files = layout(args.repo_id, args.id)
        write(args.out, files)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    builds = sorted({name.split("/")[1] for name in files if re.match(r"build/.*/", name)})
    print(f"{args.out}: {len(files)} files, {', '.join(builds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
