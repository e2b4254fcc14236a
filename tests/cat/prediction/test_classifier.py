"""`CATClassifier`: scores of clips of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cat.checkpoints import CheckpointError, load_classifier, store
from cat.checkpoints.hub import EncoderConfig
from cat.config import to_mapping
from cat.data import FeatureConfig
from cat.data.features import log_mel
from cat.encoders import CATEncoder
from cat.model import CAT, ModelConfig
from cat.prediction import CATClassifier

RATE = 16000


@pytest.mark.parametrize("padding", ["mask", "fill"])
@pytest.mark.parametrize("kind", ["clip", "frames"])
def test_a_clips_scores_do_not_depend_on_its_neighbours(save_run, sound, kind, padding):
    classifier = CATClassifier.from_pretrained(save_run(kind, padding=padding))
    clips = [sound(s, ("low", 0.1, 0.4)) for s in (1.0, 0.33, 5.0, 1.27, 0.03)]
    together = classifier(clips, RATE)
    for row, clip in zip(together.scores, clips, strict=True):
        alone = classifier(clip, RATE).scores[0]
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=2e-6)
    assert together.scores.std(0).min() > 1e-4  # they are not all the same


def test_scores_are_those_of_the_model(save_run, sound):
    run = save_run(padding="fill")
    model, info = load_classifier(run)
    wave = sound(0.7, ("high", 0.1, 0.4))
    expected = model.probabilities(model(log_mel(torch.from_numpy(wave), info.features)).clip)
    torch.testing.assert_close(CATClassifier.from_pretrained(run)(wave, RATE).scores, expected)
    assert expected.sum().item() == pytest.approx(1)


def test_padding_is_that_of_the_checkpoint(save_run, sound):
    wave = sound(0.7)
    filled, masked = (CATClassifier.from_pretrained(save_run(padding=p))(wave, RATE).scores for p in ("fill", "mask"))
    assert (filled - masked).abs().max() > 1e-4


def test_a_long_clip_is_heard_to_its_end(tones, sound):
    """The tone in the last tenth of a second is found, and when it was."""
    prediction = tones([sound(20.0, ("low", 0.5, 1.0), ("high", 19.8, 20.0)), sound(1.0)], RATE)
    assert prediction.scores[0].tolist() == pytest.approx([0.99, 0.99, 0.01], abs=0.15)
    assert prediction.scores[1].max() < 0.1
    times, scores = prediction.clips[0].times, prediction.clips[0].windows
    assert times[0, 0] == 0
    assert times[-1, 1] == pytest.approx(20)
    assert (times[1:, 0] <= times[:-1, 1]).all()
    assert len(times) == len(scores) > 20
    loud = times[scores[:, 0] > 0.5]
    assert loud[:, 0].max() < 1.0
    assert times[scores[:, 1] > 0.5][:, 1].min() > 19.8


def test_top_is_sorted_and_mean_or_maximum_is_said(save_run, sound):
    wave = sound(6.0, ("low", 0.5, 1.0))
    single = CATClassifier.from_pretrained(save_run())
    prediction = single(wave, RATE)
    scores = [score for _, score in prediction.top(3)[0]]
    assert scores == sorted(scores, reverse=True)
    assert dict(prediction.top(3)[0]) == pytest.approx(
        dict(zip(single.classes, prediction.scores[0].tolist(), strict=True))
    )
    np.testing.assert_allclose(prediction.scores[0], prediction.clips[0].windows.mean(0), rtol=1e-6)
    several = CATClassifier.from_pretrained(save_run(loss="bce"))(wave, RATE)
    np.testing.assert_array_equal(several.scores[0], several.clips[0].windows.max(0))


def test_other_rates_and_int16(save_run, sound):
    classifier = CATClassifier.from_pretrained(save_run())
    wave = sound(1.0, ("low", 0.2, 0.8))
    expected = classifier(wave, RATE).scores
    as_int16 = classifier((wave * 32768).astype(np.int16), RATE).scores
    torch.testing.assert_close(as_int16, expected, rtol=0, atol=2e-3)
    other = classifier(sound(1.0, ("low", 0.2, 0.8), rate=48000), 48000).scores
    torch.testing.assert_close(other, expected, rtol=0, atol=0.05)


def test_silence_has_finite_scores(save_run):
    scores = CATClassifier.from_pretrained(save_run())(np.zeros(RATE, np.float32), RATE).scores
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.full(RATE, np.nan, np.float32), "NaN or infinite"),
        (np.zeros(399, np.float32), "too short: 399 samples"),
        (np.zeros((2, 3, 4), np.float32), r"shape \(2, 3, 4\)"),
    ],
)
def test_waveforms_that_cannot_be(tones, wave, message):
    with pytest.raises(ValueError, match=message):
        tones(wave, RATE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 20.0}, "window is 20 s; expected at most 1.28 s"),
        ({"hop": -1.0}, "hop is -1.0 s"),
        ({"hop": 5.0}, "expected hop and lookahead within the window"),
        ({"step": 0.5}, "expected a row of patches, 0.16 s"),
        ({"step": 0.05}, "cannot be divided by 3"),
    ],
)
def test_plans_that_do_not_fit_the_model(tones, options, message):
    with pytest.raises(ValueError, match=message):
        tones.plan(**options)


def test_a_pre_trained_run_has_no_classes(tmp_path):
    model = ModelConfig(channels=(8, 8), embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_layers=1)
    config = {"model": to_mapping(model), "features": to_mapping(FeatureConfig(frames=64))}
    store.save(tmp_path / "checkpoints", step=1, model=CAT(model).state_dict(), optimizer={}, config=config)
    with pytest.raises(CheckpointError, match="cat-audio finetune"):
        CATClassifier.from_pretrained(tmp_path)


def test_a_hub_folder_says_the_same(save_run, sound, tmp_path):
    run = CATClassifier.from_pretrained(save_run("frames", padding="fill"))
    run.save_pretrained(tmp_path / "hub")
    folder = CATClassifier.from_pretrained(tmp_path / "hub")
    assert torch.equal(folder(sound(0.5), RATE).scores, run(sound(0.5), RATE).scores)
    assert (folder.classes, folder.names, folder.info.padding, folder.has_frames) == (
        run.classes,
        run.names,
        "fill",
        True,
    )


def test_an_encoders_folder_has_no_classes(tmp_path):
    model = ModelConfig(channels=(8, 8), embed_dim=16, depth=1, num_heads=2, decoder_dim=16, decoder_layers=1)
    CATEncoder(EncoderConfig(model, FeatureConfig())).save_pretrained(tmp_path / "hub")
    with pytest.raises(CheckpointError, match="is an encoder and has no classes"):
        CATClassifier.from_pretrained(tmp_path / "hub")
