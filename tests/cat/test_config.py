"""Recipes: what they may say, and what the errors say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from cat.config import (
    ConfigError,
    differences,
    flatten,
    from_mapping,
    load,
    parse_override,
    read_yaml,
    to_mapping,
    write_yaml,
)
from cat.training.recipe import PretrainConfig, check_same_run, load_recipe, pick_device, pick_features

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Net:
    widths: tuple[int, ...] = (8, 16)
    depth: int = 2
    kind: Literal["plain", "deep"] = "plain"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}; expected at least 1")
        100 % (self.depth - 13)  # what nobody thought of


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    steps: int = 100


@dataclass(frozen=True)
class Guide:
    weight: float = 1.0
    source: str | None = None


@dataclass(frozen=True)
class Recipe:
    name: str
    net: Net = field(default_factory=Net)
    optim: Optim = field(default_factory=Optim)
    folder: Path | None = None
    fast: bool = False
    guides: Mapping[str, Guide] = field(default_factory=dict)


PRESETS = {Net: {"small": Net(widths=(4,)), "large": Net(widths=(32, 64), depth=9)}}


def recipe(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load(Recipe, path, overrides, PRESETS)


def test_file_overrides_and_defaults(tmp_path):
    made = recipe(
        tmp_path, "name: a\noptim: {lr: 5e-4, steps: 4e2}\nnet: {widths: [1, 2, 3]}\n", "optim.betas=[0.8,0.9]"
    )
    assert made == Recipe("a", Net(widths=(1, 2, 3)), Optim(5e-4, (0.8, 0.9), 400))
    assert type(made.optim.steps) is int


def test_sections_with_names_of_the_recipe_s_own(tmp_path):
    text = "name: a\nguides: {clap: {weight: 2}, random: }\n"
    made = recipe(tmp_path, text, "guides.clap.source=x.npy", "guides.own.weight=0.5")
    assert made.guides == {"clap": Guide(2.0, "x.npy"), "random": Guide(), "own": Guide(0.5)}
    write_yaml(made, tmp_path / "again.yaml")
    assert load(Recipe, tmp_path / "again.yaml") == made
    assert to_mapping(made)["guides"]["clap"] == {"weight": 2.0, "source": "x.npy"}
    for override, message in (
        ("guides.clap.wieght=1", "unknown key 'guides.clap.wieght'; the nearest known one is 'guides.clap.weight'"),
        ("guides.clap.weight=much", "guides.clap.weight is much; expected a number"),
        ("guides.clap=much", "guides.clap is 'much'"),
        ("guides=much", "guides is 'much' .a text.; expected a name, and below it the keys weight, source"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe(tmp_path, "name: a", override)
    with pytest.raises(ConfigError, match=r"guides.a b: 'a b' is not a name; expected letters, digits and _"):
        recipe(tmp_path, "name: a\nguides: {a b: {}}\n")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("name=007", lambda r: r.name == "007"),
        ("name=a=b", lambda r: r.name == "a=b"),
        ("net.widths=5,6", lambda r: r.net.widths == (5, 6)),
        ("net.widths=[5]", lambda r: r.net.widths == (5,)),
        ("net.kind=deep", lambda r: r.net.kind == "deep"),
        ("optim.lr=3e-4", lambda r: r.optim.lr == 3e-4),
        ("optim.lr=1", lambda r: r.optim.lr == 1.0 and type(r.optim.lr) is float),
        ("optim.steps=10_000", lambda r: r.optim.steps == 10_000),
        ("folder=x/y", lambda r: r.folder == Path("x/y")),
        ("folder=null", lambda r: r.folder is None),
        ("fast=true", lambda r: r.fast is True),
    ],
)
def test_override_is_read_by_the_type_of_its_field(tmp_path, override, read):
    assert read(recipe(tmp_path, "name: a", override))


def test_preset_with_changes(tmp_path):
    assert recipe(tmp_path, "name: a\nnet: {preset: large, depth: 3}").net == Net(widths=(32, 64), depth=3)


def test_preset_given_on_the_command_line_starts_afresh_whatever_the_order(tmp_path):
    made = recipe(tmp_path, "name: a\nnet: {preset: large, kind: deep}", "net.depth=5", "net.preset=small")
    assert made.net == Net(widths=(4,), depth=5)


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("name: a\noptim: {lrr: 1}", [], ["recipe.yaml", "'optim.lrr'", "'optim.lr'"]),
        ("name: a\nnet: {stepps: 1}", [], ["'net.stepps'", "'optim.steps'"]),
        ("name: a\noptin: {lr: 1}", [], ["'optin'", "'optim'"]),
        ("name: a", ["optim.step=1"], ["command line", "'optim.step'", "'optim.steps'"]),
        ("name: a\noptim: {lr: fast}", [], ["recipe.yaml: optim.lr", "'fast'", "a number"]),
        ("name: a\noptim: {steps: 1.5}", [], ["optim.steps", "1.5", "an integer"]),
        ("name: a\noptim: {steps: true}", [], ["optim.steps", "True", "an integer"]),
        ("name: a\noptim: {lr: .nan}", [], ["optim.lr", "a number"]),
        ("name: a\noptim: {betas: [1]}", [], ["optim.betas", "[1]", "list of 2"]),
        ("name: a\nnet: {kind: wide}", [], ["net.kind", "'wide'", "one of plain, deep"]),
        ("name: a\nfast: 1", [], ["fast", "true or false"]),
        ("name: 5", [], ["name", "quote"]),
        ("name: a\nnet: 3", [], ["net is 3", "section"]),
        ("name: a\nnet: {depth: 0}", [], ["recipe.yaml", "net", "depth is 0"]),
        ("name: a", ["net.depth=0"], ["command line", "depth is 0"]),
        ("name: a\nnet: {preset: smal}", [], ["net.preset", "'smal'", "did you mean 'small'"]),
        ("optim: {lr: 1}", [], ["name is missing", "name=VALUE"]),
        ("name: a\nname: b", [], ["'name' is written twice", "line 2"]),
        ("name: [", [], ["recipe.yaml", "not valid YAML", "line"]),
        ("- a", [], ["recipe.yaml", "expected sections"]),
        ("name: a", ["optim.lr"], ["'optim.lr' is not an override", "key.sub=value"]),
        ("name: a", ["name.x=3"], ["'name' is a value"]),
        ("name: a", ["net.widths=[1"], ["net.widths=[1 cannot be read"]),
        ("name: a", ["net.depth=13"], ["command line", "net", "modulo by zero"]),
    ],
)
def test_mistakes_name_place_value_and_remedy(tmp_path, text, overrides, parts):
    with pytest.raises(ConfigError) as error:
        recipe(tmp_path, text, *overrides)
    for part in parts:
        assert part in str(error.value)


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot read"):
        read_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_yaml(tmp_path / "a.yaml")


def test_writes_what_it_reads(tmp_path):
    made = Recipe("x", Net((1, 2), 3, "deep"), Optim(1e-5), Path("a/b"), True)
    write_yaml(made, tmp_path / "b.yaml")
    assert load(Recipe, tmp_path / "b.yaml") == made
    assert from_mapping(Recipe, to_mapping(made)) == made
    assert [p.name for p in tmp_path.iterdir()] == ["b.yaml"]


def test_differences_are_dotted():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}}) == {"a.b": 1, "a.c.d": [2]}
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == {"a.c": (2, 3), "d": (None, 4)}
    assert parse_override("a.b=c") == ("a.b", "c")


# ---------------------------------------------------------------- the recipes of this repository


@pytest.mark.parametrize("name", ["base", "tiny", "quickstart"])  # fine-tuning: training/test_finetune_recipes.py
def test_every_recipe_loads(name):
    path = REPOSITORY / "recipes" / f"{name}.yaml"
    config = load_recipe(path)
    assert config.run.name == path.stem
    assert from_mapping(PretrainConfig, to_mapping(config)) == config


def test_base_recipe_is_the_paper():
    config = load_recipe(REPOSITORY / "recipes" / "base.yaml")
    o, e, m = config.optim, config.ema, config.masks
    assert (o.lr, o.betas, o.weight_decay, o.warmup_steps, o.steps, o.clip_norm) == (
        5e-4, (0.9, 0.95), 0.05, 53_333, 400_000, 4.0,
    )  # fmt: skip
    assert o.weight_decay_on == "all"
    assert (e.start, e.end, e.steps) == (0.9998, 0.99999, 100_000)
    assert (m.ratio, m.num_masks, config.data.batch_size) == (0.8, 4, 96)
    assert (config.objective.regularisation_weight, config.objective.global_loss_reduction) == (1.0, "sum")
    assert (config.features.frames, config.model.resolutions, config.grid) == (1024, (4, 8, 16), (64, 8))


def test_sections_that_do_not_fit_each_other():
    base = REPOSITORY / "recipes" / "base.yaml"
    with pytest.raises(ConfigError, match=r"features\.mel_bins is 64 and model\.mel_bins 128"):
        load_recipe(base, ["features.mel_bins=64"])
    with pytest.raises(ConfigError, match=r"features\.frames is 1000; expected a multiple of the patch size 16"):
        load_recipe(base, ["features.frames=1000"])
    with pytest.raises(ConfigError, match=r"optim: warmup_steps is 53333"):
        load_recipe(base, ["optim.steps=100"])


def test_resuming_allows_what_leaves_the_numbers_alone(tmp_path):
    base = REPOSITORY / "recipes" / "base.yaml"
    saved = to_mapping(load_recipe(base, ["data.train=a"]))
    same = ["data.train=b", "data.num_workers=0", "data.features=gpu"]
    same += ["run.log_every=7", "run.device=cpu", "run.stop_at=9"]
    check_same_run(saved, load_recipe(base, same), tmp_path)
    for change in ("optim.lr=1", "optim.steps=500_000", "run.seed=1", "masks.num_masks=2", "data.batch_size=1"):
        with pytest.raises(ConfigError, match=change.split("=")[0].replace(".", r"\.")):
            check_same_run(saved, load_recipe(base, ["data.train=a", change]), tmp_path)


def test_devices():
    assert pick_device("cpu").type == "cpu"
    for name in ("tpu", "cuda:99"):
        with pytest.raises(ConfigError, match=rf"run\.device is '{name}'"):
            pick_device(name)


@pytest.mark.parametrize(
    ("name", "device", "picked"),
    [("auto", "cuda", "gpu"), ("auto", "cpu", "cpu"), ("gpu", "cpu", "gpu"), ("cpu", "cuda:1", "cpu")],
)
def test_where_features_are_made(name, device, picked):
    assert pick_features(name, torch.device(device)) == picked


def test_a_place_for_features_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"data\.features is 'tpu'; choose one of auto, gpu, cpu"):
        load_recipe(REPOSITORY / "recipes" / "base.yaml", ["data.features=tpu"])
