"""Augmentations against their formulas, and each a function of counters alone."""

import dataclasses

import numpy as np
import pytest
import torch

from cat.data.augment import AugmentConfig, draw
from cat.data.features import FeatureConfig

FEATURES = FeatureConfig(frames=64, mel_bins=32)
ALL = AugmentConfig(noise=0.1, roll_frames=10, mixup=0.8, mixup_probability=1.0, mask_bins=0.2, mask_frames=0.2)


def drawn(config, clips=4, step=0, epoch=0, seed=0, frames=None):
    frames = [FEATURES.frames] * clips if frames is None else frames
    return draw(config, FEATURES, seed=seed, step=step, epochs=[epoch] * clips, clips=list(range(clips)), frames=frames)


def spectrograms(clips=4, seed=0):
    return torch.randn(clips, 1, FEATURES.frames, FEATURES.mel_bins, generator=torch.Generator().manual_seed(seed)) + 5


def targets(clips=4, classes=6):
    return torch.eye(classes)[:clips]


def test_nothing_is_drawn_when_all_is_off():
    assert drawn(AugmentConfig()) is None
    assert drawn(AugmentConfig(roll=True, gain=True)) is None  # of the waveform: where it is read


@pytest.mark.parametrize("name", ["noise", "roll_frames", "mixup", "mask_bins", "mask_frames"])
def test_one_option_does_not_change_another_s_numbers(name):
    """What is drawn with all of them is what is drawn with one alone."""
    off = {field.name: 0 for field in dataclasses.fields(ALL) if field.name not in (name, "mixup_probability")}
    alone, together = drawn(dataclasses.replace(ALL, **off), step=3, epoch=2), drawn(ALL, step=3, epoch=2)
    found = {key: value for key, value in vars(alone).items() if isinstance(value, torch.Tensor)}
    assert found
    assert all(torch.equal(value, getattr(together, key)) for key, value in found.items())


@pytest.mark.parametrize("name", ["noise", "roll_frames", "mixup", "mask_bins", "mask_frames"])
def test_draws_change_with_seed_and_time(name):
    off = {field.name: 0 for field in dataclasses.fields(ALL) if field.name not in (name, "mixup_probability")}
    config, spec = dataclasses.replace(ALL, **off), spectrograms()
    first, again, later, other = (
        drawn(config, 4, at, at, seed).apply(spec, targets())[0] for at, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)


def test_what_happens_to_a_clip_does_not_depend_on_the_others():
    config = dataclasses.replace(ALL, mixup=0.0)
    spec = spectrograms()
    whole, _ = drawn(config).apply(spec, targets())
    part = draw(config, FEATURES, seed=0, step=9, epochs=[0, 0], clips=[2, 1], frames=[64, 64])
    mixed, _ = part.apply(spec[[2, 1]], targets(2))
    assert torch.equal(mixed, whole[[2, 1]])


def test_the_order_is_noise_roll_mixup_and_masks():
    spec, augmentation = spectrograms(), drawn(ALL, step=2)
    none = {"noise_B": None, "clips_B2": None, "roll_B2": None, "mix": None, "bins_B2": None, "frames_B2": None}
    for names in (("noise_B", "clips_B2"), ("roll_B2",), ("mix",), ("bins_B2", "frames_B2")):
        kept = {name: getattr(augmentation, name) for name in names}
        spec, _ = dataclasses.replace(augmentation, **{**none, **kept}).apply(spec, targets())
    assert torch.equal(augmentation.apply(spectrograms(), targets())[0], spec)


# --- mixup -----------------------------------------------------------------------------------------------------------


def test_mixup_mixes_inputs_and_targets_with_the_batch_reversed():
    config = AugmentConfig(mixup=0.8, mixup_probability=1.0)
    spec, augmentation = spectrograms(), drawn(AugmentConfig(mixup=0.8, mixup_probability=1.0))
    mixed, labels = augmentation.apply(spec, targets())
    share = augmentation.mix.item()
    torch.testing.assert_close(mixed, share * spec + (1 - share) * spec.flip(0))
    assert labels[0].tolist() == pytest.approx([share, 0, 0, 1 - share, 0, 0])
    assert labels[2].tolist() == pytest.approx([0, 1 - share, share, 0, 0, 0])
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
    assert config == AugmentConfig(mixup=0.8, mixup_probability=1.0)


