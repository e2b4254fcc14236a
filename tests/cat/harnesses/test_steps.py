"""Frames between an encoder's rows are its rows of the waveform from later on."""

from __future__ import annotations

import pytest
import torch

from cat.harnesses import steps
from tests.cat.harnesses.conftest import noise


@pytest.mark.parametrize("samples", [4000, 16000, 40000])  # the last is three windows
@pytest.mark.parametrize("step", [640, 1280, 2560])
def test_frames_are_rows_of_the_waveform_from_later_on(encoder, samples, step):
    clip = noise(samples)
    (frames,) = steps.frames_every(encoder, [clip], step)
    for number in range(2560 // step):
        out = encoder(clip[number * step :], 16000)
        mine = frames[number :: 2560 // step]
        torch.testing.assert_close(mine, out.frames[0, : len(mine)], rtol=1e-4, atol=1e-5)
        centres = steps.first_centre(encoder) + step * torch.arange(len(frames))[number :: 2560 // step]
        torch.testing.assert_close(centres.double() - number * step, 16000 * out.times[: len(mine)])


@pytest.mark.parametrize("samples", [1, 399, 1400, 1401, 2040, 2041, 9999])
def test_there_are_the_frames_whose_centre_is_inside(encoder, samples):
    (frames,) = steps.frames_every(encoder, [noise(samples)], 640)
    last = steps.first_centre(encoder) + 640 * (len(frames) - 1)
    assert last < samples <= last + 640 or (len(frames) == 1 and samples <= 1400)


def test_clips_do_not_depend_on_their_neighbours(encoder):
    clips = [noise(samples, seed=samples) for samples in (300, 30000, 9000, 1000)]
    for clip, found in zip(clips, steps.frames_of_steps(encoder, clips, 640), strict=True):
        (alone,) = steps.frames_of_steps(encoder, [clip], 640)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [640, 1280, 2560])
@pytest.mark.parametrize("samples", [0, 500, 16000, 16001])
def test_a_frame_is_the_one_nearest_to_its_steps_middle(encoder, monkeypatch, step, samples):
    centres = steps.first_centre(encoder) + step * torch.arange(max(1, -((1400 - samples) // step)))
    monkeypatch.setattr(steps, "frames_every", lambda *_: [centres[:, None]])
    (found,) = steps.frames_of_steps(encoder, [torch.zeros(samples)], step)
    assert len(found) == -(-samples // step)
    for number, centre in enumerate(found[:, 0]):
        middle = (number + 0.5) * step
        assert abs(centre - middle) == (centres - middle).abs().min()


@pytest.mark.parametrize("text", ["0", "-40", "50", "25.6", "320", "nan", "inf", "forty"])
def test_steps_that_do_not_fit(encoder, monkeypatch, text):
    monkeypatch.setenv("CAT_STEP_MS", text)
    with pytest.raises(ValueError, match=rf"CAT_STEP_MS is '{text}'; expected a whole part of a row.* 40, 80, 160"):
        steps.step_of(encoder)


def test_no_checkpoint_is_named(monkeypatch):
    monkeypatch.delenv("CAT_CHECKPOINT", raising=False)
    with pytest.raises(ValueError, match="set CAT_CHECKPOINT to a run, a checkpoint"):
        steps.load()
