"""DPO and PPO have the same pairs; how often two leads agree; where a response stands in a row."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers.dpo_ppo_small import mark_response, settings, share_alike
from ppo_jax.types import Rollout


def test_both_ways_are_run_on_every_set_of_pairs_with_every_beta() -> None:
    runs = settings(False)
    ways = [[{**s, "way": ""} for s in runs if s["way"] == way] for way in ("DPO", "PPO")]
    assert ways[0] == ways[1] and len(runs) == 2 * len(ways[0])
    assert {(s["beta"], s["seed"]) for s in runs} == {(beta, seed) for beta in (0.1, 0.3) for seed in (0, 1, 2)}


def test_leads_agree_by_sign_a_tie_is_a_half_and_no_true_lead_does_not_count() -> None:
    truth = np.array([1.0, -2.0, 3.0, -4.0, 0.0])
    assert share_alike(np.array([5.0, -0.1, -1.0, 0.0, 7.0]), truth) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert share_alike(truth, truth) == 1 and share_alike(-truth, truth) == 0
    assert share_alike(truth, np.zeros(5)) == 0.5


def test_a_response_stands_behind_its_prompt_up_to_its_end() -> None:
    prompt, response = jnp.array([[False, True], [True, True]]), jnp.array([[True, True, False], [True, True, True]])
    none = jnp.zeros((2, 3))
    rollout = Rollout(jnp.zeros((2, 5), int), prompt, response, none, none, none, jnp.ones(2, bool), jnp.arange(2))
    assert mark_response(rollout).astype(int).tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
