"""Scalar heads and the token that they read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.heads import RewardHead, ValueHead, last_token, score, value

HIDDEN = jax.random.normal(jax.random.key(0), (3, 5, 16))


def test_the_critic_starts_at_zero_and_can_leave_it() -> None:
    head = ValueHead().init(jax.random.key(1), HIDDEN)["params"]
    assert {k: v.shape for k, v in head["value"].items()} == {"kernel": (16, 1), "bias": (1,)}
    np.testing.assert_array_equal(value(head, HIDDEN), np.zeros((3, 5)))
    # d/dw sum V = sum h and d/db = 15: not stuck at its zero start.
    slopes = jax.grad(lambda h: value(h, HIDDEN).sum())(head)["value"]
    np.testing.assert_allclose(slopes["kernel"][:, 0], HIDDEN.sum((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(slopes["bias"], [15], rtol=1e-6)


def test_value_is_linear() -> None:
    weight = jnp.arange(16.0)
    head = {"value": {"kernel": weight[:, None], "bias": jnp.array([2.0])}}
    np.testing.assert_allclose(value(head, HIDDEN), HIDDEN @ weight + 2, rtol=1e-5)


def test_reward_head_by_hand() -> None:
    """gain * (w . h) + bias with w . h = 1*3 - 2*1 = 1: 4 * 1 + 0.5."""
    head = {"reward": {"kernel": jnp.array([[1.0], [-2.0]])}, "gain": jnp.array(4.0), "bias": jnp.array(0.5)}
    np.testing.assert_allclose(score(head, jnp.array([[3.0, 1.0]])), [4.5], rtol=1e-6)


def test_reward_head_starts_with_small_random_weights_and_no_normalisation() -> None:
    head = RewardHead().init(jax.random.key(0), jnp.zeros((1, 4095)))["params"]
    assert set(head) == {"reward", "gain", "bias"} and set(head["reward"]) == {"kernel"}
    assert (head["gain"], head["bias"]) == (1, 0)
    assert head["reward"]["kernel"].std() == pytest.approx(4096**-0.5, rel=0.05)
    other = RewardHead().init(jax.random.key(1), jnp.zeros((1, 4095)))["params"]
    assert np.abs(other["reward"]["kernel"] - head["reward"]["kernel"]).max() > 0.01


def test_heads_compute_in_float32_on_bfloat16_states() -> None:
    """256 * (1 + 2^-10) = 256.25: a weight rounded to bfloat16 (1) or a sum rounded to it would give 256."""
    states, weight = jnp.array([[256.0]], jnp.bfloat16), jnp.array([[1 + 2**-10]])
    for out in (
        value({"value": {"kernel": weight, "bias": jnp.zeros(1)}}, states),
        score({"reward": {"kernel": weight}, "gain": jnp.ones(()), "bias": jnp.zeros(())}, states),
    ):
        assert out.dtype == jnp.float32 and out.tolist() == [256.25]
    assert ValueHead().init(jax.random.key(0), states)["params"]["value"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("mask", "slot"),
    [
        ([1, 1, 1, 1, 1], 4),
        ([0, 0, 1, 1, 1], 4),  # left-padded
        ([1, 1, 1, 0, 0], 2),  # right-padded
        ([0, 1, 0, 1, 0], 3),  # prompt and response, each padded
        ([1, 0, 0, 0, 0], 0),
        ([0, 0, 0, 0, 0], 0),  # nothing to read: slot 0, and finite
    ],
)
def test_last_token(mask: list[int], slot: int) -> None:
    found = last_token(HIDDEN, jnp.array([mask] * 3, bool))
    np.testing.assert_array_equal(found, HIDDEN[:, slot])


def test_last_token_is_chosen_row_by_row_and_sends_gradients_there_alone() -> None:
    mask = jnp.array([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]], bool)
    slopes = jax.grad(lambda hidden: last_token(hidden, mask).sum())(HIDDEN)
    expected = np.zeros(HIDDEN.shape)
    expected[[0, 1, 2], [1, 4, 3]] = 1
    np.testing.assert_array_equal(slopes, expected)


def test_garbage_after_the_last_token_does_not_reach_it() -> None:
    mask = jnp.array([[1, 1, 1, 0, 0]] * 3, bool)
    poisoned = jnp.where(mask[..., None], HIDDEN, jnp.nan)
    np.testing.assert_array_equal(last_token(poisoned, mask), HIDDEN[:, 2])
