"""What the documentation promises has a test, by the name it gives; what it tells its readers to type runs.

Every command and Python block of a page runs, in the page's order, in a folder of its own that holds what the page
takes for granted (`GIVEN`, made by `tests/lookalikes.py`; `NAMES`). Recipes and data sets are made small by what
`SMALL` puts in front of a command's own arguments. What cannot run in a test is in `NOT_RUN` with a reason, what runs
only where a package is in `NEEDS`. A command that is new in a page needs a line here only where it asks for a file that
no earlier command made, or takes long.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cat.commands import COMMANDS, main
from tests.documented import (
    ROOT,
    SHELL,
    Step,
    blocks_of,
    check_names,
    inline_commands,
    make_targets,
    pages,
    run_in_shell,
    steps_of,
)
from tests.lookalikes import (
    SMALL,
    ast_list,
    audioset,
    clap,
    classifier,
    clip,
    eat_checkpoint,
    eat_list,
    embedded,
    esc50,
    event_finder,
    events,
    folder_of_folders,
    folds,
    kernel_hub,
    manifest,
    metadata,
    quickstart,
    run,
    run_with_two_checkpoints,
    skipped_batch,
    tars,
)

ROW = re.compile(r"^\| (?P<situation>[^|]+) \| (?P<happens>[^|]+) \| (?P<tests>[^|]+) \|$")
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")

PAGES = pages()
OTHERS = ["Makefile", *(f"recipes/{path.name}" for path in sorted((ROOT / "recipes").glob("*.yaml")))]
HELPS = [f"help of {name}" for name in COMMANDS]

# ---------------------------------------------------------------- what the pages take for granted

# page -> {name in its commands: what makes it}, before the page's first command.
GIVEN: dict[str, dict[str, Callable[[Path], None]]] = {
    "README.md": {
        "path/to/audio": folder_of_folders,
        "my/sounds": folder_of_folders,
        "data/quickstart/train.jsonl": manifest,
        "runs/quickstart": run,
        "PATH_OR_HUB_NAME": clap,
    },
    "docs/checkpoints.md": {"runs/tiny": run_with_two_checkpoints},
    "docs/commands.md": {
        "clip.flac": clip,
        "my/sounds": folder_of_folders,
        "ESC-50-master.zip": esc50,
        "train.jsonl": manifest,
        "valid.jsonl": manifest,
        "test.jsonl": manifest,
        "released.pt": eat_checkpoint,
        "runs/mine": run,
        "runs/sounds": classifier,
    },
    "docs/data.md": {
        "my/recordings": folder_of_folders,
        "audioset": audioset,
        "ESC-50-master.zip": esc50,
        "data/train.jsonl": manifest,
    },
    "docs/finetuning.md": {
        "my/sounds": folder_of_folders,
        "my/test": folder_of_folders,
        "ESC-50-master.zip": esc50,
        "events.jsonl": events,
        "train.jsonl": manifest,
        "valid.jsonl": manifest,
        "test.jsonl": manifest,
        "runs/mine": run,
        "runs/finetuned": classifier,
    },
    "docs/from-ast.md": {
        "balanced_train_data.json": ast_list,
        "eval_data.json": ast_list,
        "my/sounds/metadata.csv": metadata,
        "train.jsonl": manifest,
        "valid.jsonl": manifest,
        "test.jsonl": manifest,
        "runs/base": run,
        "runs/mine": run,
    },
    "docs/from-eat.md": {"train.tsv": eat_list, "eval.tsv": eat_list, "checkpoint10.pt": eat_checkpoint},
    "docs/gallery.md": {"data/quickstart": quickstart},
    "docs/harnesses.md": {"runs/mine": run},
    "docs/inference.md": {
        "clip.flac": clip,
        "path/to/audio": folder_of_folders,
        "runs/mine": run,
        "runs/sounds": classifier,
        "runs/events": event_finder,
    },
    "docs/kernel-hub.md": {"kernel-hub": kernel_hub},
    "docs/scale.md": {"audioset.jsonl": embedded},
    "docs/shards.md": {"my/audio": folder_of_folders, "my/tars": tars},
    "docs/training.md": {"my/audio": folder_of_folders},
    "docs/visible-only.md": {"data/quickstart": quickstart},
    "docs/watching.md": {
        "my/audio": folder_of_folders,
        "runs/broken/skipped/step-00000123.json": skipped_batch,
        "runs/one": run,
        "runs/two": run,
    },
    "help of checkpoints": {"runs/tiny": run_with_two_checkpoints},
    "help of doctor": {"runs/tiny": run},
    "help of finetune": {
        "my/sounds": folder_of_folders,
        "a.jsonl": manifest,
        "b.jsonl": manifest,
        "esc50.jsonl": folds,
        "runs/tiny": run,
        "runs/base": run,
    },
    "help of prepare": {"my/audio": folder_of_folders, "audioset": audioset},
    "help of pretrain": {
        "my/audio": folder_of_folders,
        "runs/broken/skipped/step-00000123.json": skipped_batch,
    },
    "help of report": {"runs/tiny": run, "runs/other": run},
    "help of shards": {"my/audio": folder_of_folders, "my/tars": tars},
    "recipes/as20k-released.yaml": {"train.jsonl": manifest, "test.jsonl": manifest, "runs/base": run},
    "recipes/as20k.yaml": {"audioset": audioset, "runs/base": run},
    "recipes/as2m-released.yaml": {"train2m.jsonl": manifest, "test.jsonl": manifest, "runs/base": run},
    "recipes/as2m.yaml": {"audioset": audioset, "runs/base": run},
    "recipes/base.yaml": {"audioset": audioset},
    "recipes/esc50-released.yaml": {"esc50.jsonl": folds, "runs/base": run},
    "recipes/esc50.yaml": {"esc50.jsonl": folds, "runs/base": run},
    "recipes/events.yaml": {"train.jsonl": events, "valid.jsonl": events, "runs/tiny": run},
    "recipes/finetune.yaml": {
        "my/sounds": folder_of_folders,
        "train.jsonl": manifest,
        "test.jsonl": manifest,
        "runs/tiny": run,
    },
    "recipes/quickstart-classifier.yaml": {
        "data/quickstart/train.jsonl": manifest,
        "data/quickstart/valid.jsonl": manifest,
        "data/quickstart/test.jsonl": manifest,
        "runs/quickstart": run,
    },
    "recipes/spcv2-released.yaml": {"trainvalid.jsonl": manifest, "test.jsonl": manifest, "runs/base": run},
    "recipes/spcv2.yaml": {
        "train.jsonl": manifest,
        "valid.jsonl": manifest,
        "test.jsonl": manifest,
        "runs/base": run,
    },
    "recipes/tiny.yaml": {"my/folder": folder_of_folders},
}
# page -> names that its Python blocks use and do not define.
NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/training.md": lambda: {"spec": torch.randn(1, 1, 64, 128)},
}
# What cannot run here, by how it begins, and why. Of ours at least the arguments are checked.
NOT_RUN: dict[str, str] = {
    r"git clone ": "needs a network",
    r"make ": "installs; that the target exists is tested below",
    r"pip install ": "installs; tests/test_build.py builds and installs",
    r"CMAKE_CUDA_ARCHITECTURES=\w+ pip install ": "installs, and needs nvcc",
    r"docker ": "needs Docker; tests/test_release.py has the file linted",
    r"rattler-build ": "needs conda-forge; tests/test_release.py has the recipe parsed",
    r"cmake ": "tests/test_build.py configures, builds and runs the C++ tests",
    r"\. \.venv/bin/activate": "the tests' own Python is the one",
    r"torchrun ": "starts several processes; tests/cat/training/test_distributed.py does",
    r"sbatch ": "needs Slurm; tests/test_launch.py runs the script with stand-ins",
    r"LOCAL_KERNELS=.* python -m pytest": "tests/test_kernel_hub.py runs it",
    r"tensorboard ": "a server, which does not end",
    r"WANDB_MODE=offline |wandb sync ": "needs a package; tests/cat/training/test_sinks.py has it",
    r"python -m heareval|.*python -m xares": "downloads data sets; "
    "tests/cat/harnesses has the interfaces and the checkers",
    r"cat-audio pretrain .*https://": "needs a network; tests/cat/training/test_sharded.py runs it from another URL",
    r"cat-audio export .*--web|npm pack ": "needs npm and a network; tests/cat/export/test_web.py has it",
    r"python -m benchmarks.downstream": "hours; tests/test_benchmarks.py has its parts",
    r"cat-audio probe ast:": "needs a network; tests/cat/encoders/test_ast.py has it",
    r"python -m benchmarks.fused": "needs a GPU's stand-in; tests/test_fused.py runs it",
    r"cat-audio experiment \w+ --pool": "hours; tests/cat/test_studies.py runs one",
    r"cat-audio experiment length": "minutes, even of a small model; tests/cat/test_studies.py runs one",
    r"TRITON_INTERPRET=1 cat-audio experiment kernels .*run.stop_at=1[58]0": "hours in Triton's interpreter; "
    "tests/cat/test_experiments.py runs the experiment",
}
# What runs only where a package is: how it begins, and the package.
NEEDS: dict[str, str] = {
    r"CAT_CHECKPOINT=runs/mine python -c .*xares": "xares",
    r"import mteb": "mteb",
    r"from pathlib import Path\n\nimport torch\nfrom kernels": "kernels",
    r"cat-audio export .*\.onnx": "onnx",
    r"import torch\nfrom transformers": "transformers",
}
# Commands whose exit code is a verdict that so little training cannot reach.
VERDICTS = r"cat-audio (experiment|probe .*--require-better)"
# Programs that a pipe may begin or end with: scripts that stand in for them.
PROGRAMS: dict[str, str] = {
    "arecord": "head -c 48000 /dev/zero",
    "ffmpeg": f"exec {sys.executable} -c 'import soundfile, sys; "
    'soundfile.write(sys.stdout.buffer, *soundfile.read("clip.flac"), format="WAV")\'',
}


# Blocks that are neither run nor read as data: what a program printed, and directives of Sphinx.
DIRECTIVES = ("toctree", "eval-rst", "cat-audio", "only", "figure", "image", "math", "note", "warning")
SHOWN = {"", "text", *(f"{{{name}}}" for name in DIRECTIVES)}


# ---------------------------------------------------------------- what it promises


def test_every_row_of_robustness_names_a_test_that_exists() -> None:
    rows = [match for line in (ROOT / "docs" / "robustness.md").read_text().splitlines() if (match := ROW.match(line))]
    rows = [row for row in rows if row["situation"] not in ("situation", "---")]
    assert len(rows) > 50
    for row in rows:
        tests = TEST.findall(row["tests"])
        assert tests, f"no test: {row['situation']}"
        for file, name in tests:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file} has no {name}: {row['situation']}"


# ---------------------------------------------------------------- what it tells to type


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if len(steps_of(page)) > 4 else [])
        for page in PAGES + OTHERS + HELPS
        if steps_of(page)
    ],
)
def test_every_command_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("soundfile", "yaml", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    prepare(page, tmp_path, monkeypatch)
    threads = torch.get_num_threads()
    names = NAMES.get(page, dict)()
    try:
        for step in steps_of(page):
            if why_not_run(step) is None:
                run_step(step, tmp_path, names)
            elif step.language == "sh" and {"cat-audio", "cat"} & set(step.words):
                check_names(step)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_tutorial_ends_at_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fewer updates: the broken file is found, and what comes out hears more than chance would."""
    for module in ("soundfile", "yaml", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    prepare("docs/tutorial.md", tmp_path, monkeypatch)
    shorter = {
        "pretrain": ["optim.steps=10", "optim.warmup_steps=5", "run.figures=false"],
        "finetune": ["optim.steps=100", "optim.warmup_steps=10", "run.eval_every=100", "run.checkpoint_every=100"],
    }
    monkeypatch.setattr("tests.test_docs.SMALL", shorter)
    for step in steps_of("docs/tutorial.md"):
        if begins(step, r"head |cat-audio (synth|prepare|pretrain|finetune) "):
            run_step(step, tmp_path, {})
    (rejected,) = (tmp_path / "prepared" / "rejected.jsonl").read_text().splitlines()
    assert "broken.wav" in rejected
    assert "cut off" in rejected
    scores = json.loads((tmp_path / "runs" / "classifier" / "scores.json").read_text())
    assert scores["classes"] == ["bird", "drums", "rain", "siren"]
    assert scores["clips"]["test"] == 40
    assert scores["test"]["accuracy"] > 0.5, "chance is 0.25"


def prepare(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    text = "\n".join(step.text for step in steps_of(page))
    if "clap" in text:
        pytest.importorskip("transformers")
        clap(folder / ".clap")
        monkeypatch.setattr("cat.encoders.build.DEFAULT_CLAP", str(folder / ".clap"))  # of the hub otherwise
    for name, make in GIVEN.get(page, {}).items():
        make(folder / name)


def run_step(step: Step, folder: Path, names: dict[str, Any]) -> None:
    if step.language == "python":
        exec(compile("\n" * (step.line - 1) + step.text, str(ROOT / step.page), "exec"), names)
        return
    words = step.words
    if not step.is_simple or words[0] != "cat-audio":
        run_in_shell(step, folder, PROGRAMS)
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in step.settings.items():
            patch.setenv(name, value)
        code = main(made_small(words[1:]))
    assert code == 0 or (code == 1 and begins(step, VERDICTS)), f"{step}\nexit code {code}"


def made_small(words: list[str]) -> list[str]:
    """`SMALL` goes behind the recipe, where there is one; a run that is resumed, or looked into, has its settings."""
    if {"--resume", "--replay"} & {*words}:
        return words
    after = 2 if len(words) > 1 and words[1].endswith(".yaml") else 1
    return [*words[:after], *SMALL.get(words[0], []), *words[after:]]


def why_not_run(step: Step) -> str | None:
    missing = (f"without {package}" for begin, package in NEEDS.items() if begins(step, begin) and not is_here(package))
    return next((reason for begin, reason in NOT_RUN.items() if begins(step, begin)), next(missing, None))


def begins(step: Step, pattern: str) -> bool:
    return re.match(pattern, step.text, re.DOTALL) is not None


def is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_can_be_read(page: str) -> None:
    for line, language, text in blocks_of(page):
        check_block(f"{page}:{line}", language, text)


def check_block(place: str, language: str, text: str) -> None:
    if language == "json":
        for row in text.splitlines():
            json.loads(row)
    elif language == "yaml":
        yaml = pytest.importorskip("yaml")
        assert yaml.safe_load(text), f"{place}: nothing in it"
    elif language.split(" ")[0] not in {*SHOWN, *SHELL, "python"}:
        raise AssertionError(f"{place}: nothing reads a block of {language!r}")


EXAMPLES = [
    path.relative_to(ROOT).with_suffix("")
    for package in ("cat", "cat_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", [".".join(path.parts) for path in EXAMPLES])
def test_examples_in_docstrings_hold(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried
    assert not failed


def test_the_tables_hold_nothing_that_no_page_needs() -> None:
    steps = [step for page in PAGES + OTHERS + HELPS for step in steps_of(page)]
    assert len(steps) > 30
    assert [begin for begin in (*NOT_RUN, *NEEDS) if not any(begins(step, begin) for step in steps)] == []
    assert set(SMALL) <= set(COMMANDS)
    for page, given in GIVEN.items():
        texts = [step.text for step in steps if step.page == page]
        text = "\n".join(texts) if page not in OTHERS else (ROOT / page).read_text(encoding="utf-8")
        assert [name for name in given if name not in text] == [], page


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_exist(page: str) -> None:
    for step in inline_commands(page):
        check_names(step)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for step in make_targets(page):
        assert step.text.split()[1] in targets, f"{step}: the Makefile has no such target"
    for module in re.findall(r"python -m ((?:cat|benchmarks)\b[\w.]*)", (ROOT / page).read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module), f"{page}: python -m {module}: there is no such module"


@pytest.mark.parametrize("page", PAGES)
def test_every_table_is_one(page: str) -> None:
    """Rows behind an empty line are another table's, whose second row is a rule: without one they are shown as text."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, rule, *rows = (*table.splitlines(), "")
        assert re.fullmatch(r"[|: -]+", rule), f"{page}: no rule below {head!r}"
        cells = {line.replace("\\|", "").count("|") for line in (head, rule, *rows[:-1])}
        assert len(cells) == 1, f"{page}: rows of several widths: {head!r}"


def test_every_command_has_a_section() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert {section.split("\n")[0] for section in sections} == set(COMMANDS)
    for section in sections:
        name = section.split("\n")[0]
        assert f"```{{cat-audio}} {name}\n```" in section, f"no help of {name}"
        assert "](" in section, f"{name}: no page that says more"


def test_the_readme_lists_every_command() -> None:
    listed = {step.text.split()[1] for step in inline_commands("README.md")}
    assert set(COMMANDS) <= listed


# ---------------------------------------------------------------- that these tests can fail


def test_what_is_found_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\ncat-audio synth x \\\n    --seed 1   # a comment\nA=1 cat-audio embed 'x\n y' | head\n```\n"
        "```python\nx = 1\n```\n```json\n{}\n```\n```\na table\n```\n`cat-audio probe` and `cat-audio nosuch`\n"
    )
    monkeypatch.setattr("tests.documented.ROOT", tmp_path)
    first, second, third = steps_of("page.md")
    assert (first.line, first.words, first.is_simple) == (2, ["cat-audio", "synth", "x", "--seed", "1"], True)
    assert (second.line, second.settings, second.is_simple) == (4, {"A": "1"}, False)
    assert second.words == ["cat-audio", "embed", "x\ny", "|", "head"]
    assert (third.language, third.text) == ("python", "x = 1\n")
    probe, other = inline_commands("page.md")
    check_names(probe)
    with pytest.raises(AssertionError, match="no command nosuch"):
        check_names(other)
    page.write_text("- in a list\n  ```sh\n  cat-audio synth x\n  ```\n")
    assert [step.text for step in steps_of("page.md")] == ["cat-audio synth x"]


@pytest.mark.parametrize(
    ("language", "text"), [("json", "{'a': 1}"), ("yaml", "a: b: c"), ("yaml", "# none"), ("cpp", "int x;")]
)
def test_a_block_that_nothing_reads_is_told(language: str, text: str) -> None:
    yaml = pytest.importorskip("yaml")
    with pytest.raises((AssertionError, ValueError, yaml.YAMLError)):
        check_block("page.md:1", language, text)


@pytest.mark.parametrize(
    "text",
    ["```\nsome output\ncat-audio synth x\n```\n", "```console\n$ cat-audio synth x\n```\n", "    cat-audio x\n"],
)
def test_a_command_that_would_not_be_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr("tests.documented.ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"call the block ```sh|put it between ```sh"):
        steps_of("page.md")


@pytest.mark.parametrize(
    ("text", "code"), [("cat-audio synth", 2), ("cat-audio embed nowhere --encoder logmel -o x.npy", 1)]
)
def test_a_command_that_fails_is_told(text: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, SystemExit), match=f"{code}"):
        run_step(Step("page.md", 1, "sh", text), tmp_path, {})
    with pytest.raises(AssertionError, match=r"page.md:1: nosuch --help"):
        run_step(Step("page.md", 1, "sh", "nosuch --help"), tmp_path, {})
    with pytest.raises(AssertionError, match=r"exit code 3"):
        run_step(Step("page.md", 1, "sh", "exit 3 | cat"), tmp_path, {})
