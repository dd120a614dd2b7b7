"""Ranges of the traced scalars, the seeds' streams, and what a host reward may return."""

import itertools

import jax
import numpy as np
import pytest

from ppo_jax.rewards.scores import as_scores
from ppo_jax.train.options import check_hyper
from ppo_jax.train.state import key_stream
from ppo_jax.types import Hyper, Scores


def test_the_defaults_are_in_range() -> None:
    assert check_hyper(Hyper()) == Hyper()


def test_integers_become_floats() -> None:
    """Another type would compile a second program."""
    assert all(type(x) is float for x in check_hyper(Hyper(kl_coef=0, kl_horizon=500)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", 0.0, "positive"),  # greedy sampling has no gradient
        ("temperature", -1.0, "positive"),
        ("learning_rate", float("nan"), "positive"),
        ("learning_rate", float("inf"), "positive"),
        ("gamma", 1.01, r"in \[0, 1\]"),
        ("lam", -0.1, r"in \[0, 1\]"),
        ("clip_low", 1.5, r"in \(0, 1\]"),
        ("kl_coef", -0.1, "at least 0"),
        ("max_grad_norm", 0.0, "positive"),
        ("entropy_coef", float("nan"), "finite"),
    ],
)
def test_a_scalar_out_of_range_is_named(name: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"hyper.{name}=.* must be {allowed}"):
        check_hyper(Hyper()._replace(**{name: value}))


def test_streams_of_one_seed_share_no_key() -> None:
    names, root = ("ppo", "adapter", "evaluation", "reward"), jax.random.key(3)
    keys = [key_stream(3, name) for name in names]
    keys += [*jax.random.split(root, 8), *(jax.random.fold_in(root, i) for i in range(8, 12)), key_stream(4, "ppo")]
    words = [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys]
    assert all(a != b for a, b in itertools.combinations(words, 2))
    assert (jax.random.key_data(key_stream(3, "ppo")) == jax.random.key_data(keys[0])).all()


def test_a_host_score_that_is_not_finite_is_invalid_and_dtypes_are_fixed() -> None:
    scores = as_scores(Scores(np.array([1, np.nan, np.inf, -2.5]), np.array([1, 1, 1, 0]), {"a": np.arange(4)}), 4)
    assert scores.valid.tolist() == [True, False, False, False] and scores.valid.dtype == bool
    assert scores.reward.dtype == scores.parts["a"].dtype == np.float32
    np.testing.assert_array_equal(scores.reward, [1, np.nan, np.nan, np.nan])  # no number stands in for a failed score


@pytest.mark.parametrize("shape", [(3,), (4, 1), ()])
def test_a_host_reward_of_the_wrong_length_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the reward returned reward of shape .* for 4 responses"):
        as_scores(Scores(np.zeros(shape), np.ones(4, bool), {}), 4)


def test_rewards_of_single_tokens_pass_and_their_shape_is_checked() -> None:
    extra = np.arange(6.0).reshape(2, 3)
    given = Scores(np.ones(2), np.ones(2, bool), {}, extra)  # type: ignore[arg-type]
    np.testing.assert_array_equal(as_scores(given, 2, 3).tokens, extra)
    with pytest.raises(ValueError, match=r"tokens of shape \(2, 3\) for 2 responses of 4 slots"):
        as_scores(given, 2, 4)
