"""The model whose responses can be listed: the list is whole, and sampling agrees with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers import enumerable
from experiments.papers.enumerable import CONFIG, RESPONSES, T, World, list_rows, make_world, number, optimum
from ppo_jax.models.adapters import init_full
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.state import zero_value_head
from ppo_jax.types import Policy

WORLD = make_world(2)


def test_every_response_has_its_place_and_their_probabilities_sum_to_one() -> None:
    rows = list_rows()
    assert len(RESPONSES) == 40
    np.testing.assert_array_equal(number(rows.tokens[:, -T:], rows.response_mask), np.arange(40))
    assert float(enumerable.probabilities(WORLD.base, {}).sum()) == pytest.approx(1, abs=1e-5)


def test_samples_are_as_frequent_as_the_list_says() -> None:
    sampling = Sampling(response_length=T, stop_ids=(enumerable.STOP,))
    policy = Policy(init_full(WORLD.base), zero_value_head(CONFIG))
    rollout = generate(WORLD.base, policy, CONFIG, enumerable.prompts(8192), jax.random.key(0), sampling, 1.0)
    found = np.bincount(number(rollout.tokens[:, -T:], rollout.response_mask), minlength=40) / 8192
    chances = np.asarray(enumerable.probabilities(WORLD.base, {}))
    assert np.all(np.abs(found - chances) < 5 * np.sqrt(chances / 8192) + 1e-3)


def test_the_optimum_tilts_the_reference_by_the_rewards() -> None:
    flat = World(WORLD.base, jnp.zeros(40))
    reference = np.asarray(enumerable.probabilities(WORLD.base, {}))
    np.testing.assert_allclose(optimum(flat, 0.5), reference, rtol=1e-5)
    odds = optimum(WORLD, 0.5)[:2] / reference[:2]
    assert odds[0] / odds[1] == pytest.approx(float(np.exp((WORLD.rewards[0] - WORLD.rewards[1]) / 0.5)), rel=1e-4)
    assert enumerable.total_variation(np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])) == 0.5
