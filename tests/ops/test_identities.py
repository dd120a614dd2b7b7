"""Identities of the advantages on ragged rows, where a neighbour is the next *valid* position."""

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.ops.advantages import gae, reinforce, rewards_to_go

floats = st.floats(-5, 5, width=32)
rows = hnp.arrays(np.float32, (3, 6), elements=floats)
masks = hnp.arrays(bool, (3, 6))
many = settings(max_examples=50, deadline=None)
run, to_go = jax.jit(gae), jax.jit(rewards_to_go)


def valid(x: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(row, np.float64)[ok] for row, ok in zip(np.asarray(x), mask, strict=True)]


@many
@given(rows, rows, masks, st.floats(0, 1, width=32))
def test_lambda_0_is_delta(rewards, values, mask, gamma):
    """A_t = r_t + gamma V_{t+1} - V_t, and the return r_t + gamma V_{t+1}."""
    advantages, returns = run(rewards, values, mask, gamma, 0.0)
    found = zip(valid(advantages, mask), valid(returns, mask), valid(rewards, mask), valid(values, mask), strict=True)
    for advantage, target, r, v in found:
        expected = r + gamma * np.append(v[1:], 0)[: len(v)]
        np.testing.assert_allclose(target, expected, atol=1e-4)
        np.testing.assert_allclose(advantage, expected - v, atol=1e-4)


@many
@given(rows, rows, masks)
def test_gamma_and_lambda_1_are_the_return_minus_the_value(rewards, values, mask):
    """A_t = sum_{s >= t} r_s - V_t: no other value enters, and without a critic it is the reward to go."""
    advantages, returns = run(rewards, values, mask, 1.0, 1.0)
    without = valid(to_go(rewards, mask, 1.0), mask)
    found = zip(valid(advantages, mask), valid(returns, mask), without, valid(rewards, mask), strict=True)
    for (advantage, target, alone, r), v in zip(found, valid(values, mask), strict=True):
        expected = np.cumsum(r[::-1])[::-1]
        np.testing.assert_allclose(advantage, expected - v, atol=1e-4)
        np.testing.assert_allclose(target, expected, atol=1e-4)
        np.testing.assert_allclose(alone, expected, atol=1e-4)


@many
@given(hnp.arrays(np.float32, 8, elements=floats), st.floats(-3, 3, width=32))
def test_one_baseline_for_all_shifts_every_score_alike(scores, baseline):
    np.testing.assert_allclose(reinforce(jax.numpy.asarray(scores), baseline), scores - np.float32(baseline), atol=1e-6)
