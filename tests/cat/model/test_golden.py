"""Parity with tensors of the authors' released implementation: 2e-4 of each tensor's scale, fp32."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cat.checkpoints.released import from_released, our_name, to_released
from cat.model import ObjectiveConfig, visible_to_mask

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ["res4-8-16", "res4-16_layer2_proj768", "patch16_noconv"]
TOLERANCE = 2e-4
RNG = torch.tensor([0, 0])


def filled(name, shape, prefix=""):
    g = torch.Generator().manual_seed(zlib.crc32((prefix + name).encode()))
    value = 0.05 * torch.randn(shape, generator=g)
    return value + 1 if len(shape) == 1 and name.endswith("weight") else value


class Golden:
    def __init__(self, name):
        self.info = json.loads((GOLDEN / f"{name}.json").read_text())
        self.out = load_file(GOLDEN / f"{name}.safetensors")
        kw, B, seed = self.info["kw"], self.info["B"], self.info["seed"]
        self.student = {n: filled(n, s) for n, s in self.info["params"]}
        shapes = dict(self.info["params"])
        self.teacher = {n: filled(n, shapes[n], "teacher.") for n in self.info["ema_names"]}
        width = 768 if kw.get("proj_type") == 4 else 512
        self.spec = torch.randn(B, 1, 1024, 128, generator=torch.Generator().manual_seed(seed + 1))
        self.embedding = torch.randn(B, 1, width, generator=torch.Generator().manual_seed(seed + 2))[:, 0]
        objective = ObjectiveConfig(regularisation_weight=1.0, regularisation_layer=kw.get("clap_layer", 0))
        self.model = from_released(self.student, self.teacher, num_heads=kw["heads"], objective=objective)
        self.mask = self.out["mask"].bool()
        self.visible = (~self.mask).nonzero()[:, 1].reshape(self.mask.shape[0], -1)


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return Golden(request.param)


def assert_close(actual, expected, what):
    error = (actual.float() - expected.float()).abs().max().item()
    scale = expected.abs().max().item()
    assert actual.shape == expected.shape, what
    assert error <= TOLERANCE * scale, f"{what}: off by {error:.3g} at scale {scale:.3g}"


def step(golden):
    return golden.model(
        golden.spec, golden.visible, golden.embedding, rng=RNG, mask_noise=golden.out["mask_token_noise"]
    )


def test_stem(golden):
    stem = golden.model.student.stem
    with torch.no_grad():
        assert_close(stem(golden.spec), golden.out["stem_dense"], "stem_dense")
        assert_close(stem(golden.spec, golden.visible), golden.out["stem_visible"], "stem_visible")


def test_dense_backend_of_the_stem():
    golden = Golden("res4-8-16")
    stem = golden.model.student.stem
    stem.backend = "dense"
    with torch.no_grad():
        assert_close(stem(golden.spec), golden.out["stem_dense"], "stem_dense")
        assert_close(stem(golden.spec, golden.visible), golden.out["stem_visible"], "stem_visible")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_stem_on_a_gpu(name):
    """By the backend that "auto" takes there, in float32."""
    golden = Golden(name)
    stem = golden.model.student.stem.cuda()
    with torch.no_grad():
        assert_close(stem(golden.spec.cuda()).cpu(), golden.out["stem_dense"], "stem_dense")
        visible = stem(golden.spec.cuda(), golden.visible.cuda())
        assert_close(visible.cpu(), golden.out["stem_visible"], "stem_visible")


def test_student_decoder_targets_features(golden):
    model, out = golden.model, golden.out
    with torch.no_grad():
        x, _ = model.encode(golden.spec, golden.visible)
        assert_close(x, out["student_out"], "student_out")
        prediction = model.decode(x, golden.visible, (64, 8), RNG, out["mask_token_noise"])
        assert_close(prediction, out["decoder_out"], "decoder_out")
        targets = model.targets(golden.spec)
        assert_close(targets, out["targets"], "targets")
        assert_close(model.student(golden.spec), out["features"], "features")
        assert torch.equal(visible_to_mask(golden.visible, 512), golden.mask)


def test_losses_and_gradient_norms(golden):
    model, out = golden.model, golden.out
    model.zero_grad()
    result = step(golden)
    n = out["sample_size"].item()
    losses = {k.removeprefix("loss_sum."): v / n for k, v in out.items() if k.startswith("loss_sum.")}
    assert_close(result.regression, losses["IMAGE_regression"], "L_p")
    assert_close(result.global_, losses["cls"], "L_g")
    assert_close(result.regularisation, losses["clap"], "L_r")
    assert_close(result.loss.detach(), out["loss"], "loss")
    assert_close(result.pred_std, out["pred_var"], "pred_var")
    assert_close(result.target_std, out["target_var"], "target_var")
    result.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, expected in golden.info["grad_norms"].items():
        actual = gradients.pop(our_name(name)).norm().item()
        assert actual == pytest.approx(expected, rel=TOLERANCE, abs=1e-7), name
    assert not gradients, f"gradients the released code does not have: {sorted(gradients)}"


def test_one_ema_step(golden):
    model = Golden(golden.info["tag"]).model
    model.update_teacher(0.9998)
    _, teacher = to_released(model)
    norms = torch.stack([teacher[n].norm() for n in golden.info["ema_names"]])
    assert_close(norms, golden.out["ema_param_norms"], "ema_param_norms")


def test_released_names_round_trip(golden):
    student, teacher = to_released(golden.model)
    assert student.keys() == golden.student.keys()
    assert teacher.keys() == golden.teacher.keys()
    for ours, theirs in ((student, golden.student), (teacher, golden.teacher)):
        for name, tensor in theirs.items():
            assert ours[name].shape == tensor.shape, name
            assert torch.equal(ours[name], tensor), name
