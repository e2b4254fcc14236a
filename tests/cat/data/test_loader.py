"""Batches: a pure function of (seed, step), with every clip's label and embedding beside it."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from cat.data import (
    Batch,
    Clip,
    DataConfig,
    EmbeddingWriter,
    FeatureConfig,
    Manifest,
    ManifestError,
    eval_batches,
    log_mel,
    pretrain_batches,
)
from cat.data.dataset import PretrainDataset
from cat.data.features import remove_mean
from cat.data.masks import MaskConfig
from cat.data.randomness import Purpose, generator
from cat.data.reading import sampling_advice

soundfile = pytest.importorskip("soundfile")

RATE = 16000
FEATURES = FeatureConfig(frames=32, mel_bins=32)  # 5,360 samples
MASKS = MaskConfig(ratio=0.5, num_masks=2, block=1)
DATA = DataConfig(batch_size=3, num_workers=0)
CLIPS = 8


def tone(clip):
    """Hz, one mel bin and more from clip to clip."""
    return 350 * (clip + 1)


def mel_bin(frequency):
    """The bin of FEATURES whose centre is nearest."""
    low, high, mel = (1127 * np.log(1 + f / 700) for f in (20, RATE / 2, frequency))
    return round((mel - low) / (high - low) * (FEATURES.mel_bins + 1)) - 1


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Eight clips, a tone of its own in each, at three rates, with their labels and embeddings."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    clips = []
    for i in range(CLIPS):
        rate = (16000, 22050, 8000)[i % 3]
        t = np.arange(int(rate * (0.2 + 0.1 * i)))[:, None] / rate
        wave = 0.3 * np.sin(2 * np.pi * tone(i) * t) + 0.01 * random.standard_normal((len(t), 1 + i % 2))
        soundfile.write(folder / f"{i}.wav", wave, rate, subtype="FLOAT")
        clips.append(Clip(f"{i}.wav", labels=(f"label {i}",)))
    with EmbeddingWriter(folder / "e.npy", Manifest(tuple(clips), folder), dim=4, encoder="x") as writer:
        writer.append(range(CLIPS), np.stack([np.full(4, i) for i in range(CLIPS)]))
    return writer.manifest


@pytest.fixture(scope="module")
def sixteen_bits(manifest, tmp_path_factory):
    """The same tones as mono files of 16-bit samples at the rate of FEATURES; the shortest has one frame and a half."""
    folder = tmp_path_factory.mktemp("sixteen bits")
    random = np.random.default_rng(1)
    for i in range(CLIPS):
        t = np.arange(600 if i == 0 else int(RATE * 0.1 * (i + 1))) / RATE
        wave = 0.3 * np.sin(2 * np.pi * tone(i) * t) + 0.01 * random.standard_normal(len(t))
        soundfile.write(folder / f"{i}.wav", wave, RATE, subtype="PCM_16")
    return dataclasses.replace(manifest, root=folder)


def batches(manifest, num_steps, start_step=0, seed=7, data=DATA, waveforms=False, **changes):
    data = dataclasses.replace(data, **changes)
    options = {"patch_size": 8, "seed": seed, "start_step": start_step, "num_steps": num_steps, "manifest": manifest}
    options["waveforms"] = waveforms
    return list(pretrain_batches(data, FEATURES, MASKS, **options))


def same(a: Batch, b: Batch) -> bool:
    sound = ("spec",) if a.waveform is None else ("waveform", "lengths")
    return same_rest(a, b) and all(torch.equal(getattr(a, name), getattr(b, name)) for name in sound)


def same_rest(a: Batch, b: Batch) -> bool:
    """Everything but the sound."""
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("visible", "clips", "embedding"))
    return tensors and (a.step, a.labels, a.failures) == (b.step, b.labels, b.failures)


def check_together(batch: Batch):
    """Labels, embeddings and audio belong to the clips the batch names."""
    for i, clip in enumerate(batch.clips.tolist()):
        assert batch.labels[i] == (f"label {clip}",)
        assert batch.embedding[i].tolist() == [clip] * 4
        assert batch.spec[i, 0, :12].mean(dim=0).argmax().item() == mel_bin(tone(clip))


def test_a_batch(manifest):
    batch = batches(manifest, 1)[0]
    assert batch.spec.shape == (3, 1, 32, 32)
    assert batch.spec.dtype == torch.float32
    assert batch.spec.isfinite().all()
    assert batch.visible.shape == (6, 8)  # 16 patches, half of them visible
    assert batch.clips.shape == (3,)
    assert batch.failures == []
    check_together(batch)


def test_every_epoch_has_every_clip_once_in_another_order(manifest):
    clips = torch.cat([batch.clips for batch in batches(manifest, 16)]).tolist()
    epochs = [tuple(clips[start : start + CLIPS]) for start in range(0, 48, CLIPS)]
    assert all(sorted(epoch) == list(range(CLIPS)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


@pytest.mark.parametrize(("num_workers", "waveforms"), [(1, False), (2, False), (2, True)])
def test_workers_change_nothing(manifest, num_workers, waveforms):
    options = {"crop": "random", "roll": True, "gain": True, "waveforms": waveforms}
    alone = batches(manifest, 6, **options)
    shared = batches(manifest, 6, num_workers=num_workers, **options)
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_threads_of_the_main_process_change_nothing(manifest):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = batches(manifest, 2)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert all(same(a, b) for a, b in zip(two, batches(manifest, 2), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_resuming_gives_the_same_batches(manifest):
    options = {"roll": True, "gain": True}
    assert all(
        same(a, b)
        for a, b in zip(batches(manifest, 9, **options)[5:], batches(manifest, 4, start_step=5, **options), strict=True)
    )


def test_another_seed_is_another_run(manifest):
    a, b = batches(manifest, 3), batches(manifest, 3, seed=8)
    assert torch.cat([x.clips for x in a]).tolist() != torch.cat([x.clips for x in b]).tolist()
    assert not torch.equal(a[0].visible, b[0].visible)


def test_a_data_set_smaller_than_a_batch(manifest):
    two = dataclasses.replace(manifest, clips=manifest.clips[:2])
    batch = batches(two, 1, batch_size=5)[0]
    assert sorted(batch.clips[:2].tolist()) == sorted(batch.clips[2:4].tolist()) == [0, 1]


def test_crops_roll_and_gain(manifest):
    """Options do not change each other's random numbers; the crop moves from epoch to epoch."""
    longest = dataclasses.replace(manifest, clips=(dataclasses.replace(manifest.clips[7], embedding=0),))

    def spec(**options):
        return batches(longest, 1, batch_size=2, **options)[0].spec

    start, centre, moving = spec(crop="start"), spec(crop="center"), spec(crop="random")
    assert torch.equal(start[0], start[1])
    assert torch.equal(centre[0], centre[1])
    assert not torch.equal(start, centre)
    assert not torch.equal(moving[0], moving[1])
    louder = spec(crop="random", gain=True) - moving
    assert louder.std(dim=(1, 2, 3)).max() < 1e-3  # a gain shifts log-mel by a constant
    assert louder.mean(dim=(1, 2, 3)).abs().min() > 1e-4
    assert not torch.equal(spec(crop="start", roll=True), start)


