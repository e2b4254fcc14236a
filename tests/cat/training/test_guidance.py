"""What a constant prediction gets of L_r, and the warnings about a guide that is no use or is not followed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cat.config import from_mapping
from cat.data import Clip, EmbeddingWriter, Manifest, open_embeddings
from cat.model import Regularisation, squared_distance
from cat.model.regularisation import DISTANCES
from cat.training import guidance
from cat.training.guidance import (
    BEST_CONSTANT,
    UNUSED,
    Guidance,
    GuidanceCheck,
    column,
    constant_loss,
    sample_rows,
    setting,
    unwired,
    warning_of_unwired,
    warnings_of_rows,
    warnings_of_weight,
)
from cat.training.recipe import PretrainConfig

GUIDE = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) + 0.7


# ---------------------------------------------------------------- the constant prediction


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_no_constant_prediction_is_better(distance):
    """Against one that is trained from the best of ten rows."""
    rows, measure = GUIDE[:200].double(), DISTANCES[distance]
    best = constant_loss(rows, Regularisation(distance=distance))
    assert BEST_CONSTANT.keys() == DISTANCES.keys()
    trained = min(rows[:10], key=lambda row: measure(row.expand_as(rows), rows).mean()).clone().requires_grad_()
    optimiser = torch.optim.Adam([trained], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss = measure(trained.expand_as(rows), rows).mean()
        loss.backward()
        optimiser.step()
    assert best <= loss.item() * (1 + 1e-9)
    assert best == pytest.approx(loss.item(), rel=0.01)


def test_l2s_is_the_variance_also_of_unit_vectors():
    rows = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [1, 2, 0, 0], [-1, -2, 0, 0]])
    assert constant_loss(rows, Regularisation()) == pytest.approx((1 + 1 + 5 + 5) / 4 / 2)  # sqrt(4) = 2
    units = F.normalize(GUIDE, dim=-1)
    expected = squared_distance(units, units.mean(0)).mean().item()
    assert constant_loss(17 * GUIDE, Regularisation(normalise=True)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_there_is_none_of_equal_rows_nor_of_a_projected_embedding(distance):
    options = Regularisation(distance=distance)
    assert constant_loss(GUIDE[:1].expand(9, -1), options) is None
    assert constant_loss(GUIDE[:0], options) is None
    assert constant_loss(GUIDE, dataclasses.replace(options, projection="external")) is None


@pytest.fixture
def linked(tmp_path) -> Manifest:
    """40 clips whose rows lie in the reverse order."""
    clips = tuple(Clip(f"{i}.wav") for i in range(40))
    with EmbeddingWriter(tmp_path / "e.npy", Manifest(clips, tmp_path), dim=16, encoder="test") as writer:
        writer.append(range(39, -1, -1), GUIDE[:40].numpy())
    return dataclasses.replace(writer.manifest, clips=writer.manifest.clips)


def test_rows_are_sampled_over_the_list_without_broken_ones(linked):
    store = open_embeddings(linked)
    assert torch.equal(sample_rows(store, linked.rows, 3), GUIDE[linked.rows[[0, 19, 39]]])
    assert torch.equal(sample_rows(store, linked.rows), GUIDE[linked.rows.copy()])
    broken = np.load(store.path)
    broken[5] = np.nan
    np.save(store.path, broken)
    assert len(sample_rows(open_embeddings(linked), linked.rows)) == 39


# ---------------------------------------------------------------- at the start


def test_embeddings_that_cannot_guide_are_named():
    generator = torch.Generator().manual_seed(1)
    assert warnings_of_rows(GUIDE) == []
    assert warnings_of_rows(GUIDE[:1]) == []
    (warning,) = warnings_of_rows(torch.ones(50, 16))
    assert "hardly tells the clips apart: 100.00 %" in warning
    assert "Embed the clips without padding" in warning
    (warning,) = warnings_of_rows(100 + torch.randn(50, 16, generator=generator))
    assert "hardly tells the clips apart" in warning
    (warning,) = warnings_of_rows(torch.where(torch.arange(400)[:, None] % 2 == 0, GUIDE, GUIDE[:1]))
    assert warning.startswith("50 % of the clips have an external embedding that another clip has too")
    odd = GUIDE.clone()
    odd[7] *= 1000
    (warning,) = warnings_of_rows(odd)
    assert "regularisation_normalise=true" in warning
    odd[7] = 0
    assert "lengths go from 0 to" in warnings_of_rows(odd)[0]


def test_the_share_of_doubles_does_not_grow_with_the_sample():
    """Of a guide with four dimensions, about what the random control has: of 2,048 rows most have a near one."""
    narrow = torch.randn(2048, 4, generator=torch.Generator().manual_seed(2))
    units = F.normalize(narrow.double(), dim=-1)
    assert guidance._duplicates(units - units.mean(0)) > 2 * guidance.DUPLICATES
    assert warnings_of_rows(narrow) == []


def test_a_weight_that_does_nothing_or_everything_is_named_with_one_that_would_do():
    constant = constant_loss(GUIDE, Regularisation())
    one = constant / 4  # of a model that is 16 wide, at weight 1
    for weight, words in ((0.5 / one, ""), (1e-4 / one, "hardly feel"), (100 / one, "drown")):
        found = warnings_of_weight(constant, weight, 16)
        assert [words in text for text in found] == [True] * bool(words)
    low, high = (float(word.rstrip(",")) for word in found[0].split(" a weight from ")[1].split()[::2][:2])
    assert (low * one, high * one) == (pytest.approx(0.1, rel=0.4), pytest.approx(1.0, rel=0.4))


def test_whether_a_loss_reaches_the_student_each_guide_by_itself():
    """In one pass, and whatever the others do; a pull that is not finite is no missing one."""
    cls, head, passes = nn.Parameter(torch.ones(4)), nn.Linear(4, 3), []
    seen = {"": cls, "cut": cls.detach(), "null": 0 * cls, "weak": 1e-6 * cls, "odd": cls * torch.nan}

    def loss(weights):
        passes.append(1)
        return cls.square().sum() + sum(weight * head(seen[guide]).sum() for guide, weight in weights.items())

    assert unwired(cls, seen, loss) == ["cut", "null"]
    assert len(passes) == 1
    assert cls.grad is None
    assert head.weight.grad is None


# ---------------------------------------------------------------- while it trains


def rows(values, first=1, **more):
    return [{"step": step, "regularisation": value, **more} for step, value in enumerate(values, start=first)]


def test_a_guide_that_is_not_followed_is_named_once_until_it_is():
    check = GuidanceCheck(0.5, after=4, window=2)
    assert check.explained(0.4) == pytest.approx(0.2)
    assert check.update(rows([0.9, 0.9, 0.9])) == []
    (warning,) = check.update(rows([0.9, 0.9], 4))
    assert "L_r is 0.9 at step 4, and predicting the same for every clip would get 0.5" in warning
    assert check.update(rows([0.9] * 5, 6)) == []
    assert check.update(rows([0.48, 0.48, 0.9, 0.9], 11)) == []  # hardly below is not yet followed
    assert check.update(rows([0.1, 0.8, 0.1, 0.5], 15)) == []  # in the mean it is
    assert len(check.update(rows([0.495, 0.495], 19))) == 1
    assert GuidanceCheck(0.5, after=4, window=2).update(rows([0.4] * 9)) == []


def test_a_loss_that_still_falls_is_not_judged():
    check = GuidanceCheck(0.5, after=1, window=2)
    assert check.update(rows([9.0 * 0.9**step for step in range(25)])) == []
    assert len(check.update(rows([0.7] * 6, 25))) == 1


def test_nothing_is_said_of_a_guide_that_is_switched_off():
    check = GuidanceCheck(0.5, after=1, window=1)
    assert check.update(rows([0.9] * 5, regularisation_weight=0.0)) == []
    assert len(check.update(rows([0.9] * 2, regularisation_weight=0.1))) == 1


def config(linked, **changes) -> PretrainConfig:
    sections = {
        "data": {"batch_size": 5},
        "masks": {"num_masks": 2},
        "objective": {"regularisation_weight": 2.0, **changes.pop("objective", {})},
        "guides": changes.pop("guides", {}),
        "optim": {"warmup_steps": 10, "steps": 110},
        "run": changes,
    }
    return from_mapping(PretrainConfig, sections, source="test")


def guidance_of(linked, *guides, **changes) -> Guidance:
    """With the same embeddings for all these guides; others are live."""
    settings = config(linked, **changes)
    flat = settings.objective.regularisation
    terms = ({"": flat} if flat.weight else {}) | dict(settings.guides)
    return Guidance(settings, linked, terms, dict.fromkeys(guides, (open_embeddings(linked), linked.rows)))


def under(guide, **fields) -> dict:
    """The same fields of either kind of guide, as sections of a recipe."""
    if not guide:
        return {"objective": {f"regularisation_{field}": value for field, value in fields.items()}}
    return {
        "objective": {"regularisation_weight": 0.0},
        "guides": {guide: {"embeddings": "e", "weight": 2.0, **fields}},
    }


def test_a_run_with_embeddings_and_without_a_guide_says_so(linked):
    unused = {"objective": {"regularisation_weight": 0.0}}
    plain = dataclasses.replace(linked, embeddings=None, embeddings_fingerprint=None)
    assert guidance_of(linked, **unused).advice() == [UNUSED]
    assert guidance_of(plain, **unused).advice() == []
    assert guidance_of(linked, **unused).derived({"regularisation": 0.0}) == {}
    assert guidance_of(linked, "").advice() == []
    assert guidance_of(linked, **under("g")).advice() == []  # which may well have these


@pytest.mark.parametrize("guide", ["", "g"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_is_explained_knows_how_the_loss_is_reduced(linked, reduction, guide):
    changes = under(guide)
    changes["objective"]["global_loss_reduction"] = reduction
    constant = constant_loss(GUIDE[:40], Regularisation()) * (10 if reduction == "sum" else 1)
    found = guidance_of(linked, guide, **changes)
    assert found.derived({column("regularisation", guide): 0.7 * constant}) == {
        column("regularisation_explained", guide): pytest.approx(0.3)
    }
    changes = under(guide, weight=40.0)
    changes["objective"]["global_loss_reduction"] = reduction
    advice = guidance_of(linked, guide, **changes).advice()
    assert ["drown" in text for text in advice] == [True] * (reduction == "sum")


@pytest.mark.parametrize("guide", ["", "g"])
def test_when_it_is_judged(linked, guide):
    """After warm-up and its share of what follows."""

    def rows(steps):
        return [{"step": step, column("regularisation", guide): 99.0} for step in steps]

    late = guidance_of(linked, guide, guidance_share=0.5, **under(guide))
    assert late.update(rows(range(1, 60))) == []
    assert len(late.update(rows([60]))) == 1
    rising = guidance_of(linked, guide, guidance_share=0.5, **under(guide, schedule="warmup", steps=60))
    assert rising.update(rows(range(1, 85))) == []
    assert len(rising.update(rows([85]))) == 1
    never = guidance_of(linked, guide, guidance_share=0, **under(guide, weight=1e6))
    assert never.update(rows(range(1, 111))) == never.advice() == []
    assert column("regularisation_explained", guide) in never.derived(rows([1])[0])
    with pytest.raises(ValueError, match=r"guidance_share is 1\.5; expected a share"):
        config(linked, guidance_share=1.5)


def test_guides_are_judged_each_by_itself(linked):
    """Only the one that is not followed is named; a live one is not judged, nor one that projects its embeddings."""
    others = {"b": {"embeddings": "b"}, "out": {"embeddings": "o", "projection": "external"}, "live": {"encoder": "e"}}
    mean = {"global_loss_reduction": "mean"}
    found = guidance_of(linked, "", "b", "out", guides=others, objective=mean)
    assert found.advice() == []
    constant = constant_loss(GUIDE[:40], Regularisation())
    row = {"regularisation": 0.0, "regularisation.b": constant, "regularisation.out": 99.0, "regularisation.live": 99.0}
    explained = {"regularisation_explained": 1.0, "regularisation_explained.b": pytest.approx(0.0)}
    assert found.derived(row) == explained
    (warning,) = found.update([{"step": step, **row} for step in range(1, 111)])
    assert warning.startswith("guides.b: the student does not follow the guide")
    off = {"regularisation_weight.b": 0.0, "regularisation_weight": 1.0}
    found = guidance_of(linked, "b", guides=others, objective=mean)
    assert found.update([{"step": step, **row, **off} for step in range(1, 111)]) == []


@pytest.mark.parametrize("guide", ["", "g"])
def test_warnings_name_the_guide_and_the_keys_to_change(linked, guide):
    rows = {"regularisation": 99.0, "regularisation.g": 99.0}
    said = [warning_of_unwired(guide)]
    for weight, word in ((1e-6, "hardly feel"), (1e6, "drown")):
        found = guidance_of(linked, guide, **under(guide, weight=weight))
        said += found.advice() + found.update([{"step": step, **rows} for step in range(1, 111)])
        assert word in said[-2]
    lengths = GUIDE[:40].clone()
    lengths[7] *= 1000
    np.save(open_embeddings(linked).path, lengths.numpy())
    said += guidance_of(linked, guide, **under(guide)).advice()
    for text, field in zip(said, ["layer", "weight", "weight", "weight", "layer", "normalise"], strict=True):
        assert setting(field, guide) in text
        assert ("objective." in text) == (not guide)
        assert text.startswith("guides.g: ") == bool(guide)
