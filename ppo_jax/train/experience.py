"""From a rollout and its scores to what the loss reads: reference, KL, rewards, advantages. Once per rollout."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.models.adapters import shared_layers, unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import last_token, value
from ppo_jax.models.roles import before_response, policy_depth, role_hidden, shared_prefix
from ppo_jax.models.transformer import finish_logits
from ppo_jax.ops.advantages import gae, grpo, reinforce, rewards_to_go, rloo
from ppo_jax.ops.kl import adaptive_kl, kl_penalty, linear_kl
from ppo_jax.ops.logprobs import hidden_kl, hidden_logprobs
from ppo_jax.ops.masked import EPSILON, masked_var, masked_whiten
from ppo_jax.ops.rewards import RunningMoments, adjust_scores, shape_rewards, truncation_mask
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.train.metrics import observed_kl
from ppo_jax.train.options import Algorithm
from ppo_jax.train.state import TrainState
from ppo_jax.types import Collected, Experience, Frozen, Hyper, Metrics, Minibatch, Policy, Rollout, Scores, Texts


class Reference(NamedTuple):
    """What the reference says of a rollout."""

    logprobs: Float[Array, "B T"]
    kl_full: Float[Array, "B T"] | None = None  # KL(policy || reference) over the whole vocabulary
    hidden: Float[Array, "B T D"] | None = None  # where the loss needs the reference's whole distribution


class Outcome(NamedTuple):
    """What an estimator of advantages reads: the rewards of a rollout, and what they are compared with."""

    rewards: Float[Array, "B T"]  # shaped (and whitened, where that is asked for)
    values: Float[Array, "B T"]
    mask: Bool[Array, "B T"]  # response tokens of rows whose score is valid
    valid: Bool[Array, " B"]
    baseline: float | Float[Array, ""] = 0.0  # running mean of the returns so far, for "reinforce"
    bootstrap: Float[Array, " B"] | None = None  # value after the last token (`ops.advantages.gae`)


def share_prefix(
    algorithm: Algorithm, policy: Policy, frozen: Frozen, rollout: Rollout, pretrain: Texts | None = None
) -> Collected:
    """The rollout with what all roles share of it, which is constant over the epochs.

    Where ppo.prefix_dtype rounds it, the log-probs of reference and update are those of the rounded one, while the
    sampler's are not: KL and ratios of equal policies are 0 and 1 to that rounding.
    """
    depth = min(policy_depth(policy, algorithm.model), shared_layers(frozen.reference, algorithm.model))
    prefix = shared_prefix(frozen.base, algorithm.model, rollout.tokens, rollout.mask, depth)
    if prefix is not None and algorithm.ppo.prefix_dtype == "bfloat16":
        prefix = dataclasses.replace(prefix, hidden=prefix.hidden.astype(jnp.bfloat16))
    return Collected(rollout, prefix, pretrain)


def score_rollout(reward: DeviceReward, frozen: Frozen, collected: Collected) -> Scores:
    """The device reward's scores."""
    prefix = collected.prefix
    shared = (None, 0) if prefix is None else (prefix.hidden, prefix.layers)
    return reward(frozen, collected.rollout, *shared)


def cut_responses(rollout: Rollout, stop_ids: tuple[int, ...], config: ModelConfig) -> Rollout:
    """Responses without what follows the first of `stop_ids` (ScoreConfig.truncate_ids); such rows have ended."""
    if not stop_ids:
        return rollout
    if not all(0 <= i < config.vocab_size for i in stop_ids):
        raise ValueError(f"score.truncate_ids={stop_ids} must lie in the vocabulary [0, {config.vocab_size})")
    responses = rollout.tokens[:, -rollout.response_mask.shape[1] :]
    mask, ended = truncation_mask(responses, rollout.response_mask, stop_ids)
    return rollout._replace(response_mask=mask, terminated=rollout.terminated | ended)


def policy_logprobs(algorithm: Algorithm, rollout: Rollout) -> Float[Array, "B T"]:
    """log pi_old(a_t | s_t) of the distribution that counts as the policy (PPOConfig.behaviour)."""
    return rollout.logprobs if algorithm.ppo.behaviour == "filtered" else rollout.policy_logprobs


def kl_coefficient(algorithm: Algorithm, state: TrainState, hyper: Hyper) -> Float[Array, ""]:
    """beta of this iteration."""
    match algorithm.ppo.kl.control:
        case "adaptive":
            return state.kl_coef
        case "linear":
            return linear_kl(hyper.kl_coef, hyper.kl_coef_end, state.step, hyper.kl_steps)
        case _:
            return jnp.asarray(hyper.kl_coef, jnp.float32)