def test_mixup_s_share_is_beta_and_its_probability_the_batch_s():
    config = AugmentConfig(mixup=0.8, mixup_probability=0.9)
    shares = [drawn(config, 2, step) for step in range(4000)]
    assert np.mean([draw is not None for draw in shares]) == pytest.approx(0.9, abs=0.015)
    shares = np.array([draw.mix.item() for draw in shares if draw is not None])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * 2.6), abs=0.005)  # of Beta(a, a): 1 / (4 (2a + 1))


# --- SpecAugment -----------------------------------------------------------------------------------------------------


def test_masks_are_one_an_axis_and_clip_filled_with_zero():
    spec = spectrograms()
    augmentation = drawn(AugmentConfig(mask_bins=0.5, mask_frames=0.5))
    masked, labels = augmentation.apply(spec, targets())
    assert torch.equal(labels, targets())
    for i in range(4):
        (low, high), (first, last) = augmentation.bins_B2[i].tolist(), augmentation.frames_B2[i].tolist()
        expected = spec[i].clone()
        expected[:, :, low:high] = 0
        expected[:, first:last] = 0
        assert torch.equal(masked[i], expected)
    assert (masked == 0).any()


@pytest.mark.parametrize(("name", "size"), [("mask_bins", 32), ("mask_frames", 64)])
def test_width_and_place_of_a_mask(name, size):
    """Width floor(U(0, 1) x largest): every width below the largest equally often; then every place equally often."""
    largest = 6.4 / size
    augmentation = drawn(AugmentConfig(**{name: largest}), 7000)
    first, end = (augmentation.bins_B2 if name == "mask_bins" else augmentation.frames_B2).numpy().T
    width = end - first
    assert (first.min(), end.max()) == (0, size)
    shares = np.bincount(width) / len(width)
    np.testing.assert_allclose(shares, [1 / 6.4] * 6 + [0.4 / 6.4], atol=0.02)
    place = first[width == 3]
    assert len(np.unique(place)) == size - 2
    assert place.mean() == pytest.approx((size - 3) / 2, rel=0.05)


