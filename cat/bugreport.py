"""What a report of a fault needs, as Markdown to paste: this machine, and of a run its settings and last records.

Nothing of the user's leaves with it. Of a configuration only what the program itself knows is told (numbers, choices,
defaults); every other text, and in running text everything that looks like a path, an address or a name of this
machine, is replaced: the same one by the same stand-in, so that a reader sees what belongs together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import itertools
import json
import os
import platform
import re
import socket
import sysconfig
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from cat import doctor
from cat.config import ConfigError, read_yaml
from cat.provenance import ROOT, commit
from cat.training.finetune_recipe import TASKS, FinetuneConfig
from cat.training.recipe import PretrainConfig
from cat_kernels import __version__

ROWS = 20  # of metrics.jsonl that are shown
LISTED = 20  # values of a list
_WORDS = {*TASKS, "mean", "sum"}  # choices of fields whose type does not name them
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/dev", "/proc", "/sys", "/etc")  # the same for everybody
_SCHEMES = ("clap", "ast", "audiomae", "beats", "dasheng", "untrained", "onnx", "tflite", "https", "http", "s3", "gs")
_VARIABLE = re.compile(r"(CAT|CUDA|GLOO|KMP|MKL|NCCL|OMP|OPENBLAS|PYTORCH|TORCH|TRITON)_\w+|RANK|WORLD_SIZE|LOCAL_RANK")
_HARMLESS = re.compile(r"[\d.,:-]*|true|false|on|off|auto|none|full|info|warn", re.IGNORECASE)
_PATTERNS = (
    ("URL", re.compile(r"\b[a-z][a-z0-9+]*://[^\s'\"<>)]*[^\s'\"<>).,;]")),
    ("ADDRESS", re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+|\b\d{1,3}(?:\.\d{1,3}){3}\b")),
    ("TOKEN", re.compile(r"\b(?:hf_|sk-|ghp_|AKIA)\w{8,}")),
    ("PATH", re.compile(r"(?<![\w.])(?:~|\.{1,2}|[A-Za-z]:|[\w.-]+)?(?:[/\\][^\s'\"<>:;,()\[\]{}|=/\\]+)+[/\\]?")),
)


class Anonymous:
    """Texts with what is the user's replaced."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._count: Counter[str] = Counter()
        for kind, names in (("HOST", _hosts()), ("USER", _users())):
            self._known |= dict.fromkeys(names, kind)

    def name(self, text: str, kind: str = "TEXT") -> str:
        """The stand-in of a whole text; of a path its ending, and of an encoder or address its kind, stay."""
        if text not in self._known:
            self._count[kind] += 1
            scheme = next((f"{scheme}:" for scheme in _SCHEMES if text.startswith(f"{scheme}:")), "")
            ending = re.search(r"\.(?:jsonl?|tsv|csv|ya?ml|npy|npz|safetensors|onnx|pt2?|tar|wav|flac|mp3|ogg)$", text)
            self._known[text] = f"{scheme}{kind}{self._count[kind]}{ending[0] if ending else ''}"
        return self._known[text]

    def text(self, text: str) -> str:
        """A text in which names of the user's may stand."""
        known = sorted((one for one in self._known if len(one) > 1), key=len, reverse=True)
        if known:
            pattern = "|".join(rf"(?<!\w){re.escape(one)}(?!\w)" for one in known)
            text = re.sub(pattern, lambda match: self._known[match[0]], text)
        for kind, pattern_of_kind in _PATTERNS:
            text = pattern_of_kind.sub(lambda match, kind=kind: self._stand_in(match[0], kind), text)  # type: ignore[misc]
        return text

    def _stand_in(self, found: str, kind: str) -> str:
        if kind == "PATH":
            if found.startswith(tuple(f"{folder}/" for folder in _SYSTEM)) or not re.search(r"[^\W\d_]", found):
                return found
            packages = sysconfig.get_paths()["purelib"]
            if found.startswith(packages):
                return f"site-packages{found.removeprefix(packages)}"
        return self.name(found, kind)


def bug_report(run: Path | None = None) -> str:
    """The report, of a run directory too.

    Raises: `ConfigError` for a directory that is no run's.
    """
    hide = Anonymous()
    sections = [("Machine", "text", hide.text(doctor.report())), ("Environment", "text", "\n".join(_environment()))]
    if run is not None:
        sections += _of_run(run, hide)
    lines = [
        f"### cat-kernels {__version__}{_commit()}, Python {platform.python_version()}",
        "",
        "Made by `cat-audio doctor --report`. Names, paths and texts of yours are replaced (PATH1, TEXT2): please read "
        "it all the same before you send it.",
    ]
    for title, language, text in sections:
        fence = "`" * (1 + max(map(len, re.findall("`{3,}", text)), default=2))
        lines += ["", f"<details><summary>{title}</summary>", "", fence + language, text, fence, "", "</details>"]
    return "\n".join(lines)


