"""Batches of labelled clips: a function of (seed, step), with the targets of the clips that are in them."""

import dataclasses
import itertools
import os
import pickle

import numpy as np
import pytest
import torch

from cat.data import Clip, FeatureConfig, Manifest, log_mel, read_audio
from cat.data.augment import AugmentConfig
from cat.data.batch import Batch
from cat.data.finetuning import FinetuneDataConfig, FinetuneDataset, finetune_batches, scoring_batches
from cat.data.labels import labels_of

soundfile = pytest.importorskip("soundfile")

RATE, PATCH = 16000, 8
FEATURES = FeatureConfig(frames=64, mel_bins=32)  # 10,480 samples
DATA = FinetuneDataConfig(batch_size=4, num_workers=0)
AUGMENT = AugmentConfig(
    roll=True, gain=True, noise=0.1, roll_frames=10, mixup=0.8, mixup_probability=0.5, mask_bins=0.3, mask_frames=0.3
)
SAMPLES = (100, 1000, 2000, 4000, 6000, 8000, 12000, 20000)  # the first is no frame, the last two are cut
ROWS = (1, 1, 2, 3, 5, 6, 8, 8)  # of 8 frames; a clip has 1 + (n - 400) // 160


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    clips = []
    for i, count in enumerate(SAMPLES):
        subtype = ("PCM_16", "FLOAT")[i % 2]
        soundfile.write(folder / f"{i}.wav", 0.1 * random.standard_normal(count) + 0.05, RATE, subtype=subtype)
        clips.append(Clip(f"{i}.wav", labels=(f"label {i % 4}",)))
    return Manifest(tuple(clips), folder, source=folder / "train.jsonl")


def batches(manifest, num_steps=4, start_step=0, seed=7, augment=AUGMENT, waveforms=False, labels=None, **changes):
    data = dataclasses.replace(DATA, **changes)
    options = {"patch_size": PATCH, "seed": seed, "start_step": start_step, "num_steps": num_steps}
    labels = labels_of(manifest) if labels is None else labels
    return list(finetune_batches(manifest, labels, data, augment, FEATURES, waveforms=waveforms, **options))


def scored(manifest, labels=None, **options):
    labels = labels_of(manifest) if labels is None else labels
    return list(scoring_batches(manifest, labels, FEATURES, patch_size=PATCH, **options))


def same(a: Batch, b: Batch) -> bool:
    a, b = a.with_features(FEATURES).augmented(), b.with_features(FEATURES).augmented()
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("spec", "clips", "targets"))
    return tensors and (a.step, a.labels, a.failures, a.rows) == (b.step, b.labels, b.failures, b.rows)


PLAIN = AugmentConfig()


def test_a_batch(manifest):
    batch = batches(manifest, augment=PLAIN)[0]
    assert batch.spec.shape == (4, 1, 64, 32)
    assert batch.rows == tuple(ROWS[i] for i in batch.clips.tolist())
    assert batch.targets.argmax(dim=1).tolist() == [i % 4 for i in batch.clips.tolist()]
    assert batch.targets.sum(dim=1).tolist() == [1] * 4
    assert batch.augmentation is batch.frame_targets is batch.embedding is None
    assert batch.augmented() is batch


def test_every_epoch_has_every_clip_once(manifest):
    clips = torch.cat([batch.clips for batch in batches(manifest, 6)]).tolist()
    assert all(sorted(clips[start : start + 8]) == list(range(8)) for start in (0, 8, 16))


@pytest.mark.parametrize(("workers", "waveforms"), [(1, False), (2, True)])
def test_workers_change_nothing(manifest, workers, waveforms):
    expected = batches(manifest, waveforms=waveforms)
    found = batches(manifest, waveforms=waveforms, num_workers=workers)
    assert all(itertools.starmap(same, zip(expected, found, strict=True)))
    assert any(batch.augmentation.mix is not None for batch in found)
    assert any(batch.augmentation.mix is None for batch in found)


@pytest.mark.parametrize("sampler", ["shuffle", "weighted"])
def test_a_run_that_goes_on_has_the_same_batches(manifest, sampler):
    options = {"sampler": sampler, "epoch_clips": 5}
    whole, rest = batches(manifest, 6, **options), batches(manifest, 2, start_step=4, **options)
    assert all(itertools.starmap(same, zip(whole[4:], rest, strict=True)))
    assert not same(whole[4], batches(manifest, 1, start_step=4, seed=8, **options)[0])