def next_kl_coefficient(algorithm: Algorithm, hyper: Hyper, metrics: Metrics) -> Float[Array, ""]:
    """beta after an iteration: steered by its KL where control is adaptive (Ziegler et al. 2019, section 2.2)."""
    beta = jnp.asarray(hyper.kl_coef, jnp.float32)
    if algorithm.ppo.kl.control != "adaptive":
        return beta
    steered = adaptive_kl(beta, *observed_kl(metrics), hyper.kl_target, hyper.kl_horizon)
    return jnp.where(jnp.isfinite(steered), steered, beta)  # one bad batch must not spoil it for good


def reference_logprobs(
    config: ModelConfig, frozen: Frozen, collected: Collected, hyper: Hyper, chunk: int = 256
) -> Float[Array, "B T"]:
    """log pi_ref(a_t | s_t) of the response tokens under the reference's adapter, at the sampling temperature."""
    rollout = collected.rollout
    length = rollout.response_mask.shape[1]
    hidden = role_hidden(frozen.base, frozen.reference, config, rollout.tokens, rollout.mask, collected.prefix)
    actions, finish = rollout.tokens[:, -length:], partial(finish_logits, config)
    table = unembedding(frozen.base, frozen.reference)
    return hidden_logprobs(before_response(hidden, length), table, actions, hyper.temperature, chunk, finish=finish)


def evaluate_reference(
    algorithm: Algorithm, policy: Policy, frozen: Frozen, collected: Collected, hyper: Hyper
) -> Reference:
    """The reference's log-probs, and its whole distributions where the estimator asks for them."""
    config, ppo, rollout = algorithm.model, algorithm.ppo, collected.rollout
    chunk = ppo.logprob_chunk or 256
    if ppo.kl.estimator != "full":
        return Reference(reference_logprobs(config, frozen, collected, hyper, chunk))
    length = rollout.response_mask.shape[1]
    actions, temperature, finish = rollout.tokens[:, -length:], hyper.temperature, partial(finish_logits, config)

    def states(adapter: object) -> Float[Array, "B T D"]:
        hidden = role_hidden(frozen.base, adapter, config, rollout.tokens, rollout.mask, collected.prefix)
        return before_response(hidden, length)

    hidden, table = states(frozen.reference), unembedding(frozen.base, frozen.reference)
    logprobs = hidden_logprobs(hidden, table, actions, temperature, chunk, finish=finish)
    if ppo.kl.place == "loss":
        return Reference(logprobs, hidden=hidden)
    own = unembedding(frozen.base, policy.adapter)
    kl = hidden_kl(states(policy.adapter), own, hidden, table, temperature, chunk, finish=finish)
    return Reference(logprobs, kl_full=kl)


def evaluate_critic(
    algorithm: Algorithm, policy: Policy, frozen: Frozen, collected: Collected
) -> tuple[Float[Array, "B T"], Float[Array, " B"] | None]:
    """Values that the sampler did not give: of a critic with its own adapter, and after the last token of cut rows.

    Returns (values [B,T], bootstrap [B] or None): the second is 0 for rows that ended themselves.
    """
    rollout, bootstrap = collected.rollout, algorithm.ppo.critic.bootstrap_truncated
    if not algorithm.ppo.has_critic or (policy.critic is None and not bootstrap):
        return rollout.values, None
    adapter = policy.adapter if policy.critic is None else policy.critic
    hidden = role_hidden(frozen.base, adapter, algorithm.model, rollout.tokens, rollout.mask, collected.prefix)
    length = rollout.response_mask.shape[1]
    values = rollout.values if policy.critic is None else value(policy.value_head, before_response(hidden, length))
    if not bootstrap:
        return values, None
    after = value(policy.value_head, last_token(hidden, rollout.mask))
    return values, jnp.where(rollout.terminated, 0.0, after)