def test_masks_of_frames_stay_inside_a_clip():
    frames = [5, 20, 40, 64]
    config = AugmentConfig(mask_frames=0.5)
    for epoch in range(50):
        spans = drawn(config, epoch=epoch, frames=frames).frames_B2
        assert (spans[:, 1] <= torch.tensor(frames)).all()
        assert (spans[:, 1] - spans[:, 0] <= torch.tensor(frames) // 2).all()
    # Mixed, a clip goes as far as the longer one of both.
    mixed = dataclasses.replace(config, mixup=0.8, mixup_probability=1.0)
    ends = np.max([drawn(mixed, epoch=epoch, frames=frames).frames_B2[:, 1].numpy() for epoch in range(200)], axis=0)
    assert (ends > [40, 30, 30, 40]).all()
    assert (ends <= [64, 40, 40, 64]).all()


# --- noise and roll --------------------------------------------------------------------------------------------------


def test_noise_is_uniform_a_bin_times_uniform_a_clip():
    count = 400
    spec = torch.zeros(count, 1, 64, 32)
    noise, _ = drawn(AugmentConfig(noise=0.1), count).apply(spec, torch.zeros(count, 1))
    noise = noise.flatten(1)
    largest = noise.max(dim=1).values
    assert noise.min() >= 0
    assert largest.max() < 0.1
    assert largest.mean().item() == pytest.approx(0.05, abs=0.005)
    assert largest.std().item() == pytest.approx(0.1 / 12**0.5, abs=0.005)
    uniform = noise / largest[:, None]
    for bins in (uniform[:, :7], uniform[:, 1000:], uniform):
        assert bins.mean().item() == pytest.approx(0.5, abs=0.01)
        assert bins.std().item() == pytest.approx(1 / 12**0.5, abs=0.01)
    assert len(uniform[0].unique()) > 1900  # of 2,048: no draw is used twice
    correlation = np.corrcoef(uniform[:50].numpy()) - np.eye(50)
    assert abs(correlation).max() < 0.12


def test_noise_of_a_clip_is_the_same_wherever_it_is():
    """In whatever batch, and with whatever number of frames and bins."""
    augmentation = draw(ALL, FEATURES, seed=5, step=0, epochs=[3, 3], clips=[7, 2_000_000], frames=[64, 64])
    config = AugmentConfig(noise=0.1)
    one = draw(config, FEATURES, seed=5, step=4, epochs=[3], clips=[2_000_000], frames=[64])
    spec = spectrograms(2)
    assert torch.equal(dataclasses.replace(augmentation, roll_B2=None).shifted(spec)[1:], one.shifted(spec[1:]))


def test_noise_has_other_shapes_in_other_epochs_and_runs():
    """Not the amplitude alone."""
    config, spec = AugmentConfig(noise=0.1), torch.zeros(1, 1, 64, 32)
    shapes = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        noise = drawn(config, 1, epoch=epoch, seed=seed).shifted(spec)
        shapes.append((noise / noise.max()).flatten().numpy())
    assert abs(np.corrcoef(shapes) - np.eye(3)).max() < 0.1


def test_frames_are_rolled_by_minus_ten_to_nine():
    spec, config = spectrograms(1000), AugmentConfig(roll_frames=10)
    augmentation = drawn(config, 1000)
    rolled, _ = augmentation.apply(spec, torch.zeros(1000, 1))
    by = augmentation.roll_B2[:, 0]
    assert torch.equal(rolled[5], spec[5].roll(by[5].item(), dims=1))
    assert torch.equal(rolled[8], spec[8].roll(by[8].item(), dims=1))
    shares = np.bincount(by + 10) / 1000
    np.testing.assert_allclose(shares, [1 / 20] * 20, atol=0.025)


def test_frames_are_rolled_inside_a_clip():
    spec, frames = spectrograms(), [5, 20, 40, 64]
    augmentation = drawn(AugmentConfig(roll_frames=10), frames=frames)
    rolled, _ = augmentation.apply(spec, targets())
    for i, count in enumerate(frames):
        by = augmentation.roll_B2[i, 0].item()
        assert torch.equal(rolled[i, :, :count], spec[i, :, :count].roll(by, dims=1))
        assert torch.equal(rolled[i, :, count:], spec[i, :, count:])


# --- on a device -----------------------------------------------------------------------------------------------------


def test_a_device_is_not_waited_for():
    """On the meta device there are no values: whatever waits to know one fails here."""
    augmentation = drawn(ALL).each(lambda tensor: tensor.to("meta"))
    assert augmentation.mix.device.type == augmentation.noise_B.device.type == "meta"
    spec, labels = augmentation.apply(spectrograms().to("meta"), targets().to("meta"))
    assert spec.shape == (4, 1, 64, 32)
    assert labels.shape == (4, 6)


@pytest.mark.gpu
def test_a_gpu_gives_the_same():
    spec, labels = drawn(ALL).apply(spectrograms(), targets())
    augmentation = drawn(ALL).each(lambda tensor: tensor.pin_memory().to("cuda", non_blocking=True))
    inputs = spectrograms().cuda(), targets().cuda()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augmentation.apply(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.testing.assert_close(found[0].cpu(), spec)
    torch.testing.assert_close(found[1].cpu(), labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise": -0.1}, r"augment\.noise is -0\.1; it must be 0 \(off\) or more"),
        ({"mixup": float("nan")}, "augment.mixup is nan"),
        ({"roll_frames": -1}, "augment.roll_frames is -1"),
        ({"mixup_probability": 1.5}, "augment.mixup_probability is 1.5; it is a share"),
        ({"mask_bins": 25.6}, "augment.mask_bins is 25.6; it is a share, from 0 to 1"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**changes)