def test_no_option_changes_another_s_numbers(manifest):
    """The clips and what is cut out of them are the same with all augmentations and with none."""
    plain, augmented = batches(manifest, augment=PLAIN), batches(manifest)
    for a, b in zip(plain, augmented, strict=True):
        assert torch.equal(a.clips, b.clips)
        assert torch.equal(a.targets, b.targets)
    rolled = batches(manifest, augment=AugmentConfig(roll=True), crop="random", waveforms=True)
    still = batches(manifest, augment=PLAIN, crop="random", waveforms=True)
    for a, b in zip(rolled, still, strict=True):
        torch.testing.assert_close(a.waveform.double().sort().values, b.waveform.double().sort().values)


def test_weighted_epochs_prefer_rare_classes(manifest):
    labels = [("common",)] * 7 + [("rare",)]
    uneven = dataclasses.replace(
        manifest, clips=[dataclasses.replace(clip, labels=of) for clip, of in zip(manifest.clips, labels, strict=True)]
    )
    drawn = batches(uneven, 40, augment=PLAIN, sampler="weighted", epoch_clips=4, num_workers=0)
    rare = np.mean([(7 in batch.clips.tolist()) for batch in drawn])
    assert rare > 0.8  # by chance 0.5; its weight is 7 times the others'
    assert all(len(set(batch.clips.tolist())) == 4 for batch in drawn)


def test_mixing_gives_a_clip_the_rows_of_the_longer_one(manifest):
    augment = AugmentConfig(mixup=0.8, mixup_probability=1.0)
    for batch in batches(manifest, augment=augment):
        own = [ROWS[i] for i in batch.clips.tolist()]
        assert batch.rows == tuple(map(max, own, reversed(own)))
        mixed = batch.augmented()
        share = batch.augmentation.mix
        torch.testing.assert_close(mixed.spec, share * batch.spec + (1 - share) * batch.spec.flip(0))
        torch.testing.assert_close(mixed.targets, share * batch.targets + (1 - share) * batch.targets.flip(0))
        assert mixed.augmentation is None
        assert mixed.augmented() is mixed


