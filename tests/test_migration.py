"""docs/from-eat.md and docs/from-ast.md: what they call ours is ours, and lists are read as they say."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest

from cat.checkpoints.released import ENCODER_NAMES, OTHER_NAMES
from cat.commands import COMMANDS
from cat.data import load_manifest
from cat.training.finetune_recipe import FinetuneConfig
from cat.training.recipe import PretrainConfig
from tests.lookalikes import ast_list, eat_list

ROOT = Path(__file__).parents[1]
PAGES = ("docs/from-eat.md", "docs/from-ast.md")
ROW = re.compile(r"^\| (?P<theirs>.*?) \| (?P<ours>.*?) \|")
CODE = re.compile(r"`([^`]+)`")


def known_fields() -> set[str]:
    """``section.field`` of both kinds of recipe, and what stands in no section."""
    found = {"features.preset", "model.preset"}
    for recipe in (PretrainConfig, FinetuneConfig):
        for name, section in get_type_hints(recipe).items():
            inner = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
            found |= {f"{name}.{field.name}" for field in inner} or {name}
    return found


def ours(page: str) -> list[str]:
    """What stands in code in the second column of the page's tables about recipes."""
    cells, inside = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        row = ROW.match(line)
        if row is None:
            inside = inside and line.startswith("|---")
        elif "here" in row["ours"]:
            inside = True
        elif inside:
            cells += CODE.findall(row["ours"])
    return cells


@pytest.mark.parametrize("page", PAGES)
def test_every_field_that_is_named_exists(page: str) -> None:
    fields, checked = known_fields(), 0
    for code in ours(page):
        name = code.partition("=")[0].partition(":")[0]
        if re.fullmatch(r"[a-z]+\.[a-z_]+", name) and not name.endswith((".json", ".jsonl", ".csv")):
            assert name in fields, f"{page}: no recipe has a field {name}"
            checked += 1
        if code.startswith("cat-audio "):
            assert code.split()[1] in COMMANDS, f"{page}: {code}"
        if name.endswith(".yaml"):
            assert list(ROOT.glob(name)), f"{page}: {name}"
    assert checked > 15


def test_every_kind_of_parameter_is_in_the_table() -> None:
    text = (ROOT / "docs" / "from-eat.md").read_text(encoding="utf-8")
    for _, name in ENCODER_NAMES + OTHER_NAMES:
        words = name.split(".")
        known = ".".join(words[:2]) if words[0] in ("stem", "decoder") else words[0]
        if name.startswith("blocks."):
            known = f".{words[2]}"
        assert known in text or name.startswith("regulariser."), f"{name} is not in docs/from-eat.md"


def test_lists_of_eat(tmp_path: Path) -> None:
    eat_list(tmp_path / "train.tsv")
    manifest = load_manifest(tmp_path / "train.tsv")
    assert [clip.labels for clip in manifest.clips] == [("/m/hiss",)] * 4 + [("/m/hum",)] * 4
    assert manifest.label_names == {"/m/hiss": "Hiss", "/m/hum": "Hum, mains"}


def test_class_names_of_ast_come_from_their_table(tmp_path: Path) -> None:
    ast_list(tmp_path / "train.json")
    assert load_manifest(tmp_path / "train.json").label_names == {}
    shutil.copy(tmp_path / "class_labels_indices.csv", tmp_path / "label_descriptors.csv")
    manifest = load_manifest(tmp_path / "train.json")
    assert manifest.label_names == {"/m/hiss": "Hiss", "/m/hum": "Hum, mains"}
    assert {label for clip in manifest.clips for label in clip.labels} == set(manifest.label_names)