def prepare_scores(
    algorithm: Algorithm, scores: Scores, rollout: Rollout, moments: RunningMoments, hyper: Hyper
) -> tuple[Scores, RunningMoments]:
    """Scores as they enter the rewards, and the moments that have seen this batch.

    Normalised by the running moments (this batch included), then `ops.rewards.adjust_scores`.
    """
    how = algorithm.ppo.score
    moments = moments.update(scores.reward, scores.valid)
    reward = scores.reward.astype(jnp.float32)
    if how.normalise in ("scale", "shift"):
        reward = moments.normalise(reward, shift_mean=how.normalise == "shift")
    reward = adjust_scores(
        reward,
        jnp.sum(rollout.response_mask, axis=1),
        rollout.terminated,
        hyper.score_clip,
        hyper.length_penalty,
        hyper.missing_eos,
        how.missing_eos,
    )
    return scores._replace(reward=reward), moments


def make_experience(
    algorithm: Algorithm,
    collected: Collected,
    scores: Scores,
    reference: Reference,
    hyper: Hyper,
    baseline: float | Float[Array, ""] = 0.0,
    bootstrap: Float[Array, " B"] | None = None,
) -> Experience:
    """r_t = score at the last token + token reward - kl_coef * KL_t; advantages; rows with an invalid score masked out.

    Args:
      hyper: kl_coef is that of this iteration (`kl_coefficient`).
      baseline, bootstrap: see `Outcome`.
    """
    ppo, rollout = algorithm.ppo, collected.rollout
    mask = rollout.response_mask & scores.valid[:, None]
    logprobs = policy_logprobs(algorithm, rollout)
    kl = reference.kl_full
    if kl is None:
        # With the KL in the loss, "full" needs no estimate here; the log shows k1.
        kl = kl_penalty(logprobs, reference.logprobs, "k1" if ppo.kl.estimator == "full" else ppo.kl.estimator)
    penalty = jnp.asarray(hyper.kl_coef) if ppo.kl.place == "reward" else jnp.zeros(())
    rewards = shape_rewards(scores.reward, kl, mask, penalty)
    if scores.tokens is not None:
        rewards = jnp.where(mask, rewards + scores.tokens, rewards)
    how = ppo.score.whiten_rewards
    shaped = rewards if how == "off" else masked_whiten(rewards, mask, shift_mean=how == "shift")
    outcome = Outcome(shaped, rollout.values, mask, scores.valid, baseline, bootstrap)
    advantages, returns = (algorithm.advantage or estimate_advantages)(algorithm, outcome, hyper)
    batch = Minibatch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        prefix=collected.prefix,
        loss_mask=mask,
        logprobs=logprobs,
        values=rollout.values,
        advantages=advantages,
        returns=returns,
        pretrain=collected.pretrain,
    )
    if ppo.behaviour == "importance" and ppo.sampling.filtered:
        ratio = jnp.exp(rollout.policy_logprobs - rollout.logprobs)
        batch = batch._replace(weights=jnp.where(mask, jnp.minimum(ratio, hyper.importance_cap), 0.0))
    if ppo.kl.place == "loss":
        batch = batch._replace(ref_logprobs=reference.logprobs, ref_hidden=reference.hidden)
    return Experience(batch=batch, rewards=rewards, kl=kl, scores=scores, totals=response_totals(shaped, mask))


def estimate_advantages(
    algorithm: Algorithm, outcome: Outcome, hyper: Hyper
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(advantages, returns). Those without a critic compare whole responses, the KL penalty in the reward included."""
    ppo, (rewards, values, mask, valid, baseline, bootstrap) = algorithm.ppo, outcome
    whiten = ppo.whiten_advantages
    if ppo.advantage == "gae":
        advantages, returns = gae(rewards, values, mask, hyper.gamma, hyper.lam, bootstrap)
        return (masked_whiten(advantages, mask) if whiten else advantages), returns
    returns = rewards_to_go(rewards, mask, hyper.gamma)
    if ppo.advantage == "reinforce++":
        return (masked_whiten(returns, mask) if whiten else returns), returns
    totals = response_totals(rewards, mask)
    match ppo.advantage:
        case "rloo":
            relative = rloo(totals, ppo.group_size, valid)
        case "grpo" | "dr_grpo":
            relative = grpo(totals, ppo.group_size, ppo.advantage == "grpo", valid)
        case _:
            relative = reinforce(totals, baseline)
    advantages = jnp.where(mask, relative[:, None], 0.0)
    if ppo.advantage == "reinforce" and whiten:
        advantages = advantages * jax.lax.rsqrt(masked_var(advantages, mask) + EPSILON)  # the baseline is the shift
    return advantages, returns


def response_totals(rewards: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Sum of the rewards of each response."""
    return jnp.sum(jnp.where(mask, rewards, 0.0), axis=1)
