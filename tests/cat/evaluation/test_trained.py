"""Probes that are trained with PyTorch: they find what is there, and do so again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat.evaluation import trained
from cat.evaluation.classifiers import Split, linear_probe
from cat.evaluation.features import Features, Tokens
from cat.evaluation.trained import attention_probe, gated_probe

pytest.importorskip("sklearn")

CLASSES, WIDTH = 3, 12
CENTRES = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))


def split(rows: list[np.ndarray], cls: np.ndarray, targets: np.ndarray) -> Split:
    """rows: of each clip (h, Y, D); cls (n, Y, D)."""
    tokens = Tokens(np.concatenate(rows).astype(np.float16), cls.astype(np.float16), np.cumsum([len(r) for r in rows]))
    pooled = np.stack([clip.mean(axis=0) for clip in rows]).astype(np.float32)
    return Split(Features(np.arange(len(rows)), pooled[:, -1], tuple(range(cls.shape[1])), pooled, tokens), targets)


def one_token_tells(n: int, seed: int) -> Split:
    """Every row of a clip lies near the centre of some class; the one whose first number is large tells the label."""
    rng = np.random.default_rng(seed)
    labels, rows = rng.integers(CLASSES, size=n), []
    for label in labels:
        clip = CENTRES[rng.integers(CLASSES, size=rng.integers(4, 9))] + 0.1 * rng.normal(size=WIDTH)
        told = rng.integers(len(clip))
        clip[:, 0], clip[told, 1:] = 0, CENTRES[label, 1:]
        clip[told, 0] = 3
        rows.append(clip[:, None])
    return split(rows, np.zeros((n, 1, WIDTH)), np.eye(CLASSES, dtype=bool)[labels])


def one_layer_tells(n: int, seed: int, *, layer: int = 2, layers: int = 4) -> Split:
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=n)
    rows, cls = rng.normal(size=(n, 4, layers, WIDTH)), rng.normal(size=(n, layers, WIDTH))
    rows[:, :, layer] += CENTRES[labels][:, None]
    cls[:, layer] += CENTRES[labels]
    return split(list(rows), cls, np.eye(CLASSES, dtype=bool)[labels])


def splits(make, **options) -> tuple[Split, ...]:
    return tuple(make(n, seed, **options) for seed, n in ((1, 200), (2, 80), (3, 80)))


def on_mean(parts: tuple[Split, ...]) -> list[Split]:
    return [Split(part.features.clip, part.targets) for part in parts]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(trained, "MAX_STEPS", 400)
    monkeypatch.setattr(trained, "RATES", (1e-2,))


@pytest.mark.usefixtures("quick")
def test_attention_finds_the_token_that_the_mean_drowns():
    parts = splits(one_token_tells)
    assert attention_probe(*parts, multi_label=False).score > 0.95
    assert linear_probe(*on_mean(parts), multi_label=False).score < 0.7


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("head", ["linear", "prototypes"])
def test_the_gates_find_the_layer_that_tells(head, multi_label, monkeypatch):
    keep_one_head(monkeypatch, head)
    result = gated_probe(*splits(one_layer_tells), multi_label=multi_label, prototypes=32)
    assert head in result.setting
    assert result.score > 0.95
    assert int(np.argmax(result.gates)) == 2
    assert result.gates[2] > 0.6
    assert sum(result.gates) == pytest.approx(1)


def keep_one_head(monkeypatch, head: str) -> None:
    fit, chosen = trained.fit, trained.choose
    monkeypatch.setattr(trained, "fit", lambda setup, *rest: fit(setup, *rest) if head in setup.setting else None)
    monkeypatch.setattr(trained, "choose", lambda found, several: chosen([c for c in found if c], several))


@pytest.mark.parametrize("probe", [attention_probe, gated_probe])
def test_the_same_seed_gives_the_same_bits_and_leaves_the_generator_alone(probe, monkeypatch):
    monkeypatch.setattr(trained, "MAX_STEPS", 40)
    parts = tuple(one_layer_tells(n, seed) for seed, n in ((1, 100), (2, 40), (3, 40)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = probe(*parts, multi_label=False, seed=3, prototypes=16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert probe(*parts, multi_label=False, seed=3, prototypes=16) == one
    candidates = []
    monkeypatch.setattr(trained, "choose", lambda found, _: candidates.append(found))
    for seed in (3, 4):
        probe(*parts, multi_label=False, seed=seed, prototypes=16)
    scores = [found[0].scores(parts[2].features) for found in candidates]
    assert not np.array_equal(*scores)  # the seed counts


@pytest.mark.parametrize("probe", [attention_probe, gated_probe])
def test_the_test_split_is_read_once(probe, monkeypatch):
    monkeypatch.setattr(trained, "MAX_STEPS", 20)
    parts = tuple(one_layer_tells(n, seed) for seed, n in ((1, 100), (2, 40), (3, 40)))
    read = []
    predict = trained._Predict.__call__
    monkeypatch.setattr(trained._Predict, "__call__", lambda self, f: read.append(f) or predict(self, f))
    probe(*parts, multi_label=False, prototypes=16)
    assert sum(features is parts[2].features for features in read) == 1
    assert read[-1] is parts[2].features


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_class_that_training_lacks_is_never_predicted(multi_label, monkeypatch):
    monkeypatch.setattr(trained, "MAX_STEPS", 20)
    train, valid, test = splits(one_layer_tells)
    train.targets[:, 2], train.targets[train.targets.sum(axis=1) == 0, 0] = False, True
    candidates = []
    monkeypatch.setattr(trained, "choose", lambda found, _: candidates.extend(found))
    attention_probe(train, valid, test, multi_label=multi_label)
    gated_probe(train, valid, test, multi_label=multi_label, prototypes=16)
    for candidate in candidates:
        scores = candidate.scores(test.features)
        assert np.isfinite(scores).all()
        assert (scores[:, 2] == 0).all()


def test_a_training_split_of_one_class_predicts_it(monkeypatch):
    monkeypatch.setattr(trained, "MAX_STEPS", 20)
    train, valid, test = splits(one_layer_tells)
    train.targets[:] = np.arange(CLASSES) == 1
    for probe in (attention_probe, gated_probe):
        assert probe(train, valid, test, multi_label=False, prototypes=16).score == test.targets[:, 1].mean()


def test_clips_that_are_all_the_same_are_no_error(monkeypatch):
    """Silence: nothing varies, in no layer."""
    monkeypatch.setattr(trained, "MAX_STEPS", 20)
    targets = np.eye(CLASSES, dtype=bool)[np.arange(30) % CLASSES]
    same = split([np.ones((3, 2, WIDTH))] * 30, np.ones((30, 2, WIDTH)), targets)
    assert attention_probe(same, same, same, multi_label=False).score == pytest.approx(1 / 3)
    assert gated_probe(same, same, same, multi_label=False, prototypes=16).score == pytest.approx(1 / 3)


def test_what_it_cannot_do_it_says():
    parts = splits(one_layer_tells)
    with pytest.raises(ValueError, match=r"prototypes is 0; expected at least 1 \(512 by default"):
        gated_probe(*parts, multi_label=False, prototypes=0)
    bare = Split(Features(np.arange(3), np.zeros((3, 4), np.float32)), np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="expected features with them"):
        attention_probe(bare, bare, bare, multi_label=False)


def test_tokens_of_some_clips():
    rows = np.arange(6 * 2 * 3).reshape(6, 2, 3).astype(np.float16)
    cls = -np.arange(3 * 2 * 3).reshape(3, 2, 3).astype(np.float16)
    tokens = Tokens(rows, cls, np.array([1, 4, 6]))  # clips of 1, 3 and 2 rows
    found, own, cls_found = tokens.batch(np.array([2, 0]))
    assert own.tolist() == [[True, True], [True, False]]
    assert np.array_equal(found[0], rows[4:6])
    assert np.array_equal(found[1], [rows[0], np.zeros((2, 3))])
    assert np.array_equal(cls_found, cls[[2, 0]])
    found, own, cls_found = tokens.batch(np.array([1]), layer=-1)
    assert np.array_equal(found, rows[None, 1:4, 1])
    assert np.array_equal(cls_found, cls[[1], 1])
