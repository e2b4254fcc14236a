"""The rooms of `cat`: which may import which. Arrows point downwards, in comments for a type checker too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CAT = Path(__file__).parents[1] / "cat"

# From the top. A room may use those below it that are named, and itself; BASE has no arrow to the rest.
BASE = {
    *("config", "device", "distributed", "ending", "files", "locks", "outputs", "parts", "progress", "provenance"),
    *("scaling", "signals"),
}
ROOMS: dict[str, set[str]] = {
    "commands": {"*"},
    "experiments": {"figures", "training", "evaluation", "encoders", "data", "model", *BASE},
    "figures": {"training", "prediction", "data", *BASE},
    "report": {"training", "data", *BASE},
    "bugreport": {"training", "doctor", *BASE},
    "training": {"evaluation", "encoders", "checkpoints", "data", "model", *BASE},
    "export": {"prediction", "checkpoints", "data", "model", *BASE},
    "harnesses": {"encoders", *BASE},
    "evaluation": {"prediction", "encoders", "checkpoints", "data", "model", *BASE},
    "prediction": {"encoders", "checkpoints", "data", "model", *BASE},
    "encoders": {"checkpoints", "data", "model", *BASE},
    "checkpoints": {"data", "model", *BASE},
    "data": {"sounds", *BASE},
    "model": BASE,
    "sounds": set(),
    "distributed": {"config", "device", "ending", "progress"},
    "device": {"config"},
    "config": {"files"},
    "doctor": set(),
    "locks": {"files", "progress"},
    "ending": set(),
    "files": set(),
    "outputs": set(),
    "parts": set(),
    "progress": set(),
    "provenance": set(),
    "scaling": set(),
    "signals": set(),
}
DOORS = {"__init__", "__main__"}  # the package's own names, and the command


def room(path: Path) -> str:
    return path.relative_to(CAT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Modules of `cat` that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative; `cat` is imported by its full name"
            names = [node.module or ""]
            if node.module == "cat":
                names = [f"cat.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == "cat"}
    return found


SOURCES = sorted(path for path in CAT.rglob("*.py") if room(path) not in DOORS)


def test_every_room_has_its_rule() -> None:
    assert {room(path) for path in SOURCES} == set(ROOMS)
    order = list(ROOMS)
    for above, below in ROOMS.items():
        assert all(order.index(name) > order.index(above) for name in below - {"*"}), f"{above} uses one above it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CAT)))
def test_arrows_point_down(path: Path) -> None:
    allowed = ROOMS[room(path)]
    for name in imported(path):
        target = name.split(".")[1]
        assert target == room(path) or "*" in allowed or target in allowed, f"{path} imports {name}"


def test_inside_a_room_nothing_runs_in_a_circle() -> None:
    arrows = {module(path): imported(path) for path in CAT.rglob("*.py")}
    # `from cat.data import x` in a file of cat.data would lead through the room's own door.
    for name, targets in arrows.items():
        assert name == "cat" or name.rpartition(".")[0] not in targets - {"cat"}, f"{name} imports its own room"
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for target in arrows.get(name, ()):
                visit(target, (*way, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


def module(path: Path) -> str:
    return ".".join(path.relative_to(CAT.parent).with_suffix("").parts).removesuffix(".__init__")


def test_a_command_has_nothing_to_call_but_itself() -> None:
    """What a Python user would want is in a room below."""
    for path in (CAT / "commands").glob("[!_]*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        assert public == {"add_arguments", "run"}, path