def test_gain_is_that_of_the_released_recipe(manifest):
    gains = np.array([generator(0, Purpose.WAVEFORM, 0, clip).beta(10, 10) + 0.5 for clip in range(2000)])
    assert gains.mean() == pytest.approx(1.0, abs=0.01)
    assert gains.std() == pytest.approx((1 / 84) ** 0.5, abs=0.01)  # Beta(10, 10): variance 1/84


# --- clips that cannot be read ---------------------------------------------------------------------------------------


def with_bad(manifest, *bad):
    """The manifest with some clips' files missing."""
    clips = tuple(
        dataclasses.replace(clip, path=f"missing {clip.path}") if i in bad else clip
        for i, clip in enumerate(manifest.clips)
    )
    return dataclasses.replace(manifest, clips=clips)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_readable_clip_takes_the_place(manifest, num_workers):
    bad = with_bad(manifest, 2, 5)
    good = batches(manifest, 8)
    for expected, batch in zip(good, batches(bad, 8, num_workers=num_workers), strict=True):
        missing = [clip for clip in expected.clips.tolist() if clip in (2, 5)]
        assert {f.path for f in batch.failures} >= {str(manifest.root / f"missing {clip}.wav") for clip in missing}
        assert all(f.reason == "no such file" for f in batch.failures)
        assert not {2, 5} & set(batch.clips.tolist())
        check_together(batch)
        for before, after in zip(expected.clips.tolist(), batch.clips.tolist(), strict=True):
            assert after == before or before in (2, 5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_weighted_epochs_have_rare_labels_more_often_and_no_clip_twice(manifest, num_workers):
    uneven = dataclasses.replace(
        manifest,
        clips=[dataclasses.replace(clip, labels=("rare" if i == 7 else "common",) if i else ())
               for i, clip in enumerate(manifest.clips)],
    )  # fmt: skip
    options = {"sampler": "weighted", "epoch_clips": 4, "batch_size": 2, "num_workers": num_workers}
    clips = [batch.clips.tolist() for batch in batches(uneven, 40, **options)]
    epochs = [first + second for first, second in zip(clips[::2], clips[1::2], strict=True)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    drawn = np.bincount(np.concatenate(epochs), minlength=8) / len(epochs)
    assert drawn[7] > 0.7  # by chance 0.57; its weight is six times the others'
    assert drawn[0] == 0  # has no label
    advice = sampling_advice(DataConfig(sampler="weighted"), uneven)
    assert "set data.epoch_clips below 7" in advice[0]
    assert "1 of the 8 clips have no label" in advice[1]
    with pytest.raises(ManifestError, match="none of its 8 clips has a label"):
        batches(uneven.take(np.zeros(8, dtype=int)), 1, **options)


def test_the_replacement_is_the_next_of_the_order(manifest):
    dataset = PretrainDataset(manifest, DATA, FEATURES, MASKS, patch_size=8, seed=7)
    order = dataset._order.epoch(0).tolist()
    batch = batches(with_bad(manifest, order[0], order[1]), 1)[0]
    assert batch.clips.tolist() == [order[2], order[2], order[2]]
    assert [f.path.split("missing ")[1] for f in batch.failures] == [f"{order[i]}.wav" for i in (0, 1, 1)]


def test_nothing_readable(manifest):
    with pytest.raises(RuntimeError, match=r"8 clips in a row could not be used.*no such file"):
        batches(with_bad(manifest, *range(CLIPS)), 1)


def test_a_clip_without_its_embedding_is_replaced(manifest, tmp_path):
    for i in range(CLIPS):
        if i != 3:
            np.save(tmp_path / f"{i}.npy", np.full(4, i, dtype=np.float32))
    files = tuple(tmp_path / f"{i}.npy" for i in range(CLIPS))
    released = dataclasses.replace(manifest, embeddings=None, embedding_files=files)
    seen = batches(released, 3)
    assert {f.path for batch in seen for f in batch.failures} == {str(tmp_path / "3.npy")}
    for batch in seen:
        check_together(batch)


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_reads_all_clips_in_order(manifest, num_workers):
    found = list(eval_batches(manifest, FEATURES, batch_size=3, num_workers=num_workers))
    assert [batch.clips.tolist() for batch in found] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert all(batch.visible is None for batch in found)
    for batch in found:
        check_together(batch)
    again = list(eval_batches(manifest, FEATURES, batch_size=3))
    assert all(torch.equal(a.spec, b.spec) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize(
    ("bad", "clips"),
    [
        ((1,), [[0, 2], [3, 4, 5], [6, 7]]),
        ((0, 1, 2), [[3, 4, 5], [6, 7]]),
        ((3, 4, 5, 6, 7), [[0, 1, 2]]),
    ],
)
def test_evaluation_leaves_out_and_names_unreadable_clips(manifest, bad, clips):
    found = list(eval_batches(with_bad(manifest, *bad), FEATURES, batch_size=3))
    assert [batch.clips.tolist() for batch in found] == clips
    assert len([failure for batch in found for failure in batch.failures]) == len(bad)
    for batch in found:
        check_together(batch)


def test_evaluation_of_nothing(manifest):
    with pytest.raises(RuntimeError, match=r"not one of the 8 clips.*no such file"):
        list(eval_batches(with_bad(manifest, *range(CLIPS)), FEATURES, batch_size=3))


# --- waveforms, for features on the run's device ---------------------------------------------------------------------

# Measured on a CPU: no difference at all. Room for libraries that sum in another order where the padding is wider.
ROUNDING = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("options", [{}, {"roll": True}, {"gain": True}], ids=["plain", "roll", "gain"])
@pytest.mark.parametrize("files", ["manifest", "sixteen_bits"])
def test_features_made_afterwards_are_those_of_the_workers(files, options, request):
    manifest = with_bad(request.getfixturevalue(files), 2)
    made, delivered = (batches(manifest, 6, waveforms=waveforms, **options) for waveforms in (False, True))
    assert any(batch.failures for batch in made)
    for expected, batch in zip(made, delivered, strict=True):
        assert batch.spec is None
        assert expected.waveform is expected.lengths is None
        assert same_rest(batch, expected)
        found = batch.with_features(FEATURES)
        assert found.waveform is found.lengths is None
        assert found.spec.dtype == torch.float32
        torch.testing.assert_close(found.spec, expected.spec, **ROUNDING)
        check_together(found)
        assert expected.with_features(FEATURES) is expected


def test_waveforms_have_one_width_and_their_own_lengths(sixteen_bits):
    assert FEATURES.samples == 5360
    seen = set()
    for batch in batches(sixteen_bits, 8, waveforms=True):
        assert batch.waveform.shape == (3, 5360)
        expected = [600 if clip == 0 else min(1600 * (clip + 1), 5360) for clip in batch.clips.tolist()]
        assert batch.lengths.tolist() == expected
        for wave, length in zip(batch.waveform, expected, strict=True):
            assert wave[:length].any()
            assert not wave[length:].any()
        seen.update(batch.clips.tolist())
    assert seen == set(range(CLIPS))


def test_sixteen_bits_travel_as_they_are(sixteen_bits, manifest):
    """As int16 when every clip of the batch is; the features are those of the same samples as float, bit for bit."""
    for batch in batches(sixteen_bits, 4, waveforms=True, roll=True):
        assert batch.waveform.dtype == torch.int16
        as_float = dataclasses.replace(batch, waveform=batch.waveform.float() / 32768)
        assert torch.equal(batch.with_features(FEATURES).spec, as_float.with_features(FEATURES).spec)
    (gained,) = batches(sixteen_bits, 1, waveforms=True, gain=True)
    assert gained.waveform.dtype == torch.float32
    assert gained.waveform.abs().max() < 1
    one_float = dataclasses.replace(
        sixteen_bits,
        clips=(dataclasses.replace(sixteen_bits.clips[0], path=str(manifest.path(0))), *sixteen_bits.clips[1:]),
    )
    exact, mixed = (next(eval_batches(m, FEATURES, CLIPS, waveforms=True)) for m in (sixteen_bits, one_float))
    assert (exact.waveform.dtype, mixed.waveform.dtype) == (torch.int16, torch.float32)
    assert torch.equal(exact.waveform[1:] / 32768, mixed.waveform[1:])


def test_evaluation_by_waveforms(manifest):
    bad = with_bad(manifest, 0, 1, 2, 6)  # a batch without a clip, and one that lacks a clip
    made, delivered = (list(eval_batches(bad, FEATURES, 3, waveforms=waveforms)) for waveforms in (False, True))
    for expected, batch in zip(made, delivered, strict=True):
        assert (batch.clips.tolist(), batch.failures) == (expected.clips.tolist(), expected.failures)
        torch.testing.assert_close(batch.with_features(FEATURES).spec, expected.spec, **ROUNDING)


def test_features_read_no_values_on_the_host(sixteen_bits):
    """On the meta device there are none: whatever waits for a GPU to know a value fails here."""
    batch = batches(sixteen_bits, 1, waveforms=True)[0].to("meta")
    assert {t.device.type for t in (batch.waveform, batch.lengths, batch.visible, batch.embedding)} == {"meta"}
    assert batch.with_features(FEATURES).spec.shape == (3, 1, 32, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("files", ["manifest", "sixteen_bits"])
def test_features_of_a_gpu_are_those_of_the_workers(files, request):
    manifest = request.getfixturevalue(files)
    made, delivered = (batches(manifest, 3, waveforms=waveforms) for waveforms in (False, True))
    mode = torch.cuda.get_sync_debug_mode()
    for step, (expected, batch) in enumerate(zip(made, delivered, strict=True)):
        assert batch.waveform.is_pinned()
        assert batch.lengths.is_pinned()
        torch.cuda.set_sync_debug_mode("error" if step else mode)  # the first call makes tables and FFT plans
        try:
            found = batch.to("cuda").with_features(FEATURES)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        # Another FFT: bins far below the loudest of their frame are made of rounding.
        torch.testing.assert_close(found.spec.cpu(), expected.spec, rtol=0, atol=1e-3)


# --- features, settings, scale ---------------------------------------------------------------------------------------


def test_features_of_a_batch_are_those_of_each_clip(manifest):
    from cat.data import read_audio

    batch = next(iter(eval_batches(manifest, FEATURES, batch_size=CLIPS)))
    for i in range(CLIPS):
        wave = read_audio(manifest.path(i), RATE, max_samples=FEATURES.samples, start=0.5)
        torch.testing.assert_close(batch.spec[i], log_mel(torch.from_numpy(wave), FEATURES)[0], rtol=0, atol=1e-4)


def test_features_remove_the_clip_mean_and_pad_before_the_normalisation():
    wave = 0.1 * torch.randn(1, 1040, generator=torch.Generator().manual_seed(0))
    spec = log_mel(wave, FeatureConfig())
    assert spec.shape == (1, 1, 1024, 128)
    torch.testing.assert_close(log_mel(wave + 0.25, FeatureConfig()), spec, rtol=0, atol=1e-3)
    assert spec[0, 0, 5:].unique().tolist() == pytest.approx([4.268 / (2 * 4.569)])
    as_int = (wave * 32768).round().to(torch.int16)
    assert torch.equal(log_mel(as_int, FeatureConfig()), log_mel(as_int.float() / 32768, FeatureConfig()))


def test_the_clip_mean_does_not_depend_on_the_padding():
    random = torch.Generator().manual_seed(0)
    for length in range(1000, 5000, 97):
        wave = torch.rand(1, length, generator=random)
        padded = torch.nn.functional.pad(wave, (0, 5360 - length))
        lengths = torch.tensor([length])
        assert torch.equal(remove_mean(padded, lengths)[:, :length], remove_mean(wave, lengths))
        assert torch.equal(remove_mean(wave), remove_mean(wave, lengths))


def test_ten_second_clips_fill_998_frames():
    spec = log_mel(torch.randn(160_000, generator=torch.Generator().manual_seed(0)), FeatureConfig())
    assert spec[0, 0, 997].std() > 0
    assert len(spec[0, 0, 998:].unique()) == 1
    assert FeatureConfig().samples == 164_080


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop": "middle"}, "random, center, start"),
        ({"features": "cuda"}, r"data\.features is 'cuda'; choose one of auto, gpu, cpu"),
        ({"batch_size": 0}, r"data\.batch_size is 0"),
        ({"num_workers": -1}, r"data\.num_workers is -1"),
        ({"sampler": "balanced"}, r"data\.sampler is 'balanced'; choose one of shuffle, weighted"),
        ({"epoch_clips": 0}, r"data\.epoch_clips is 0"),
        ({"max_failed_share": 1.5}, r"data\.max_failed_share is 1\.5"),
    ],
)
def test_bad_data_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(DATA, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 0}, r"features\.frames is 0"),
        ({"std": 0.0}, r"features\.std is 0"),
        ({"frame_shift_ms": 0.01}, "every 0 at 16000 Hz"),
    ],
)
def test_bad_feature_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        FeatureConfig(**changes)


def test_frames_must_fill_patches(manifest):
    with pytest.raises(ValueError, match=r"features\.frames is 32; .* 48"):
        PretrainDataset(manifest, DATA, FEATURES, MASKS, patch_size=48, seed=0)


def test_data_sets_travel_to_workers_that_are_not_forked(manifest):
    dataset = PretrainDataset(manifest, DATA, FEATURES, MASKS, patch_size=8, seed=7)
    assert same(pickle.loads(pickle.dumps(dataset))[3], dataset[3])


def test_batches_move_to_a_device(manifest):
    batch = batches(manifest, 1)[0]
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.spec, moved.visible, moved.clips, moved.embedding)} == {"meta"}
    assert moved.labels == batch.labels


@pytest.mark.gpu
def test_batches_are_pinned(manifest):
    for num_workers in (0, 2):
        assert batches(manifest, 1, num_workers=num_workers)[0].spec.is_pinned()
