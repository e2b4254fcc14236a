"""The model beyond what the golden tensors fix: sizes, any T, options of the objective, errors."""

import dataclasses
import itertools
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cat.config import ConfigError, from_mapping, to_mapping
from cat.data.masks import MaskConfig, inverse_block_masks
from cat.model import CAT, PRESETS, Encoder, ModelConfig, ObjectiveConfig, masked_indices, pretraining, sincos_positions
from cat.model.encoder import Block, attend
from cat.model.regularisation import DISTANCES
from cat_kernels import average_targets

SMALL = ModelConfig(channels=(8, 16), embed_dim=32, depth=3, num_heads=2, decoder_dim=32, decoder_layers=2)
RNG = torch.tensor([1, 2])


def small_batch(config=SMALL, frames=64, clips=2, masks=2):
    g = torch.Generator().manual_seed(0)
    spec = torch.randn(clips, 1, frames, config.mel_bins, generator=g)
    grid = (frames // config.patch_size, config.mel_bins // config.patch_size)
    visible = inverse_block_masks(MaskConfig(num_masks=masks), grid, seed=0, step=0, clips=torch.arange(clips))
    return spec, visible


def small_cat(config=SMALL, embedding_dim=None, **objective):
    torch.manual_seed(0)
    return CAT(config, ObjectiveConfig(**objective), embedding_dim)


def test_base_is_the_papers_model():
    with torch.device("meta"):
        model = CAT(PRESETS["base"], ObjectiveConfig(regularisation_weight=1.0), embedding_dim=512)

    def millions(*modules):
        return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 2)

    assert millions(model.student.stem) == 10.81
    assert millions(model.student) == 88.77
    assert millions(model.decoder) == 2.59
    assert millions(model.student, model.decoder, model.regulariser) == 91.75
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_presets_grow():
    sizes = []
    for name in ("tiny", "small", "base", "large"):
        with torch.device("meta"):
            sizes.append(sum(p.numel() for p in Encoder(PRESETS[name]).parameters()))
    assert all(b > 3 * a for a, b in itertools.pairwise(sizes))


def test_positions_are_the_formula():
    table = sincos_positions(16, 5, 3)
    for h, w in [(0, 0), (4, 2), (2, 1)]:
        for half, place in ((0, w), (1, h)):
            for k in range(4):
                angle = place * 10000 ** (-k / 4)
                row = table[h * 3 + w, 8 * half : 8 * half + 8]
                assert row[k] == pytest.approx(math.sin(angle), abs=1e-6)
                assert row[4 + k] == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("frames", [16, 80, 1024])
def test_any_length(frames):
    model = small_cat()
    spec, visible = small_batch(frames=frames)
    L = frames // 16 * 8
    assert model.student(spec).shape == (2, 1 + L, 32)
    assert model.student(spec, visible).shape == (4, 1 + visible.shape[1], 32)
    assert torch.isfinite(model(spec, visible, rng=RNG).loss)


def test_tokens_before_the_first_block_do_not_depend_on_later_audio():
    encoder = small_cat().student
    spec, _ = small_batch(frames=320)
    torch.testing.assert_close(encoder.embed(spec)[:, :65], encoder.embed(spec[:, :, :160])[:, :65], rtol=0, atol=1)
    # far from the cut (the stem's depthwise kernels reach 2 positions, four times) they are equal
    torch.testing.assert_close(encoder.embed(spec)[:, :33], encoder.embed(spec[:, :, :160])[:, :33])


def test_patch_stem_agrees_with_its_convolution():
    config = ModelConfig(
        stem="patch", resolutions=(16,), channels=(), embed_dim=32, depth=1, num_heads=2, decoder_layers=0
    )
    encoder = small_cat(config).student
    spec, visible = small_batch()
    dense = encoder.stem.proj(spec).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.stem(spec), dense)
    expected = dense.repeat_interleave(2, 0).gather(1, visible[:, :, None].expand(-1, -1, 32))
    torch.testing.assert_close(encoder.stem(spec, visible), expected)


