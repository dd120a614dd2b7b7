"""Calibration by score gap: by hand, and on choices drawn from the model itself."""

import numpy as np
import pytest

from ppo_jax.train.calibration import Bucket, calibration, calibration_error, format_table


def test_two_buckets_by_hand() -> None:
    """Gaps 0, 1 | 2, 3: one tie and one right; one wrong and one right."""
    low, high = calibration(np.array([-2.0, 1.0, 3.0, 0.0]), buckets=2)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    assert (low.low, low.high, low.pairs, low.accuracy) == (0, 1, 2, 0.75)
    assert low.predicted == pytest.approx((0.5 + sigmoid(1)) / 2)
    assert (high.low, high.high, high.pairs, high.accuracy) == (2, 3, 2, 0.5)
    error = (2 * abs(0.75 - low.predicted) + 2 * abs(0.5 - high.predicted)) / 4
    assert calibration_error([low, high]) == pytest.approx(error)


@pytest.mark.parametrize(("scale", "calibrated"), [(1.0, True), (3.0, False), (1 / 3, False)])
def test_only_the_right_scale_is_calibrated(scale: float, calibrated: bool) -> None:
    """Choices drawn with probability sigmoid(gap); scores too large are over-confident, too small under-confident."""
    rng = np.random.default_rng(0)
    gaps = np.abs(rng.normal(0, 2, 20_000))
    leads = np.where(rng.random(gaps.size) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)
    table = calibration(scale * leads)
    assert (calibration_error(table) < 0.02) == calibrated
    assert sum(bucket.pairs for bucket in table) == gaps.size
    assert all(a.high <= b.low for a, b in zip(table, table[1:], strict=False))


def test_few_pairs_and_the_table() -> None:
    assert len(calibration(np.array([1.0, -1.0]))) == 2 and calibration(np.array([])) == []
    assert calibration_error([]) == 0
    lines = format_table([Bucket(0.0, 0.5, 10, 0.6, 0.55)])
    assert len(lines) == 2 and "60.0 %" in lines[1] and "55.0 %" in lines[1]