def test_a_clip_that_cannot_be_read_gives_its_place_with_its_label(manifest, tmp_path):
    for i in (0, 1, 2, 4, 5, 6, 7):
        os.link(manifest.path(i), tmp_path / f"{i}.wav")
    (tmp_path / "3.wav").write_bytes(b"no sound")
    broken = dataclasses.replace(manifest, root=tmp_path)
    found = batches(broken, augment=PLAIN)
    assert {failure.path for batch in found for failure in batch.failures} == {str(tmp_path / "3.wav")}
    for batch in found:
        assert 3 not in batch.clips.tolist()
        assert batch.targets.argmax(dim=1).tolist() == [i % 4 for i in batch.clips.tolist()]
        assert batch.rows == tuple(ROWS[i] for i in batch.clips.tolist())
    whole = scored(broken, batch_size=3)
    assert torch.cat([batch.clips for batch in whole]).tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert [len(batch.failures) for batch in whole] == [0, 1, 0]
    with pytest.raises(RuntimeError, match="8 clips in a row could not be used"):
        batches(dataclasses.replace(manifest, root=tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match="not one of the 8 clips"):
        scored(dataclasses.replace(manifest, root=tmp_path / "nowhere"))


def test_silence_is_a_clip_and_no_number_is_none(manifest, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(4000), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(4000, np.nan), RATE, subtype="FLOAT")
    clips = [Clip("silence.wav", labels=("a",)), Clip("nan.wav", labels=("b",))]
    odd = Manifest(clips, tmp_path)
    for batch in batches(odd, 2):
        assert batch.augmented().spec.isfinite().all()
        assert batch.clips.tolist() == [0] * 4
        assert {failure.reason for failure in batch.failures} == {"4000 of 4000 samples are NaN or infinite"}


# --- padding ---------------------------------------------------------------------------------------------------------


def test_hidden_padding_leaves_a_clip_what_it_is_alone(manifest):
    """A clip's rows in a batch are those of the clip alone, to the last bit."""
    whole = scored(manifest, batch_size=8)[0]
    assert whole.rows == ROWS
    for i in range(8):
        alone = scored(manifest.take(np.array([i])), labels_of(manifest))[0]
        assert alone.rows == ROWS[i : i + 1]
        assert torch.equal(alone.spec[0], whole.spec[i])
        assert torch.equal(alone.targets[0], whole.targets[i])


def test_padding_that_is_a_part_of_the_clip(manifest):
    """As the released models have it: nothing is hidden, and silence is a frame of zeros before the normalisation."""
    batch = scored(manifest, batch_size=8, padding="fill")[0]
    assert batch.rows is None
    pad = -FEATURES.mean / (2 * FEATURES.std)
    assert batch.spec[2, 0, 11:].unique().tolist() == pytest.approx([pad])
    assert torch.equal(batch.spec, scored(manifest, batch_size=8)[0].spec)
    assert batches(manifest, padding="fill")[0].rows is None


def test_a_long_clip_is_cut_at_its_end(manifest):
    wave = read_audio(manifest.path(7), RATE)
    batch = scored(manifest, batch_size=8)[0]
    expected = log_mel(torch.from_numpy(wave[: FEATURES.samples]), FEATURES)[0]
    torch.testing.assert_close(batch.spec[7], expected, rtol=0, atol=1e-4)
    middle = scored(manifest, batch_size=8, crop="center")[0]
    first = (len(wave) - FEATURES.samples + 1) // 2
    expected = log_mel(torch.from_numpy(wave[first : first + FEATURES.samples]), FEATURES)[0]
    torch.testing.assert_close(middle.spec[7], expected, rtol=0, atol=1e-4)


def test_a_clip_shorter_than_a_frame_is_one(manifest):
    """With silence behind it, whatever its mean; the frame of a clip of that length and silence is the same."""
    wave = read_audio(manifest.path(0), RATE)
    assert len(wave) == 100
    spec = scored(manifest, batch_size=8)[0].spec[0, 0]
    padded = torch.nn.functional.pad(torch.from_numpy(wave - wave.mean()), (0, 300))
    torch.testing.assert_close(spec[:1], log_mel(padded, FEATURES)[0, 0, :1], rtol=0, atol=1e-3)
    assert len(spec[1:].unique()) == 1


def test_masks_and_rolls_stay_in_the_clip(manifest):
    augment = AugmentConfig(roll_frames=10, mask_frames=1.0)
    for batch in batches(manifest, 8, augment=augment):
        frames = [max(1, min(64, 1 + (SAMPLES[i] - 400) // 160)) for i in batch.clips.tolist()]
        assert batch.augmentation.roll_B2[:, 1].tolist() == frames
        assert (batch.augmentation.frames_B2[:, 1] <= torch.tensor(frames)).all()
    for batch in batches(manifest, augment=augment, padding="fill"):
        assert batch.augmentation.roll_B2[:, 1].tolist() == [64] * 4


# --- events ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Clips of silence with a burst in each, whose place is the event; the last one has weak labels only."""
    folder = tmp_path_factory.mktemp("events")
    random = np.random.default_rng(0)
    clips = []
    for i in range(4):
        count, onset, size = (20000, 8000, 16000, 8000)[i], (9000, 2560, 7680, 0)[i], (2560, 2560, 2560, 8000)[i]
        wave = np.zeros(count)
        wave[onset : onset + size] = 0.3 * random.standard_normal(size)
        soundfile.write(folder / f"{i}.wav", wave, RATE)
        entry = {"onset": onset / RATE, "offset": (onset + size) / RATE, "label": f"label {i % 2}"}
        clips.append(Clip(f"{i}.wav", labels=("label 1",)) if i == 3 else Clip(f"{i}.wav", extra={"events": [entry]}))
    return Manifest(clips, folder)


def loud(spec):
    """(H,) rows of patches of which half is loud or more."""
    level = spec[0].mean(dim=1)
    return ((level > level.min() + 0.5).float().reshape(-1, PATCH).mean(dim=1) >= 0.5).float()


@pytest.mark.parametrize("padding", ["mask", "fill"])
@pytest.mark.parametrize("augment", [PLAIN, AugmentConfig(roll=True), AugmentConfig(roll_frames=10)])
def test_frame_targets_are_where_the_sound_is(events, padding, augment):
    """After a random crop, a roll of the waveform, and one of the frames; a row at an event's edge may differ."""
    seen = 0
    for batch in batches(events, 12, augment=augment, padding=padding, crop="random"):
        assert batch.frame_targets.shape == (4, 8, 2)
        spec = batch.augmented().spec
        for b, clip in enumerate(batch.clips.tolist()):
            rows = batch.rows[b] if padding == "mask" else 8
            assert batch.frame_weights[b].tolist() == ([0] * 8 if clip == 3 else [1] * rows + [0] * (8 - rows))
            target = batch.frame_targets[b]
            if clip == 3:
                assert target.sum() == 0
                continue
            assert target[:, 1 - clip % 2].sum() == 0
            assert batch.targets[b].tolist() == [1 - clip % 2, clip % 2]
            if target.sum() > 0 and padding == "mask":
                agreed = (target[:rows, clip % 2] == loud(spec[b])[:rows]).float().mean()
                assert agreed >= 1 - 2 / rows
                seen += 1
    assert seen > 10 or padding == "fill"


def test_frame_targets_are_mixed_as_their_clips(events):
    augment = AugmentConfig(mixup=0.8, mixup_probability=1.0)
    for batch in batches(events, augment=augment):
        mixed, share = batch.augmented(), batch.augmentation.mix
        torch.testing.assert_close(
            mixed.frame_targets, share * batch.frame_targets + (1 - share) * batch.frame_targets.flip(0)
        )
        weak = batch.clips.tolist().index(3)
        known = [b not in (weak, 3 - weak) for b in range(4)]
        assert (mixed.frame_weights.sum(dim=1) > 0).tolist() == known
        own = batch.rows
        assert mixed.frame_weights[known.index(True)].sum() == own[known.index(True)]


def test_an_event_that_is_cut_off_is_no_label(tmp_path):
    """Of the clip that was read; a label without an event stays."""
    soundfile.write(tmp_path / "long.wav", np.zeros(32000), RATE)
    entries = [{"onset": 0.1, "offset": 0.2, "label": "a"}, {"onset": 1.5, "offset": 1.6, "label": "b"}]
    clips = [Clip("long.wav", labels=("b", "c"), extra={"events": entries})]
    long = Manifest(clips, tmp_path)
    for batch in (scored(long)[0], batches(long, 1, augment=PLAIN)[0]):
        assert batch.targets[0].tolist() == [1, 0, 1]
        assert batch.frame_targets[0].sum(dim=0).tolist() == [1, 0, 0]


def test_events_that_are_scored(events):
    batch = scored(events)[0]
    assert batch.frame_weights[3].sum() == 0
    assert batch.rows == (8, 6, 8, 6)
    assert batch.frame_targets[1, :, 1].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]  # 0.16 to 0.32 s in rows of 0.08 s
    assert scored(events, labels=labels_of(events, "multi-label"))[0].frame_targets is None


# --- the rest --------------------------------------------------------------------------------------------------------


def test_all_clips_are_scored_once_in_order(manifest):
    found = scored(manifest, batch_size=3)
    assert torch.cat([batch.clips for batch in found]).tolist() == list(range(8))
    assert [len(batch.clips) for batch in found] == [3, 3, 2]
    assert found[0].augmentation is None
    later = scored(manifest, batch_size=3, num_workers=2)
    assert all(itertools.starmap(same, zip(found, later, strict=True)))
    unlabelled = next(scoring_batches(manifest, None, FEATURES, patch_size=PATCH, batch_size=8))
    assert unlabelled.targets is None
    assert torch.equal(unlabelled.spec, scored(manifest, batch_size=8)[0].spec)


def test_waveforms_become_the_same_batch(manifest):
    for made, delivered in zip(batches(manifest), batches(manifest, waveforms=True), strict=True):
        assert delivered.spec is None
        assert delivered.waveform.shape == (4, FEATURES.samples)
        with pytest.raises(ValueError, match="call with_features first"):
            delivered.augmented()
        found, expected = delivered.with_features(FEATURES).augmented(), made.augmented()
        torch.testing.assert_close(found.spec, expected.spec, rtol=0, atol=1e-4)
        assert found.rows == expected.rows


def test_batches_move_and_travel(manifest, events):
    dataset = FinetuneDataset(manifest, labels_of(manifest), DATA, AUGMENT, FEATURES, patch_size=PATCH, seed=7)
    assert same(pickle.loads(pickle.dumps(dataset))[2], dataset[2])
    moved = batches(events, 1)[0].to("meta")
    assert {t.device.type for t in (moved.targets, moved.frame_targets, moved.frame_weights)} == {"meta"}
    assert moved.augmented().spec.shape == (4, 1, 64, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop": "middle"}, "random, center, start"),
        ({"padding": "zeros"}, r"data\.padding is 'zeros'; choose one of mask, fill"),
        ({"sampler": "uniform"}, "choose one of shuffle, weighted"),
        ({"epoch_clips": 0}, r"data\.epoch_clips is 0; .* null"),
        ({"valid_share": 0.0}, r"data\.valid_share is 0\.0; it is a share, between 0 and 1"),
        ({"batch_size": 0}, r"data\.batch_size is 0"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(DATA, **changes)


def test_what_does_not_fit(manifest):
    with pytest.raises(ValueError, match=r"features\.frames is 64; it must be a multiple of the patch size, 48"):
        FinetuneDataset(manifest, labels_of(manifest), DATA, PLAIN, FEATURES, patch_size=48, seed=0)
    with pytest.raises(ValueError, match="epoch_clips is 9, but there are 8 clips"):
        batches(manifest, epoch_clips=9)
    with pytest.raises(ValueError, match="padding is 'x'"):
        scored(manifest, padding="x")
