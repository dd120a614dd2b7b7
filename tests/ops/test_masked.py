"""Masked statistics: hand-computed values, and the promise that nothing outside the mask matters."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.ops.masked import masked_mean, masked_var, masked_whiten

GARBAGE = [np.nan, np.inf, -np.inf, 1e30]
floats = st.floats(-100, 100, width=32)
batches = hnp.arrays(np.float32, (3, 5), elements=floats)
masks = hnp.arrays(bool, (3, 5))
many = settings(max_examples=50, deadline=None)

mean, var, whiten = jax.jit(masked_mean), jax.jit(masked_var), jax.jit(masked_whiten)


def test_mean_by_hand():
    x = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, jnp.nan]])
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    assert float(masked_mean(x, mask)) == pytest.approx(7 / 3)
    np.testing.assert_allclose(masked_mean(x, mask, axis=1), [1.5, 4.0])
    np.testing.assert_allclose(masked_mean(x, mask, axis=0), [2.5, 2.0, 0.0])  # an empty column is 0


def test_mean_of_broadcast_mask_counts_every_element():
    # [2, 3] values under a [3] mask with two positions on: 4 elements, not 2.
    assert float(masked_mean(jnp.array([[1.0, 2, 9], [3, 4, 9]]), jnp.array([1, 1, 0]))) == 10 / 4


def test_var_by_hand():
    # Mean 5, squared deviations 9+1+1+1+0+0+4+16 = 32: 32/8 of the population, 32/7 unbiased.
    x = jnp.array([2.0, 4, 4, 4, 5, 5, 7, 9, jnp.nan])
    mask = jnp.arange(9) < 8
    assert float(masked_var(x, mask)) == pytest.approx(32 / 7)
    assert float(masked_var(x, mask, unbiased=False)) == pytest.approx(4)


def test_var_along_an_axis():
    x, mask = jnp.array([[1.0, 3, jnp.nan], [7, jnp.nan, jnp.nan]]), jnp.array([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(masked_var(x, mask, axis=1), [2.0, 0.0])  # (1 + 1) / (2 - 1); a lone value has none


def test_whiten_by_hand():
    # Mean 4, deviations -2, 0, 2, unbiased variance 8 / 2 = 4.
    x, mask = jnp.array([2.0, jnp.nan, 4.0, 6.0]), jnp.array([1, 0, 1, 1])
    np.testing.assert_allclose(masked_whiten(x, mask), [-1, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(masked_whiten(x, mask, shift_mean=False), [3, 0, 4, 5], atol=1e-6)


@many
@given(batches, masks)
def test_agrees_with_numpy_on_the_selected_values(x, mask):
    chosen = x[mask].astype(np.float64)
    scale = 1 + np.abs(chosen).max(initial=0)
    assert float(mean(x, mask)) == pytest.approx(chosen.mean() if chosen.size else 0, abs=1e-5 * scale)
    expected = chosen.var(ddof=1) if chosen.size > 1 else 0
    assert float(var(x, mask)) == pytest.approx(expected, rel=1e-4, abs=1e-6 * scale**2)


@many
@given(batches, masks, st.sampled_from(GARBAGE))
def test_values_outside_the_mask_never_matter(x, mask, garbage):
    dirty = np.where(mask, x, np.float32(garbage))
    for function in (mean, var, whiten):
        np.testing.assert_array_equal(function(x, mask), function(dirty, mask))


@many
@given(batches, masks)
def test_whitened_has_mean_0_and_variance_1_or_is_0(x, mask):
    y = whiten(x, mask)
    assert np.isfinite(y).all() and (np.asarray(y)[~mask] == 0).all()
    if mask.sum() > 1 and np.ptp(x[mask]) > 0.1:
        assert float(mean(y, mask)) == pytest.approx(0, abs=1e-4)
        assert float(var(y, mask)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 0], [1, 1, 1]], ids=["none", "one", "equal"])
def test_defect_14_whitening_without_variance_is_finite(mask, shift_mean):
    x, mask = jnp.full(3, 0.1), jnp.array(mask)
    expected = mask * (0.0 if shift_mean else 0.1)
    np.testing.assert_allclose(masked_whiten(x, mask, shift_mean), expected, atol=1e-7)
    gradient = jax.grad(lambda x: masked_whiten(x, mask, shift_mean).sum())(x)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("value", [0.1, 1000.1, 1e6 / 3])
def test_defect_14_equal_values_whiten_to_0_and_not_to_rounding_noise(value):
    # The float32 mean of 1001 equal numbers is off by an ulp or more; so small a variance must not blow that up.
    np.testing.assert_array_equal(masked_whiten(jnp.full(1001, value), jnp.ones(1001)), 0)


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
def test_defect_21_a_nan_inside_the_mask_shows(function):
    assert np.isnan(function(jnp.array([1.0, jnp.nan, 2.0]), jnp.array([1, 1, 1]))).any()


@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
def test_gradient_is_finite_with_garbage_outside_the_mask(function):
    x, mask = jnp.array([1.0, jnp.nan, 3.0, jnp.inf]), jnp.array([1, 0, 1, 0])
    gradient = np.asarray(jax.grad(lambda x: jnp.sum(function(x, mask) ** 2))(x))
    assert np.isfinite(gradient).all() and (gradient[[1, 3]] == 0).all()


def test_sums_in_float32_even_for_bfloat16():
    # bfloat16 holds 8 significant bits: adding 1 to 256 would stay 256.
    x = jnp.ones(1000, jnp.bfloat16)
    assert float(masked_mean(x, jnp.ones(1000))) == 1
