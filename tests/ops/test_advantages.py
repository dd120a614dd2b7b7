"""GAE by hand and by identity; leave-one-out and group-relative baselines."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.ops.advantages import gae, grpo, reinforce, rewards_to_go, rloo

floats = st.floats(-10, 10, width=32)
batches = hnp.arrays(np.float32, (3, 6), elements=floats)
masks = hnp.arrays(bool, (3, 6))
rates = st.floats(0, 1, width=32)
many = settings(max_examples=50, deadline=None)
jit_gae = jax.jit(gae)
jit_rloo, jit_grpo = (jax.jit(f, static_argnums=1) for f in (rloo, grpo))

REWARDS, VALUES = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[0.5, 0.6, 0.7]])


# With gamma = 1:   delta = 1 + 0.6 - 0.5 = 1.1,   2 + 0.7 - 0.6 = 2.1,    3 - 0.7 = 2.3
# With gamma = 0.9: delta = 1 + 0.54 - 0.5 = 1.04, 2 + 0.63 - 0.6 = 2.03,  3 - 0.7 = 2.3
@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        (1.0, 0.95, [1.1 + 0.95 * 4.285, 2.1 + 0.95 * 2.3, 2.3]),  # 5.17075, 4.285, 2.3
        (0.9, 0.8, [1.04 + 0.72 * 3.686, 2.03 + 0.72 * 2.3, 2.3]),  # 3.69392, 3.686, 2.3
        (1.0, 1.0, [6 - 0.5, 5 - 0.6, 3 - 0.7]),  # return to go minus value
        (1.0, 0.0, [1.1, 2.1, 2.3]),  # delta
    ],
)
def test_gae_by_hand(gamma, lam, expected):
    advantages, returns = gae(REWARDS, VALUES, jnp.ones((1, 3)), gamma, lam)
    np.testing.assert_allclose(advantages[0], expected, rtol=1e-6)
    np.testing.assert_allclose(returns[0], np.array(expected) + np.array([0.5, 0.6, 0.7]), rtol=1e-6)


def test_gae_goes_across_tokens_in_the_middle_that_are_not_the_policys():
    mask = jnp.array([[0, 1, 0, 1, 1, 0]])
    spread = lambda x: jnp.full((1, 6), jnp.nan).at[0, jnp.array([1, 3, 4])].set(x[0])
    advantages, returns = gae(spread(REWARDS), spread(VALUES), mask, 0.9, 0.8)
    np.testing.assert_allclose(advantages, [[0, 3.69392, 0, 3.686, 2.3, 0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0, 4.19392, 0, 4.286, 3.0, 0]], rtol=1e-6)


def plain_gae(rewards, values, gamma, lam):
    """One row without a mask, straight from the definition: A_t = sum_l (gamma lam)^l delta_{t+l}, in float64."""
    rewards, values = rewards.astype(np.float64), values.astype(np.float64)
    deltas = rewards + gamma * np.append(values[1:], 0) - values if len(values) else rewards
    return [sum((gamma * lam) ** i * d for i, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@many
@given(batches, batches, masks, rates, rates, st.sampled_from([np.nan, np.inf, 1e30]))
def test_gae_equals_the_definition_on_the_valid_tokens_alone(rewards, values, mask, gamma, lam, garbage):
    dirty = lambda x: np.where(mask, x, np.float32(garbage))
    advantages, returns = (np.asarray(x) for x in jit_gae(dirty(rewards), dirty(values), mask, gamma, lam))
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for row in range(3):
        ok = mask[row]
        expected = plain_gae(rewards[row][ok], values[row][ok], gamma, lam)
        np.testing.assert_allclose(advantages[row][ok], expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(returns[row][ok], np.array(expected) + values[row][ok], rtol=1e-4, atol=1e-3)


@many
@given(batches, batches, rates)
def test_lambda_1_is_the_discounted_return_minus_the_value(rewards, values, gamma):
    advantages, returns = jit_gae(rewards, values, np.ones((3, 6), bool), gamma, 1.0)
    to_go = np.zeros((3, 6))
    for t in range(5, -1, -1):
        to_go[:, t] = rewards[:, t] + (gamma * to_go[:, t + 1] if t < 5 else 0)
    np.testing.assert_allclose(returns, to_go, atol=1e-3)
    np.testing.assert_allclose(advantages, to_go - values, atol=1e-3)


@many
@given(batches, batches, masks, rates, rates)
def test_defect_1_more_padding_changes_nothing(rewards, values, mask, gamma, lam):
    pad = lambda x, fill: np.pad(x, ((0, 0), (0, 3)), constant_values=fill)
    short = jit_gae(rewards, values, mask, gamma, lam)
    long = jit_gae(pad(rewards, np.nan), pad(values, 1e9), pad(mask, False), gamma, lam)
    for a, b in zip(short, long, strict=True):
        np.testing.assert_allclose(a, b[:, :6], rtol=1e-6, atol=1e-6)


def test_defect_21_a_nan_reward_inside_the_mask_shows():
    advantages, _ = gae(jnp.array([[0.0, jnp.nan]]), jnp.zeros((1, 2)), jnp.ones((1, 2)), 1.0, 0.95)
    assert np.isnan(advantages).all()


def test_gradient_is_finite_with_garbage_in_padding():
    rewards, mask = jnp.array([[1.0, jnp.nan]]), jnp.array([[1, 0]])
    gradient = jax.grad(lambda v: gae(rewards, v, mask, 1.0, 0.95)[0].sum())(jnp.array([[0.5, jnp.inf]]))
    np.testing.assert_array_equal(gradient, [[-1, 0]])


def test_rloo_by_hand():
    # Group (1, 2, 6): minus the mean of the other two, 4, 3.5, 1.5. Group (0, 0, 3): minus 1.5, 1.5, 0.
    scores = jnp.array([1.0, 2, 6, 0, 0, 3])
    np.testing.assert_allclose(rloo(scores, 3), [-3, -1.5, 4.5, -1.5, -1.5, 3], atol=1e-6)


def test_grpo_by_hand():
    # Group (1, 2, 6): deviations -2, -1, 3, population variance 14/3.
    scores = jnp.array([1.0, 2, 6])
    np.testing.assert_allclose(grpo(scores, 3), np.array([-2, -1, 3]) / np.sqrt(14 / 3), rtol=1e-5)
    np.testing.assert_allclose(grpo(scores, 3, scale=False), [-2, -1, 3], rtol=1e-5)


@many
@given(hnp.arrays(np.float32, 12, elements=floats), st.sampled_from([2, 3, 4, 6]))
def test_rloo_is_a_multiple_of_the_deviation_from_the_group_mean(scores, k):
    groups = scores.reshape(-1, k).astype(np.float64)
    expected = k / (k - 1) * (groups - groups.mean(1, keepdims=True))
    np.testing.assert_allclose(jit_rloo(scores, k), expected.reshape(-1), atol=1e-4)


@many
@given(hnp.arrays(np.float32, 12, elements=st.integers(-100, 100).map(lambda n: n / 8)))
def test_grpo_with_two_samples_is_the_sign(scores):
    expected = np.sign(scores.reshape(-1, 2) - scores.reshape(-1, 2)[:, ::-1]).reshape(-1)
    np.testing.assert_allclose(jit_grpo(scores, 2), expected, atol=1e-4)


@pytest.mark.parametrize("value", [0.1, 1000.1, -7e5 / 9])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_defect_14_a_group_of_equal_scores_gives_0_and_not_rounding_noise(value, k):
    np.testing.assert_array_equal(grpo(jnp.full(k, value), k), 0)
    np.testing.assert_array_equal(rloo(jnp.full(k, value), k), 0)


def test_defect_19_a_failed_reward_is_in_no_baseline():
    # Group (1, failed, 3): as the group (1, 3). Group (5, failed, failed): nothing to compare with.
    scores, valid = jnp.array([1.0, jnp.nan, 3, 5, jnp.nan, jnp.nan]), jnp.array([1, 0, 1, 1, 0, 0])
    np.testing.assert_allclose(rloo(scores, 3, valid), [-2, 0, 2, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(grpo(scores, 3, valid=valid), [-1, 0, 1, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("function", [rloo, grpo])
def test_bad_groups_are_refused_with_a_reason(function):
    with pytest.raises(ValueError, match="5 scores.*group_size=2"):
        function(jnp.zeros(5), 2)
    with pytest.raises(ValueError, match="group_size=1"):
        function(jnp.zeros(4), 1)


# gamma 0.9, lam 0.8; the second row was cut after two tokens, and the critic says 2 of the state after them.
#   delta_1 = 2 + 0.9 * 2 - 0.6 = 3.2;  delta_0 = 1 + 0.9 * 0.6 - 0.5 = 1.04;  A_0 = 1.04 + 0.72 * 3.2 = 3.344
# The first row ended itself, so its bootstrap is 0: as without one.
def test_a_cut_response_is_continued_by_its_value():
    rewards, values = jnp.tile(REWARDS, (2, 1)), jnp.tile(VALUES, (2, 1))
    mask = jnp.array([[1, 1, 1], [1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8, jnp.array([0.0, 2.0]))
    plain, _ = gae(rewards, values, mask, 0.9, 0.8)
    np.testing.assert_allclose(advantages[1], [3.344, 3.2, 0], rtol=1e-6)
    np.testing.assert_allclose(returns[1], [3.844, 3.8, 0], rtol=1e-6)
    np.testing.assert_array_equal(advantages[0], plain[0])


def test_rewards_to_go_by_hand():
    # gamma 0.5, the middle token is not the policy's: 1 + 0.5 * 3 = 2.5, then 3.
    np.testing.assert_allclose(rewards_to_go(REWARDS, jnp.array([[1, 0, 1]]), 0.5), [[2.5, 0, 3]], rtol=1e-6)


def test_reinforce_subtracts_one_baseline():
    np.testing.assert_allclose(reinforce(jnp.array([1.0, 4.0]), 1.5), [-0.5, 2.5])
