"""XARES-LLM: padding is nobody's business but the mask's."""

from __future__ import annotations

import pytest
import torch

from cat.harnesses import xares_llm
from tests.cat.harnesses.conftest import noise


def test_one_name_ends_in_encoder():
    assert [name for name in dir(xares_llm) if name.endswith("Encoder")] == ["XaresLLMEncoder"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_clips_frames_do_not_depend_on_neighbours_or_padding(checkpoint, side):
    encoder = xares_llm.XaresLLMEncoder()
    lengths, most = (30000, 6000, 300), 32000
    audio, mask = noise(3, most, seed=5), torch.zeros(3, most, dtype=torch.int64)  # what is masked is no silence
    clips = [noise(length, seed=length) for length in lengths]
    for number, clip in enumerate(clips):
        place = slice(0, len(clip)) if side == "right" else slice(most - len(clip), most)
        audio[number, place], mask[number, place] = clip, 1
    features, feature_mask = encoder(audio, mask)
    assert features.shape == (3, 47, encoder.output_dim)
    assert (feature_mask.shape, feature_mask.dtype) == ((3, 47), torch.int64)
    assert feature_mask.sum(1).tolist() == [47, 10, 1]
    for number, clip in enumerate(clips):
        alone, _ = encoder(clip)
        own = feature_mask[number].bool()
        torch.testing.assert_close(features[number][own], alone[0], rtol=1e-4, atol=1e-5)
        assert not features[number][~own].any()


def test_without_a_mask_all_is_audio(checkpoint):
    features, mask = xares_llm.XaresLLMEncoder()(noise(2, 16000))
    assert features.shape == (2, 25, 16)
    assert mask.all()


def test_a_clip_that_is_all_padding(checkpoint):
    mask = torch.tensor([[1], [0]]).expand(2, 16000)
    features, feature_mask = xares_llm.XaresLLMEncoder()(noise(2, 16000), mask)
    assert feature_mask.sum(1).tolist() == [25, 0]
    assert features.isfinite().all()
