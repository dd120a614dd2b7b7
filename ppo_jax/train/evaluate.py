"""How good a policy is on fixed prompts with a fixed key: rewards, KL to the reference, samples."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppo_jax.ops.kl import kl_penalty
from ppo_jax.rollout import generate
from ppo_jax.train.experience import cut_responses, policy_logprobs, reference_logprobs, score_rollout, share_prefix
from ppo_jax.train.options import Algorithm
from ppo_jax.types import Frozen, Hyper, Policy, Prompts, Rollout, Scores


class Evaluation(NamedTuple):
    """One response per prompt and what is known of it on the device."""

    rollout: Rollout
    scores: Scores | None  # None where the reward is computed on the host
    kl: Float[Array, " B"]  # k1 estimate of KL(policy || reference), nats summed over the response


Evaluate = Callable[[Policy, Frozen, Prompts, PRNGKeyArray, Hyper], Evaluation]


def make_evaluate(algorithm: Algorithm) -> Evaluate:
    """evaluate(policy, frozen, prompts, key, hyper) -> Evaluation, jitted; samples at hyper.temperature.

    With the same key two policies draw with the same random numbers, so their difference is less noisy than either.
    Of the algorithm the model, the reward (None: it is computed on the host) and the choices of sampling are read.
    """
    config, ppo, reward = algorithm.model, algorithm.ppo, algorithm.reward

    def evaluate(policy: Policy, frozen: Frozen, prompts: Prompts, key: PRNGKeyArray, hyper: Hyper) -> Evaluation:
        rollout = generate(frozen.base, policy, config, prompts, key, ppo.sampling, hyper.temperature)
        rollout = cut_responses(rollout, ppo.score.truncate_ids, config)
        collected = share_prefix(algorithm, policy, frozen, rollout)
        scores = None if reward is None else score_rollout(reward, frozen, collected)
        reference = reference_logprobs(config, frozen, collected, hyper, ppo.logprob_chunk)
        kl = kl_penalty(policy_logprobs(algorithm, rollout), reference, "k1")
        return Evaluation(rollout, scores, jnp.sum(jnp.where(rollout.response_mask, kl, 0.0), axis=1))

    return jax.jit(evaluate)
