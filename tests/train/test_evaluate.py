"""Evaluation: the same key gives the same responses, and the KL is what the logits say."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.train.evaluate import make_evaluate
from ppo_jax.train.experience import evaluate_reference, make_experience, score_rollout, share_prefix
from ppo_jax.train.options import PPOConfig
from tests.train import toy
from tests.train.toy import CONFIG, FROZEN, HYPER, P


@functools.cache
def evaluate():
    return make_evaluate(toy.algorithm(toy.ONCE)._replace(reward=toy.worth))


def run(policy, seed: int = 0, hyper=HYPER):
    return evaluate()(policy, FROZEN, toy.prompts(), jax.random.key(seed), hyper)


def test_the_same_key_gives_the_same_responses_and_another_key_others():
    policy = toy.moved(toy.start()).policy
    first, again, other = run(policy), run(policy), run(policy, seed=1)
    np.testing.assert_array_equal(first.rollout.tokens, again.rollout.tokens)
    np.testing.assert_array_equal(first.kl, again.kl)
    assert np.any(np.asarray(first.rollout.tokens) != other.rollout.tokens)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(policy)), "training goes on with it"


def test_policies_are_compared_on_equal_random_numbers():
    start = toy.start()
    near = toy.moved(start, scale=1e-6)
    np.testing.assert_array_equal(run(start.policy).rollout.tokens, run(near.policy).rollout.tokens)


def test_scores_are_the_rewards():
    result = run(toy.moved(toy.start()).policy)
    tokens, mask = np.asarray(result.rollout.tokens)[:, P:], np.asarray(result.rollout.response_mask)
    expected = [sum(float(toy.WORTH[t]) for t in row[on]) for row, on in zip(tokens, mask, strict=True)]
    np.testing.assert_allclose(result.scores.reward, expected, rtol=1e-5, atol=1e-6)


def test_kl_is_summed_over_the_response_at_the_sampling_temperature():
    policy = toy.moved(toy.start()).policy
    for temperature in (0.5, 1.3):
        result = run(policy, hyper=HYPER._replace(temperature=temperature))
        tokens = result.rollout.tokens
        positions = positions_from_mask(result.rollout.mask)

        def logprobs(adapter, tokens=tokens, positions=positions, temperature=temperature) -> np.ndarray:
            hidden = apply(FROZEN.base, adapter, CONFIG, tokens, positions)
            logits = np.asarray(hidden @ FROZEN.base["unembedding"].T, np.float64)[:, P - 1 : -1] / temperature
            logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            return np.take_along_axis(logs, np.asarray(tokens)[:, P:, None], axis=-1)[..., 0]

        difference = (logprobs(policy.adapter) - logprobs({})) * np.asarray(result.rollout.response_mask)
        assert np.abs(difference).max() > 0.1
        np.testing.assert_allclose(result.kl, difference.sum(axis=1), rtol=1e-3, atol=1e-4)


def test_under_a_filter_that_is_the_policy_the_kl_is_that_of_training():
    """Of the distribution after the filter: what `make_experience` penalises, also where policy and base are equal."""
    sampling = dataclasses.replace(toy.SAMPLING, top_k=2)
    algorithm = toy.algorithm(PPOConfig(sampling=sampling, behaviour="filtered"))
    policy = toy.start().policy
    found = make_evaluate(algorithm)(policy, FROZEN, toy.prompts(), jax.random.key(0), HYPER)
    collected = share_prefix(algorithm, policy, FROZEN, found.rollout)
    reference = evaluate_reference(algorithm, policy, FROZEN, collected, HYPER)
    scores = score_rollout(toy.worth, FROZEN, collected)
    kl = make_experience(algorithm, collected, scores, reference, HYPER).kl
    expected = np.where(np.asarray(found.rollout.response_mask), kl, 0).sum(axis=1)
    np.testing.assert_allclose(found.kl, expected, rtol=1e-4, atol=1e-5)
    assert found.kl.mean() > 0.1


def test_the_base_itself_has_kl_0():
    np.testing.assert_allclose(run(toy.start().policy).kl, 0.0, atol=1e-5)


def test_nothing_recompiles():
    run(toy.start().policy)
    programs = evaluate()._cache_size()
    for seed, temperature in enumerate((0.0, 0.4, 1.0)):
        run(toy.moved(toy.start(), seed=seed + 1).policy, seed, HYPER._replace(temperature=temperature, kl_coef=0.9))
    assert evaluate()._cache_size() == programs


def test_without_a_device_reward_there_are_no_scores():
    evaluate = make_evaluate(toy.algorithm(toy.ONCE))
    result = jax.eval_shape(evaluate, toy.start().policy, FROZEN, toy.prompts(), jax.random.key(0), HYPER)
    assert result.scores is None
    assert result.kl.shape == (toy.B,)


@pytest.mark.parametrize("kind", ["lora above a shared prefix", "full"])
def test_a_prefix_reaches_the_reward_only_where_one_is_shared(kind: str):
    seen = []

    def spy(frozen, rollout, prefix, prefix_layers):
        seen.append((prefix is None, prefix_layers))
        return toy.worth(frozen, rollout, prefix, prefix_layers)

    policy = toy.start(toy.ADAPTERS[kind]()).policy
    evaluate = make_evaluate(toy.algorithm(toy.ONCE)._replace(reward=spy))
    jax.eval_shape(evaluate, policy, FROZEN, toy.prompts(), jax.random.key(0), HYPER)
    assert seen == [(False, 1) if "shared" in kind else (True, 0)]
