"""The forms for issues are such as GitHub takes, which shows nothing of one that is not, and ask for what is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.documented import Step, check_names

yaml = pytest.importorskip("yaml")
FOLDER = Path(__file__).parents[1] / ".github" / "ISSUE_TEMPLATE"
FORMS = sorted(path for path in FOLDER.glob("*.yml") if path.name != "config.yml")
# type -> keys of its attributes, those that must be there first (docs.github.com, syntax for GitHub's form schema)
ATTRIBUTES = {
    "markdown": (["value"], []),
    "input": (["label"], ["description", "placeholder", "value"]),
    "textarea": (["label"], ["description", "placeholder", "value", "render"]),
    "checkboxes": (["label", "options"], ["description"]),
}


def form(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one_that_github_takes(path: Path) -> None:
    found = form(path)
    assert set(found) <= {"name", "description", "title", "labels", "assignees", "body"}
    assert found["name"]
    assert found["description"]
    fields = [field for field in found["body"] if field["type"] != "markdown"]
    assert fields, "a form must ask something"
    for field in found["body"]:
        required, others = ATTRIBUTES[field["type"]]
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert set(required) <= set(field["attributes"]) <= {*required, *others}
        assert set(field.get("validations", {})) <= {"required"}
        assert all(isinstance(value, bool) for value in field.get("validations", {}).values())
        assert all(set(option) <= {"label", "required"} for option in field["attributes"].get("options", []))
        assert all(isinstance(field["attributes"].get(key, ""), str) for key in ("label", "description", "value"))
    for values in ([field["id"] for field in fields], [field["attributes"]["label"] for field in fields]):
        assert len(set(values)) == len(values)
    assert all(re.fullmatch(r"[\w-]+", field["id"]) for field in fields)


def test_names_differ_and_the_settings_are_known() -> None:
    assert len({form(path)["name"] for path in FORMS}) == len(FORMS) >= 3
    assert set(form(FOLDER / "config.yml")) <= {"blank_issues_enabled", "contact_links"}


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "wish"], ids=lambda path: path.stem)
def test_what_a_form_asks_for_can_be_typed(path: Path) -> None:
    report = next(field for field in form(path)["body"] if field.get("id") == "report")
    assert report["validations"] == {"required": True}
    assert "cat-audio doctor --report" in report["attributes"]["label"]
    commands = re.findall(r"`(cat-audio [^`]+)`", path.read_text(encoding="utf-8"))
    for command in commands:
        if "COMMAND" not in command:
            check_names(Step(str(path), 1, "sh", command))
