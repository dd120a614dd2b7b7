"""How good a policy is on fixed prompts with a fixed key: rewards, KL to the reference, samples."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppo_jax.models.config import ModelConfig
from ppo_jax.ops.kl import kl_penalty
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.experience import reference_logprobs, rollout_prefix, truncated
from ppo_jax.types import Frozen, Hyper, Policy, Prompts, Rollout, Scores


class Evaluation(NamedTuple):
    """One response per prompt and what is known of it on the device."""

    rollout: Rollout
    scores: Scores | None  # None where the reward is computed on the host
    kl: Float[Array, " B"]  # k1 estimate of KL(policy || reference), nats summed over the response


Evaluate = Callable[[Policy, Frozen, Prompts, PRNGKeyArray, Hyper], Evaluation]


def make_evaluate(
    config: ModelConfig,
    sampling: Sampling,
    reward: DeviceReward | None,
    logprob_chunk: int = 0,
    truncate_ids: tuple[int, ...] = (),
) -> Evaluate:
    """evaluate(policy, frozen, prompts, key, hyper) -> Evaluation, jitted; samples at hyper.temperature.

    With the same key two policies draw with the same random numbers, so their difference is less noisy than either.

    Args:
      logprob_chunk: positions whose logits are held at once for the reference; 0: all.
      truncate_ids: as in training, `ScoreConfig.truncate_ids`.
    """

    def evaluate(policy: Policy, frozen: Frozen, prompts: Prompts, key: PRNGKeyArray, hyper: Hyper) -> Evaluation:
        rollout = generate(frozen.base, policy, config, prompts, key, sampling, hyper.temperature)
        rollout = truncated(rollout, truncate_ids, config)
        prefix, depth = rollout_prefix(policy, frozen, rollout, config)
        scores = None if reward is None else reward(frozen, rollout, prefix, depth)
        reference = reference_logprobs(frozen, rollout, prefix, depth, hyper, config, logprob_chunk)
        kl = kl_penalty(rollout.policy_logprobs, reference, "k1")
        return Evaluation(rollout, scores, jnp.sum(jnp.where(rollout.response_mask, kl, 0.0), axis=1))

    return jax.jit(evaluate)