def _commit() -> str:
    """Of a checkout; where the package is installed into another project's tree, that one's is nobody's business."""
    found = commit() if (ROOT / ".git").exists() else None
    return f" ({found})" if found else ""


def _environment() -> Iterator[str]:
    for name, value in sorted(os.environ.items()):
        if _VARIABLE.fullmatch(name):
            yield f"{name}={value if _HARMLESS.fullmatch(value) else '(set)'}"


def _hosts() -> set[str]:
    name = socket.gethostname()
    return {name, name.partition(".")[0]} - {"", "localhost"}


def _users() -> set[str]:
    found = {Path.home().name}
    with contextlib.suppress(OSError, KeyError):  # a container's user without a name
        found.add(getpass.getuser())
    return found - {"", "root", "user"}


# ---------------------------------------------------------------- of a run


def _of_run(run: Path, hide: Anonymous) -> Iterator[tuple[str, str, str]]:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run directory (it has no config.yaml); expected the folder of a run: runs/NAME")
    hide.name(str(run.absolute()), "PATH")
    hide.name(str(run), "PATH")
    failures = _rows(run / "failures.jsonl")
    for failure in failures:  # known from here on, also where a warning names them
        hide.name(str(failure.get("path")), "PATH")
        hide.name(Path(str(failure.get("path"))).name, "FILE")
    yield "Configuration of the run", "yaml", "\n".join(_configuration(run, hide))
    rows = _rows(run / "metrics.jsonl")
    told = [_numbers(row, hide) for row in rows if row["kind"] != "warning"][-ROWS:]
    warned = [(row.get("step"), str(row.get("text"))) for row in rows if row["kind"] == "warning"][-ROWS:]
    warnings = [f"warning at step {step}: {hide.text(text)}" for step, text in warned]
    skipped = len(list((run / "skipped").glob("step-*.json")))
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    about = [f"checkpoints: {', '.join(steps) or 'none'}", f"updates that were skipped: {skipped}"]
    yield "Records of the run", "text", "\n".join([*about, *warnings, *told])
    if failures:
        reasons = Counter(hide.text(str(failure.get("reason"))) for failure in failures)
        counted = [f"{count} x {reason}" for reason, count in reasons.most_common(ROWS)]
        yield "Clips that could not be read", "text", "\n".join(counted)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Those that can be read: a run may have been killed, or its disk full."""
    rows = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    rows.append({"kind": "", **row})
    except OSError:
        pass
    return rows


def _numbers(row: Mapping[str, Any], hide: Anonymous) -> str:
    """The numbers of a record; its keys may end in a guide's name."""
    values = [(key, value) for key, value in row.items() if value is None or isinstance(value, bool | int | float)]
    return " ".join([str(row["kind"]), *(f"{hide.text(key)}={_short(value)}" for key, value in values)])


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _configuration(run: Path, hide: Anonymous) -> Iterator[str]:
    try:
        mapping = read_yaml(run / "config.yaml")
    except (ConfigError, ImportError) as error:
        yield f"cannot be read: {hide.text(str(error))}"
        return
    yield from _section(mapping, PretrainConfig if "masks" in mapping else FinetuneConfig, hide, "")


def _section(mapping: Mapping[str, Any], kind: Any, hide: Anonymous, indent: str) -> Iterator[str]:
    fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    hints = typing.get_type_hints(kind) if fields else {}
    member = typing.get_args(kind)[1] if typing.get_origin(kind) is Mapping else None
    for key, value in mapping.items():
        own = str(key) if key in fields or not isinstance(key, str) else hide.name(key, "NAME")
        hint = hints.get(key, member)
        if isinstance(value, Mapping):
            yield f"{indent}{own}:"
            yield from _section(value, hint, hide, f"{indent}  ")
        else:
            default = {fields[key].default} if key in fields else set()
            yield f"{indent}{own}: {_value(value, _WORDS | _choices(hint) | default, hide)}"


def _value(value: Any, choices: set[Any], hide: Anonymous) -> str:
    if isinstance(value, list):
        if len(value) > LISTED:
            return f"({len(value)} values)"
        return f"[{', '.join(_value(one, choices, hide) for one in value)}]"
    if isinstance(value, str):
        return value if value in choices else hide.name(value)
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else f"({type(value).__name__})"


def _choices(hint: Any) -> set[Any]:
    """The texts that a field's type names."""
    if typing.get_origin(hint) is Literal:
        return set(typing.get_args(hint))
    return set(itertools.chain.from_iterable(_choices(one) for one in typing.get_args(hint)))
