"""Where the score lands, what padding may do (nothing), and running moments against numpy."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.ops.advantages import gae
from ppo_jax.ops.masked import masked_whiten
from ppo_jax.ops.rewards import RunningMoments, adjust_scores, last_token, shape_rewards, truncation_mask

floats = st.floats(-10, 10, width=32)
many = settings(max_examples=50, deadline=None)
shape = jax.jit(shape_rewards)


def test_shape_rewards_by_hand():
    # -0.5 * kl on response tokens; the score on the last one. Second row: a token in the middle is not the policy's.
    kl = jnp.array([[0.2, -0.4, 1.0, jnp.nan], [1.0, jnp.inf, 2.0, 3.0]])
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 1, 1]])
    expected = [[-0.1, 0.2, -0.5 + 3, 0], [-0.5, 0, -1, -1.5 - 7]]
    np.testing.assert_allclose(shape_rewards(jnp.array([3.0, -7.0]), kl, mask, 0.5), expected, rtol=1e-6)


def test_last_token_by_hand():
    mask = jnp.array([[1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    expected = [[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(last_token(mask), np.array(expected, bool))


@many
@given(
    hnp.arrays(np.float32, 3, elements=floats),
    hnp.arrays(np.float32, (3, 5), elements=floats),
    hnp.arrays(bool, (3, 5)),
    st.sampled_from([np.nan, np.inf]),
)
def test_rewards_sum_to_score_minus_kl_whatever_lies_outside_the_mask(scores, kl, mask, garbage):
    rewards = np.asarray(shape(scores, np.where(mask, kl, np.float32(garbage)), mask, 0.3))
    assert (rewards[~mask] == 0).all()
    expected = np.where(mask.any(1), scores, 0)
    np.testing.assert_allclose(rewards.sum(1) + 0.3 * np.where(mask, kl, 0).sum(1), expected, atol=1e-4)


def test_defect_2_scores_keep_their_fractions():
    rewards = shape_rewards(jnp.array([0.75]), jnp.zeros((1, 2)), jnp.ones((1, 2)), 0.1)
    np.testing.assert_array_equal(rewards, [[0, 0.75]])
    # Integer scores (a rule that counts) do not turn the penalty into integers either.
    rewards = shape_rewards(jnp.array([2]), jnp.full((1, 2), 0.5), jnp.ones((1, 2), jnp.int32), 0.5)
    np.testing.assert_array_equal(rewards, [[-0.25, 1.75]])


def test_defect_7_the_score_is_never_on_a_pad():
    # Lengths 1 to 4 of 4: the score sits at length - 1.
    mask = jnp.arange(4) < jnp.array([[1], [2], [3], [4]])
    rewards = shape_rewards(jnp.ones(4), jnp.zeros((4, 4)), mask, 0.1)
    np.testing.assert_array_equal(rewards.argmax(1), [0, 1, 2, 3])
    np.testing.assert_array_equal(rewards.sum(1), 1)


def test_defect_8_a_sampled_pad_id_does_not_move_the_score():
    # The policy sampled (5, pad, 6, eos): four response tokens by the mask. Token ids are not even an argument.
    rewards = shape_rewards(jnp.array([1.0]), jnp.zeros((1, 6)), jnp.array([[1, 1, 1, 1, 0, 0]]), 0.1)
    np.testing.assert_array_equal(rewards, [[0, 0, 0, 1, 0, 0]])


def test_defect_19_a_failed_reward_has_an_empty_mask_and_leaves_no_trace():
    scores, valid = jnp.array([2.0, jnp.nan, 4.0]), jnp.array([True, False, True])
    mask = jnp.ones((3, 2), bool) & valid[:, None]
    rewards = shape_rewards(scores, jnp.ones((3, 2)), mask, 0.5)
    np.testing.assert_array_equal(rewards, [[-0.5, 1.5], [0, 0], [-0.5, 3.5]])
    state = RunningMoments.init().update(scores, valid)
    # Mean 3, not (2 + 0 + 4) / 3; unbiased variance (1 + 1) / 1.
    assert (float(state.count), float(state.mean), float(state.std)) == (2, 3, pytest.approx(np.sqrt(2)))


def test_defect_1_whitened_rewards_do_not_leak_through_padding():
    # Whitening without a mask turns the pads' 0 into -mean/std, which GAE then spreads over the response.
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    rewards = shape_rewards(jnp.array([5.0, 1.0]), jnp.ones((2, 4)), mask, 0.1)
    values = jnp.where(mask, 0.5, jnp.nan)
    whitened = masked_whiten(rewards, mask, shift_mean=False)
    np.testing.assert_array_equal(whitened[0, 2:], 0)
    advantages, _ = gae(whitened, values, mask, 1.0, 0.95)
    alone, _ = gae(whitened[:1, :2], values[:1, :2], mask[:1, :2], 1.0, 0.95)
    np.testing.assert_array_equal(advantages[0], [*alone[0], 0, 0])


def test_running_moments_by_hand():
    # 1, 2 | 6: mean 3, squared deviations 4 + 1 + 9 = 14, unbiased variance 7.
    state = RunningMoments.init().update(jnp.array([1.0, 2.0]))
    state = RunningMoments.update(state, jnp.array([6.0, jnp.nan]), jnp.array([1, 0]))
    assert (float(state.count), float(state.mean), float(state.m2)) == (3, 3, 14)
    np.testing.assert_allclose(state.normalise(jnp.array([3.0, 10.0])), [0, np.sqrt(7)], rtol=1e-6)
    np.testing.assert_allclose(state.normalise(jnp.array([7.0]), shift_mean=False), [np.sqrt(7)], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float32, (5, 4), elements=floats), hnp.arrays(bool, (5, 4)), st.sampled_from([0, 1000]))
def test_running_moments_equal_those_of_the_concatenation(batches, valid, offset):
    state = RunningMoments.init()
    update = jax.jit(RunningMoments.update)
    batches = batches + np.float32(offset)
    for batch, ok in zip(batches, valid, strict=True):
        state = update(state, np.where(ok, batch, np.float32(np.nan)), ok)
    seen = batches[valid].astype(np.float64)
    assert float(state.count) == seen.size
    if seen.size:
        assert float(state.mean) == pytest.approx(seen.mean(), rel=1e-5, abs=1e-4)
    if seen.size > 1 and np.ptp(seen) > 0.1:
        assert float(state.std) == pytest.approx(seen.std(ddof=1), rel=1e-3, abs=1e-3)


def test_defect_13_one_sample_does_not_become_0():
    state = RunningMoments.init()
    np.testing.assert_array_equal(state.normalise(jnp.array([4.0])), [4.0])
    state = state.update(jnp.array([4.0]))
    assert float(state.std) == 1
    np.testing.assert_array_equal(state.normalise(jnp.array([4.0])), [4.0])


def test_equal_scores_normalise_to_0_and_not_to_noise():
    state = RunningMoments.init()
    for _ in range(3):
        state = state.update(jnp.full(7, 0.1))
    np.testing.assert_allclose(state.normalise(jnp.full(7, 0.1)), 0, atol=1e-6)


def test_a_batch_without_a_valid_score_changes_nothing():
    state = RunningMoments.init().update(jnp.array([100.0, 104.0]))
    after = state.update(jnp.array([jnp.nan]), jnp.array([False]))
    np.testing.assert_array_equal(np.array(after), np.array(state))


def test_defect_21_a_valid_nan_score_shows():
    state = RunningMoments.init().update(jnp.array([1.0, jnp.nan, 2.0]))
    assert np.isnan(state.mean)
    assert np.isnan(shape_rewards(jnp.array([jnp.nan]), jnp.zeros((1, 2)), jnp.ones((1, 2)), 0.1)).any()


def test_running_moments_live_in_jit_and_scan():
    batches = jax.random.normal(jax.random.key(0), (4, 8))
    state, _ = jax.lax.scan(lambda s, x: (s.update(x), None), RunningMoments.init(), batches)
    assert float(state.std) == pytest.approx(float(np.std(batches, ddof=1)), rel=1e-5)


# Scores 5, -3, 1 clipped to +-2: 2, -2, 1. Minus 0.1 a token for 3, 5, 0 tokens: 1.7, -2.5, 1.
# The second was cut: minus 4 is -6.5, or -4 in its place.
@pytest.mark.parametrize(
    ("rule", "expected"), [("off", [1.7, -2.5, 1.0]), ("subtract", [1.7, -6.5, 1.0]), ("replace", [1.7, -4.0, 1.0])]
)
def test_adjusted_scores_by_hand(rule, expected):
    ended = jnp.array([True, False, True])
    result = adjust_scores(jnp.array([5.0, -3.0, 1.0]), jnp.array([3, 5, 0]), ended, 2.0, 0.1, 4.0, rule)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_scores_are_left_alone_by_default():
    scores = jnp.array([1e6, -1e6, 0.125])
    unclipped = adjust_scores(scores, jnp.array([3, 5, 0]), jnp.array([True, False, True]), np.inf, 0.0, 1.0)
    np.testing.assert_array_equal(unclipped, scores)
    with pytest.raises(ValueError, match="unknown missing_eos rule 'drop'"):
        adjust_scores.__wrapped__(scores, jnp.ones(3), jnp.ones(3, bool), 1.0, 0.0, 1.0, "drop")


def test_truncation_by_hand():
    # Stop ids 7 and 9. Row 1 has a 7 at slot 1; row 2 has one only outside its mask; row 3 none.
    tokens = jnp.array([[3, 7, 9, 4], [5, 3, 7, 7], [1, 2, 3, 4]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    kept, ended = truncation_mask(tokens, mask, (7, 9))
    np.testing.assert_array_equal(kept, [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(ended, [True, False, False])
