"""What a run's arithmetic is set to, and set back from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cat.training import start
from cat.training.finetuning import Finetuning
from cat.training.pretraining import Pretraining
from cat.training.recipe import RunConfig


def task(device: str, one_shape: bool) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), one_shape=one_shape)


def test_cudnn_searches_where_shapes_stay_and_numbers_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Pretraining.one_shape, Finetuning.one_shape) == (True, False)
    assert start.searches(task("cuda", one_shape=True))
    assert not start.searches(task("cuda", one_shape=False))
    assert not start.searches(task("cpu", one_shape=True))
    for switch in ("torch.are_deterministic_algorithms_enabled", "torch.backends.cudnn.deterministic"):
        with monkeypatch.context() as patch:
            patch.setattr(switch, True if switch.endswith("c") else lambda: True)
            assert not start.searches(task("cuda", one_shape=True)), switch


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_is_asked_by_the_trainer_and_then_left_as_it_was(before, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    found = SimpleNamespace(task=SimpleNamespace(begin=lambda: None), restore=None)
    monkeypatch.setattr(start, "Trainer", lambda *_, **__: found)
    monkeypatch.setattr(start, "searches", lambda asked: asked is found.task)
    with start._trainer(lambda: None, RunConfig(device="cpu"), tmp_path, resume=False, progress=False):
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark is before


@pytest.fixture
def arithmetic():
    """PyTorch's settings of float32 arithmetic on a GPU, set back afterwards: (products, convolutions, recurrences).
    (Monkeypatch cannot: these modules have no such attribute of their own.)"""
    found = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [one.fp32_precision for one in found]
    torch.backends.cudnn.allow_tf32 = True
    yield found
    torch.backends.cudnn.allow_tf32 = "tf32" in before[1:]
    for one, value in zip(found, before, strict=True):
        one.fp32_precision = value


@pytest.mark.parametrize("products", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_convolutions_keep_what_products_keep(products, before, arithmetic) -> None:
    for one, value in zip(arithmetic, (products, before, "tf32"), strict=True):
        one.fp32_precision = value
    with start.repeatable(RunConfig(), torch.device("cuda")):
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is (products == "tf32")
        assert torch.backends.cudnn.allow_tf32 is (products == "tf32")  # can be read: PyTorch's compiler does
    assert [one.fp32_precision for one in arithmetic] == [products, before, "tf32"]


@pytest.mark.parametrize("before", [False, True])
def test_the_older_setting_can_be_read_after_a_run(before, arithmetic) -> None:
    torch.backends.cudnn.allow_tf32 = before
    with start.repeatable(RunConfig(), torch.device("cuda")):
        pass
    assert torch.backends.cudnn.allow_tf32 is before