def test_masked_audio_reaches_only_the_teacher():
    model = small_cat()
    spec, visible = small_batch(masks=1)
    seen = torch.zeros(2, 32, dtype=torch.bool).scatter(1, visible, True).reshape(2, 1, 4, 8)
    seen = seen.repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(seen, spec, spec + 1)
    torch.testing.assert_close(model.encode(changed, visible)[0], model.encode(spec, visible)[0])
    assert not torch.allclose(model.targets(changed), model.targets(spec))


def test_targets_average_the_last_blocks():
    spec, _ = small_batch()
    model = small_cat(teacher_top_k=1)
    x = model.teacher.embed(spec)
    for block in model.teacher.blocks:
        x, _, t = block(x)
    t = t[:, 1:]
    t = (t - t.mean(1, keepdim=True)) / (t.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = torch.nn.functional.layer_norm(t, (32,))
    torch.testing.assert_close(model.targets(spec), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(small_cat().targets(spec), expected, atol=0.1)


@pytest.mark.parametrize(("top_k", "bytes_", "calls"), [(0, 1 << 30, [6]), (0, 0, [4, 2]), (5, 0, [4, 1]), (2, 0, [2])])
def test_targets_of_several_blocks_at_once_are_those_of_block_by_block(monkeypatch, top_k, bytes_, calls):
    """To the bit: a run that is resumed, or has clips of another length, must not notice."""
    model = small_cat(dataclasses.replace(SMALL, depth=6), teacher_top_k=top_k)
    spec, _ = small_batch()
    made = []

    def spy(layers, **options):
        made.append(len(layers))
        return average_targets(layers, **options)

    monkeypatch.setattr(pretraining, "WAITING_BYTES", bytes_)
    monkeypatch.setattr(pretraining, "average_targets", spy)
    found = model.targets(spec)
    assert made == calls
    with torch.no_grad():
        x, total = model.teacher.embed(spec), None
        for i, block in enumerate(model.teacher.blocks, start=1):
            x, _, t = block(x)
            if i > 6 - (top_k or 6):
                total = average_targets([t[:, 1:]], partial=total, num_layers=(top_k or 6) if i == 6 else None)
    assert torch.equal(found, total)


def test_gradients_of_queries_keys_and_values_are_copied_once():
    block = Block(dim=32, num_heads=2, mlp_ratio=2)
    x, copied = torch.randn(3, 7, 32, requires_grad=True), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func._schema.name in ("aten::stack", "aten::cat", "aten::clone", "aten::copy_"):
                copied.append(result.numel())
            return result

    attended = block.attention(x)
    with Watch():
        attended.sum().backward()
    assert [n for n in copied if n >= x.numel()] == [3 * x.numel()]


def test_sum_and_mean_of_global_losses():
    spec, visible = small_batch()
    embedding = torch.randn(2, 5)
    results = {}
    for reduction in ("sum", "mean"):
        model = small_cat(
            embedding_dim=5, regularisation_weight=0.5, global_weight=2.0, global_loss_reduction=reduction
        )
        results[reduction] = model(spec, visible, embedding, rng=RNG)
    total, mean = results["sum"], results["mean"]
    assert total.global_ == pytest.approx(4 * mean.global_.item(), rel=1e-5)
    assert total.regularisation == pytest.approx(4 * mean.regularisation.item(), rel=1e-5)
    for r in (total, mean):
        assert r.loss.item() == pytest.approx((r.regression + 2 * r.global_ + 0.5 * r.regularisation).item(), rel=1e-5)


@pytest.mark.parametrize("projection", ["student", "external"])
@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_every_distance_is_zero_at_its_target_and_trains_the_projection(distance, projection):
    model = small_cat(
        embedding_dim=5,
        regularisation_weight=1.0,
        regularisation_distance=distance,
        regularisation_projection=projection,
        regularisation_layer=2,
    )
    spec, visible = small_batch(clips=1, masks=1)
    with torch.no_grad():
        cls = model.encode(spec, visible)[1][2]
        if projection == "student":
            embedding = model.regulariser(cls)
        else:  # the projection goes from the narrower to the wider: an embedding whose image is the CLS token
            model.regulariser.bias.copy_(cls[0])
            embedding = torch.zeros(1, 5)
    assert model(spec, visible, embedding, rng=RNG).regularisation.abs() < 1e-5
    result = model(spec, visible, embedding + 20 * torch.randn(1, 5), rng=RNG)
    assert result.regularisation > 1e-3
    result.loss.backward()
    assert model.regulariser.weight.grad.abs().sum() > 0


def test_distances_are_the_released_ones():
    """By the formula, in float64, written out with numpy."""
    a, b = np.random.default_rng(0).standard_normal((2, 3, 512))
    root = np.sqrt(512)
    cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = {
        "l2": ((a - b) ** 2).sum(-1) / root,
        "l1": np.abs(a - b).sum(-1) / root,
        "cosine": (1 - cosine) / root,
        "kl": (p * (np.log(p) - np.log(q))).sum(-1),
        "bare_cosine": 1 - cosine,
        "kl_from_external": (q * (np.log(q) - np.log(p))).sum(-1),
    }
    assert expected.keys() == DISTANCES.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            DISTANCES[name](torch.from_numpy(a), torch.from_numpy(b)), value, 1e-12, err_msg=name
        )
    zero = torch.zeros(1, 512, dtype=torch.float64)
    assert DISTANCES["cosine"](zero, torch.from_numpy(b[:1])).item() == pytest.approx(1 / root)


@pytest.mark.parametrize("projection", ["student", "external"])
def test_external_embeddings_of_unit_length(projection):
    options = {"embedding_dim": 5, "regularisation_weight": 1.0, "regularisation_projection": projection}
    model = small_cat(**options, regularisation_normalise=True)
    plain = small_cat(**options)
    plain.load_state_dict(model.state_dict())
    spec, visible = small_batch(clips=2, masks=2)
    embedding = 30 * torch.randn(2, 5)
    embedding[1] = 0  # has no direction, and stays
    unit = torch.stack([embedding[0] / embedding[0].norm(), embedding[1]])
    found = model(spec, visible, embedding, rng=RNG).regularisation
    torch.testing.assert_close(found, plain(spec, visible, unit, rng=RNG).regularisation)
    assert (found - plain(spec, visible, embedding, rng=RNG).regularisation).abs() > 1


def test_either_side_is_projected():
    """L_r by the formula, in float64: s(W cls + b, e) or s(cls, W e + b), summed over the clip-clones."""
    for projection, shape in (("student", (5, 32)), ("external", (32, 5))):
        model = small_cat(embedding_dim=5, regularisation_weight=1.0, regularisation_projection=projection).double()
        assert model.regulariser.weight.shape == shape
        spec, visible = (x.double() if x.is_floating_point() else x for x in small_batch(clips=2, masks=2))
        embedding = torch.randn(2, 5, dtype=torch.float64)
        with torch.no_grad():
            cls, W, b = model.encode(spec, visible)[1][0], model.regulariser.weight, model.regulariser.bias
            e = embedding.repeat_interleave(2, dim=0)
            left, right = (cls @ W.T + b, e) if projection == "student" else (cls, e @ W.T + b)
            expected = ((left - right) ** 2).sum() / left.shape[1] ** 0.5
            found = model(spec, visible, embedding, rng=RNG).regularisation
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # the losses are taken in float32


def test_objectives_of_earlier_runs_keep_their_distance():
    """A run wrote all its fields; what a person writes means what it says today."""
    whole = {key: value for key, value in to_mapping(ObjectiveConfig()).items() if key != "regularisation_projection"}
    for old, new in (("cosine", "bare_cosine"), ("kl", "kl_from_external")):
        with pytest.warns(UserWarning, match=f"'{old}' of an earlier version is '{new}' now"):
            assert (
                from_mapping(ObjectiveConfig, whole | {"regularisation_distance": old}).regularisation_distance == new
            )
        assert from_mapping(ObjectiveConfig, {"regularisation_distance": old}).regularisation_distance == old
        now = to_mapping(ObjectiveConfig(regularisation_distance=old))
        assert from_mapping(ObjectiveConfig, now).regularisation_distance == old
    assert from_mapping(ObjectiveConfig, whole) == ObjectiveConfig()


@pytest.mark.parametrize("assign", [False, True])
def test_an_encoder_made_without_memory_is_whole_once_it_is_loaded(assign):
    """Positions are in no state dict."""
    good = Encoder(SMALL).eval()
    with torch.device("meta"):
        late = Encoder(SMALL).eval()
    if not assign:
        late.to_empty(device="cpu")
    late.load_state_dict(good.state_dict(), assign=assign)
    spec, visible = small_batch()
    with torch.no_grad():
        assert torch.equal(late(spec, visible), good(spec, visible))
        late.to_empty(device="cpu").load_state_dict(good.state_dict())
        assert torch.equal(late(spec, visible), good(spec, visible))
    assert torch.equal(deepcopy(late).bfloat16().positions, good.positions.bfloat16())
    assert late.to("meta").positions.is_meta


def test_pre_training_made_without_memory_goes_on_once_it_is_loaded():
    good = small_cat().eval()
    with torch.device("meta"):
        late = small_cat().eval()
    late.to_empty(device="cpu").load_state_dict(good.state_dict())
    spec, visible = small_batch()
    for model in (good, late):
        model.update_teacher(0.5)
    with torch.no_grad():
        assert late(spec, visible, rng=RNG).loss == good(spec, visible, rng=RNG).loss


def test_only_the_student_learns():
    model = small_cat()
    spec, visible = small_batch()
    model.train()
    assert not model.teacher.training
    model(spec, visible, rng=RNG).loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_teacher_follows_the_student():
    model = small_cat()
    before = model.teacher.cls.clone()
    with torch.no_grad():
        model.student.cls.add_(1)
    model.update_teacher(0.75)
    torch.testing.assert_close(model.teacher.cls.data, before + 0.25)


def test_noise_depends_on_rng_alone():
    model = small_cat()
    spec, visible = small_batch()
    first = model(spec, visible, rng=RNG).loss
    torch.manual_seed(99)
    assert model(spec, visible, rng=RNG).loss == first
    assert model(spec, visible, rng=torch.tensor([1, 10_000])).loss != first


def test_masked_indices_complete_the_visible_ones():
    visible = torch.tensor([[3, 0], [1, 2]])
    assert masked_indices(visible, 5).tolist() == [[1, 2, 4], [0, 3, 4]]


def test_attention_of_few_tokens_trains_in_fp32_on_a_cpu():
    q, k, v, incoming = torch.randn(4, 2, 3, 26, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def attended(f, dtype):
        tensors = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        x = f(*tensors)
        return [t.bfloat16() for t in (x, *torch.autograd.grad(x, tensors, incoming.to(x.dtype)))]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attended(attend, torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    expected = attended(F.scaled_dot_product_attention, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bf16_autocast_keeps_losses_in_fp32():
    model = small_cat()
    spec, visible = small_batch()
    exact = model(spec, visible, rng=RNG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(spec, visible, rng=RNG)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(exact.loss.item(), rel=0.03)
    result.loss.backward()


def test_whole_step_is_one_graph():
    model = small_cat(embedding_dim=5, regularisation_weight=1.0)
    spec, visible = small_batch()
    embedding = torch.randn(2, 5)
    expected = model(spec, visible, embedding, rng=RNG)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(spec, visible, embedding, rng=RNG)
    torch.testing.assert_close(list(result), list(expected))
    result.loss.backward()
    assert model.student.cls.grad is not None


def operators_called(kernels):
    """Backends that a step of a model with these kernels asks for, by operator."""
    asked = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "cat_kernels":
                asked.setdefault(func._schema.name.split("::")[1], set()).add((kwargs or {}).get("backend", "auto"))
            return func(*args, **(kwargs or {}))

    with torch.device("meta"):
        model = CAT(dataclasses.replace(SMALL, channels=(16, 32), kernels=kernels))
        spec, visible = torch.empty(2, 1, 64, 128), torch.empty(4, 6, dtype=torch.int64)
        with Watch():
            model(spec, visible, rng=torch.empty(2, dtype=torch.int64)).loss.backward()
        return asked, model.student.stem.backend, model.ema().backend


@pytest.mark.parametrize(("kernels", "backend", "stem"), [
    ("auto", "auto", "auto"),
    ("reference", "torch", "visible"),
    ("dense", "torch", "dense"),
])  # fmt: skip
def test_kernels_choose_the_backend_of_every_operator(kernels, backend, stem):
    asked, *backends = operators_called(kernels)
    assert backends == [stem, backend]
    assert {name.partition("_backward")[0] for name in asked} >= {
        "gather_tokens", "restore_tokens", "average_targets", "masked_regression_loss",
    }  # fmt: skip
    assert set().union(*asked.values()) == {backend}


def test_an_earlier_versions_stem_backend_is_kernels():
    assert from_mapping(ModelConfig, {"stem_backend": "visible"}).kernels == "reference"
    assert from_mapping(ModelConfig, {"stem_backend": "triton"}).kernels == "triton"
    with pytest.raises(ConfigError, match="kernels='fast'; expected one of 'auto'"):
        from_mapping(ModelConfig, {"kernels": "fast"})


@pytest.mark.parametrize(("bad", "message"), [
    ({"stem": "conv"}, "stem='conv'"),
    ({"stem": "patch"}, "expected one, the patch size"),
    ({"embed_dim": 30}, "embed_dim=30"),
    ({"num_heads": 5}, "num_heads=5"),
    ({"mel_bins": 100}, "mel_bins=100"),
    ({"decoder_dim": 40}, "decoder_dim=40"),
    ({"num_heads": 0}, "num_heads=0; expected at least 1"),
    ({"embed_dim": 0}, "embed_dim=0"),
    ({"decoder_groups": 0}, "decoder_groups=0"),
    ({"decoder_kernel": 2}, "an odd kernel"),
    ({"decoder_layers": -1}, "decoder_layers=-1"),
    ({"resolutions": ()}, r"resolutions=\(\)"),
    ({"resolutions": (4, 0)}, "resolutions"),
    ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
])  # fmt: skip
def test_impossible_architectures(bad, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**bad)


@pytest.mark.parametrize(("bad", "message"), [
    ({"regularisation_distance": "mse"}, "expected one of"),
    ({"global_loss_reduction": "none"}, "'sum' or 'mean'"),
    ({"regularisation_projection": "both"}, "'student' or 'external'"),
    ({"regularisation_schedule": "cosine"}, "expected one of .'constant', 'warmup', 'decay', 'stop'"),
    ({"regularisation_schedule": "stop"}, "regularisation_steps=0; expected the updates .* 1 or more"),
    ({"regularisation_steps": -1}, "regularisation_steps=-1; expected the updates .* 0 or more"),
    ({"noise_std": -0.1}, "noise_std=-0.1"),
])  # fmt: skip
def test_impossible_objectives(bad, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**bad)


def test_objective_that_does_not_fit_the_model():
    with pytest.raises(ValueError, match="regularisation_layer=4; expected 0 to 3"):
        small_cat(embedding_dim=5, regularisation_weight=1.0, regularisation_layer=4)
    with pytest.raises(ValueError, match="needs external embeddings"):
        small_cat(regularisation_weight=1.0)
    spec, visible = small_batch()
    with pytest.raises(ValueError, match="no external embedding"):
        small_cat(embedding_dim=5, regularisation_weight=1.0)(spec, visible, rng=RNG)


@pytest.mark.parametrize("shape", [(2, 64, 128), (2, 1, 64, 80), (2, 1, 60, 128), (2, 1, 0, 128), (1, 1, 12304, 128)])
def test_spectrograms_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"expect"):
        small_cat().student(torch.zeros(shape))
