"""The documentation as `make docs` builds it: without a warning, and every link leads somewhere on the site too."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cat.commands import COMMANDS
from tests.documented import ROOT, parser_of


def extension(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_extensions" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("docs/data.md", "shards.md#order", "shards.md#order"),
        ("docs/fusion.md", "../benchmarks/README.md", "repository/benchmarks/README.md"),
        ("docs/evidence/kernels.md", "../../README.md#install", "../repository/README.md#install"),
        ("docs/evidence/kernels.md", "../figures/a.png", "../figures/a.png"),
        ("README.md", "docs/evidence/index.md", "../evidence/index.md"),
        ("README.md", "benchmarks/README.md", "benchmarks/README.md"),
        ("benchmarks/README.md", "../docs/data.md#labels", "../../data.md#labels"),
        ("README.md", "setup.py", "setup.py"),
        ("README.md", "https://example.org/docs/data.md", "https://example.org/docs/data.md"),
        ("README.md", "#install", "#install"),
    ],
)
def test_links_are_those_of_the_site(page: str, link: str, there: str) -> None:
    copied = ["README.md", "benchmarks/README.md"]
    assert extension("repository_pages").relinked(f"a [b]({link}), c", page, copied) == f"a [b]({there}), c"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    copy_of(["docs", *extension("repository_pages").pages(ROOT)], tmp_path)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        str(tmp_path / "docs"),
        str(tmp_path / "site"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]

    def text(page: str) -> str:
        return (tmp_path / "site" / f"{page}.html").read_text(encoding="utf-8")

    commands = text("commands")
    for name in COMMANDS:
        for option in parser_of(name)._option_string_actions:
            assert option in commands, f"{name} {option}"
    assert 'href="repository/benchmarks/README.html"' in text("checkpoints")
    assert 'href="cat_kernels/stem/README.html"' in text("repository/README")
    assert re.search(r'href="\.\./\w+\.html"', text("repository/README"))


def copy_of(names: Iterable[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("build", "repository", "__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
