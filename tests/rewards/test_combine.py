"""A reward out of several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.rewards.base import Reward
from ppo_jax.rewards.combine import add_scores, scaled, sum_rewards, weighted_sum
from ppo_jax.types import Frozen, Rollout, Scores


def fixed(reward, valid, **parts):
    return lambda prompts, responses, metadata: Scores(
        np.array(reward, np.float32), np.array(valid), {k: np.array(v, np.float32) for k, v in parts.items()}
    )


NAN = np.nan
TEXTS = (["p"] * 4, ["r"] * 4, [{}] * 4)


def test_the_sum_by_hand():
    """0.5 * a - 2 * b: 0.5*1 - 2*0.25 = 0; 0.5*3 - 2*(-1) = 3.5."""
    total = weighted_sum(
        {"a": (fixed([1, 3, 5, 7], [True] * 4), 0.5), "b": (fixed([0.25, -1, 0, 1], [True] * 4), -2.0)}
    )
    scores = total(*TEXTS)
    np.testing.assert_array_equal(scores.reward, np.array([0.0, 3.5, 2.5, 1.5], np.float32))
    assert scores.valid.all() and scores.reward.dtype == np.float32
    np.testing.assert_array_equal(scores.parts["a"], [1, 3, 5, 7])  # before the weight
    np.testing.assert_array_equal(scores.parts["b"], np.array([0.25, -1, 0, 1], np.float32))


def test_a_row_counts_only_where_all_parts_do():
    """Defect 19: a part that failed is not 0 in the sum, whatever number it left, and even at weight 0."""
    total = weighted_sum(
        {
            "a": (fixed([1, NAN, 3, 4], [True, False, True, True]), 1.0),
            "b": (fixed([1, 2, 0, 4], [True, True, False, True]), 0.0),
            "c": (fixed([1, 2, 3, np.inf], [True] * 4), 1.0),
        }
    )
    scores = total(*TEXTS)
    np.testing.assert_array_equal(scores.valid, [True, False, False, False])
    np.testing.assert_array_equal(scores.reward, [2, NAN, NAN, NAN])
    np.testing.assert_array_equal(scores.parts["b"], [1, 2, NAN, 4])


def test_a_sum_that_overflows_is_no_score():
    total = weighted_sum({"a": (fixed([3e38, 1, 1, 1], [True] * 4), 1.0), "b": (fixed([3e38, 1, 1, 1], [True] * 4), 1)})
    np.testing.assert_array_equal(total(*TEXTS).valid, [False, True, True, True])


def test_parts_of_parts_keep_their_names():
    inner = weighted_sum({"x": (fixed([1] * 4, [True] * 4), 2.0)})
    scores = weighted_sum({"outer": (inner, 3.0)})(*TEXTS)
    assert sorted(scores.parts) == ["outer", "outer/x"]
    assert scores.reward[0] == 6 and scores.parts["outer"][0] == 2 and scores.parts["outer/x"][0] == 1


def test_a_sum_of_rewards_runs_each_where_it_can_run():
    """2 a + b on the device, 3 c on the host; a row of which a part failed, on either side, is no score."""
    nothing = Rollout(*(jnp.zeros(()) for _ in Rollout._fields))
    table = lambda frozen, *_: Scores(frozen.reward, jnp.ones(3, bool), {})
    a = Reward(table, params=jnp.array([1.0, 2.0, jnp.nan]))
    b = Reward(table, params=jnp.array([0.5, 0.25, 1.0]))
    c = Reward(host=fixed([1, NAN, 3], [True, False, True], own=[7, 8, 9]))
    whole = sum_rewards({"a": (a, 2.0), "b": (b, 1.0), "c": (c, 3.0)})
    device = jax.jit(lambda frozen: whole.device(frozen, nothing, None, 0))(Frozen({}, whole.params))
    np.testing.assert_array_equal(device.reward, [2.5, 4.25, NAN])
    np.testing.assert_array_equal(device.parts["a"], [1, 2, NAN])
    host = whole.host(["p"] * 3, ["r"] * 3, [{}] * 3)
    both = add_scores(device, host)
    np.testing.assert_array_equal(both.reward, [5.5, NAN, NAN])
    np.testing.assert_array_equal(both.valid, [True, False, False])
    assert both.parts.keys() == {"a", "b", "c", "c/own"}
    assert add_scores(device, None) is device and add_scores(None, host) is host
    assert sum_rewards({"a": (a, 1.0)}).host is None and sum_rewards({"c": (c, 1.0)}).device is None


@pytest.mark.parametrize("weight", [2.0, -0.5])
def test_a_device_reward_times_a_number(weight: float):
    nothing = Rollout(*(jnp.zeros(()) for _ in Rollout._fields))
    reward = lambda *_: Scores(jnp.array([1.0, 3.0]), jnp.array([True, False]), {"p": jnp.array([1.0, 1.0])})
    scores = scaled(reward, weight)(Frozen({}), nothing, None, 0)
    np.testing.assert_array_equal(scores.reward, [weight, 3 * weight])
    np.testing.assert_array_equal(scores.valid, [True, False])
    np.testing.assert_array_equal(scores.parts["p"], [1, 1])
