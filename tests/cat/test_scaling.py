"""What varies is scaled to deviation 1; what only rounding varies is constant."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from cat.data.features import FeatureConfig
from cat.encoders import LogMelStatistics
from cat.scaling import standardising, whitening


def features(seed: int = 0, n: int = 200) -> np.ndarray:
    """(n, 8) float32, the last column 1.25 but for its last digits."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(3, [5, 1, 0.3, 0.1, 0.02, 0.004, 0.001, 0], size=(n, 8))
    rows[:, 7] = 1.25 * (1 + 1e-7 * rng.normal(size=n))
    return rows.astype(np.float32)


def test_columns_get_mean_0_and_deviation_1() -> None:
    rows = features()
    scaled = standardising(rows)(rows)
    np.testing.assert_allclose(scaled[:, :7].mean(axis=0), 0, atol=2e-3)
    np.testing.assert_allclose(scaled[:, :7].std(axis=0), 1, rtol=2e-3)
    assert scaled.dtype == np.float32


def test_a_column_that_rounding_alone_varies_is_0_for_other_rows_too() -> None:
    assert len(np.unique(features()[:, 7])) > 3
    assert not standardising(features())(features(seed=1))[:, 7].any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_unit_of_features_does_not_matter(scale) -> None:
    rows = features()
    np.testing.assert_allclose(standardising(scale * rows)(scale * rows), standardising(rows)(rows), atol=2e-3)


def test_components_get_deviation_1_and_those_of_rounding_0() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(300, 5)) * [3, 2, 1, 0.5, 0.1]) @ np.linalg.qr(rng.normal(size=(12, 5)))[0].T
    rows = (rows + 1e-8 * rng.normal(size=rows.shape)).astype(np.float32)  # of 12 components 5 say something
    whitened = whitening(rows, 8)(rows)
    assert whitened.shape == (300, 8)
    np.testing.assert_allclose(whitened[:, :5].std(axis=0, ddof=1), 1, rtol=1e-3)
    assert not whitened[:, 5:].any()


def test_nothing_that_varies_at_all() -> None:
    rows = np.full((20, 4), 0.1, np.float32)
    assert not standardising(rows)(rows).any()
    assert not whitening(rows, 3)(rows).any()


def test_a_mel_bin_without_a_frequency_says_nothing() -> None:
    """Of 128 bins at 16 kHz bin 3 lies between two frequencies of the spectrum."""
    torch = pytest.importorskip("torch")
    waves = torch.randn(40, 16000, generator=torch.Generator().manual_seed(0)) * torch.rand(40, 1)
    rows = LogMelStatistics(FeatureConfig())(waves).numpy()
    scaled = standardising(rows)(rows)
    empty = [3, 128 + 3]  # its mean and its deviation over time
    assert not scaled[:, empty].any()
    np.testing.assert_allclose(np.delete(scaled, empty, axis=1).std(axis=0), 1, rtol=1e-3)
