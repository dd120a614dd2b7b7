"""From a rollout and its scores to what the loss reads: reference, KL, rewards, advantages. Once per rollout."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.models.adapters import unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import last_token, value
from ppo_jax.models.roles import before_response, policy_depth, role_hidden, shared_prefix
from ppo_jax.ops.advantages import gae, grpo, reinforce, rewards_to_go, rloo
from ppo_jax.ops.kl import kl_penalty
from ppo_jax.ops.logprobs import hidden_kl, hidden_logprobs
from ppo_jax.ops.masked import EPSILON, masked_var, masked_whiten
from ppo_jax.ops.rewards import RunningMoments, adjust_scores, shape_rewards, truncation_mask
from ppo_jax.train.options import PPOConfig
from ppo_jax.types import Experience, Frozen, Hyper, Minibatch, Policy, Rollout, Scores


class Reference(NamedTuple):
    """What the reference says of a rollout."""

    logprobs: Float[Array, "B T"]
    kl_full: Float[Array, "B T"] | None = None  # KL(policy || reference) over the whole vocabulary
    hidden: Float[Array, "B T D"] | None = None  # where the loss needs the reference's whole distribution


def rollout_prefix(
    policy: Policy, frozen: Frozen, rollout: Rollout, config: ModelConfig
) -> tuple[Float[Array, "B S D"] | None, int]:
    """What all roles share of a rollout, constant over the epochs, and how many layers deep it is."""
    depth = policy_depth(policy, config)
    return shared_prefix(frozen.base, config, rollout.tokens, rollout.mask, depth), depth


def truncated(rollout: Rollout, stop_ids: tuple[int, ...], config: ModelConfig) -> Rollout:
    """Responses without what follows the first of `stop_ids` (ScoreConfig.truncate_ids); such rows have ended."""
    if not stop_ids:
        return rollout
    if not all(0 <= i < config.vocab_size for i in stop_ids):
        raise ValueError(f"score.truncate_ids={stop_ids} must lie in the vocabulary [0, {config.vocab_size})")
    responses = rollout.tokens[:, -rollout.response_mask.shape[1] :]
    mask, ended = truncation_mask(responses, rollout.response_mask, stop_ids)
    return rollout._replace(response_mask=mask, terminated=rollout.terminated | ended)


def reference_logprobs(
    frozen: Frozen,
    rollout: Rollout,
    prefix: Float[Array, "B S D"] | None,
    depth: int,
    hyper: Hyper,
    config: ModelConfig,
    chunk: int = 256,
) -> Float[Array, "B T"]:
    """log pi_ref(a_t | s_t) of the response tokens under the empty adapter, at the sampling temperature."""
    length = rollout.response_mask.shape[1]
    hidden = role_hidden(frozen.base, {}, config, rollout.tokens, rollout.mask, prefix, depth)
    actions, table = rollout.tokens[:, -length:], unembedding(frozen.base, {})
    return hidden_logprobs(before_response(hidden, length), table, actions, hyper.temperature, chunk)


def consult_reference(
    policy: Policy,
    frozen: Frozen,
    rollout: Rollout,
    prefix: Float[Array, "B S D"] | None,
    depth: int,
    hyper: Hyper,
    config: ModelConfig,
    ppo: PPOConfig,
) -> Reference:
    """The reference's log-probs, and its whole distributions where the estimator asks for them."""
    chunk = ppo.logprob_chunk or 256
    if ppo.kl.estimator != "full":
        return Reference(reference_logprobs(frozen, rollout, prefix, depth, hyper, config, chunk))
    length = rollout.response_mask.shape[1]
    actions, temperature = rollout.tokens[:, -length:], hyper.temperature

    def states(adapter: object) -> Float[Array, "B T D"]:
        hidden = role_hidden(frozen.base, adapter, config, rollout.tokens, rollout.mask, prefix, depth)
        return before_response(hidden, length)

    hidden, table = states({}), unembedding(frozen.base, {})
    logprobs = hidden_logprobs(hidden, table, actions, temperature, chunk)
    if ppo.kl.place == "loss":
        return Reference(logprobs, hidden=hidden)
    own = unembedding(frozen.base, policy.adapter)
    kl = hidden_kl(states(policy.adapter), own, hidden, table, temperature, chunk)
    return Reference(logprobs, kl_full=kl)


def critic_values(
    policy: Policy,
    frozen: Frozen,
    rollout: Rollout,
    prefix: Float[Array, "B S D"] | None,
    depth: int,
    config: ModelConfig,
    bootstrap: bool,
) -> tuple[Float[Array, "B T"], Float[Array, " B"] | None]:
    """Values that the sampler did not give: of a critic with its own adapter, and after the last token of cut rows.

    Returns (values [B,T], bootstrap [B] or None): the second is 0 for rows that ended themselves.
    """
    if policy.critic is None and not bootstrap:
        return rollout.values, None
    adapter = policy.adapter if policy.critic is None else policy.critic
    hidden = role_hidden(frozen.base, adapter, config, rollout.tokens, rollout.mask, prefix, depth)
    length = rollout.response_mask.shape[1]
    values = rollout.values if policy.critic is None else value(policy.value_head, before_response(hidden, length))
    if not bootstrap:
        return values, None
    after = value(policy.value_head, last_token(hidden, rollout.mask))
    return values, jnp.where(rollout.terminated, 0.0, after)


def adjusted(
    scores: Scores, rollout: Rollout, moments: RunningMoments, hyper: Hyper, ppo: PPOConfig
) -> tuple[Scores, RunningMoments]:
    """Scores as they enter the rewards, and the moments that have seen this batch.

    Normalised by the running moments (this batch included), then `ops.rewards.adjust_scores`.
    """
    moments = moments.update(scores.reward, scores.valid)
    reward = scores.reward.astype(jnp.float32)
    if ppo.score.normalise != "off":
        reward = moments.normalise(reward, shift_mean=ppo.score.normalise == "shift")
    reward = adjust_scores(
        reward,
        jnp.sum(rollout.response_mask, axis=1),
        rollout.terminated,
        hyper.score_clip,
        hyper.length_penalty,
        hyper.missing_eos,
        ppo.score.missing_eos,
    )
    return scores._replace(reward=reward), moments


def make_experience(
    rollout: Rollout,
    scores: Scores,
    ref_logprobs: Float[Array, "B T"],
    prefix: Float[Array, "B S D"] | None,
    kl_coef: Float[Array, ""],
    hyper: Hyper,
    ppo: PPOConfig,
    *,
    reference: Reference | None = None,
    baseline: float | Float[Array, ""] = 0.0,
    bootstrap: Float[Array, " B"] | None = None,
) -> Experience:
    """r_t = score at the last token + token reward - kl_coef * KL_t; advantages; rows with an invalid score masked out.

    Args:
      reference: more of the reference than its log-probs, where the KL estimator needs it.
      baseline: of advantage "reinforce".
      bootstrap: value after the last token of each row (`ops.advantages.gae`).
    """
    mask = rollout.response_mask & scores.valid[:, None]
    filtered = ppo.behaviour == "filtered"
    logprobs = rollout.logprobs if filtered else rollout.policy_logprobs
    if reference is not None and reference.kl_full is not None:
        kl = reference.kl_full
    else:
        # With the KL in the loss, "full" needs no estimate here; the log shows k1.
        kl = kl_penalty(logprobs, ref_logprobs, "k1" if ppo.kl.estimator == "full" else ppo.kl.estimator)
    penalty = kl_coef if ppo.kl.place == "reward" else jnp.zeros(())
    rewards = shape_rewards(scores.reward, kl, mask, penalty)
    if scores.tokens is not None:
        rewards = jnp.where(mask, rewards + scores.tokens, rewards)
    how = ppo.score.whiten_rewards
    shaped = rewards if how == "off" else masked_whiten(rewards, mask, shift_mean=how == "shift")
    advantages, returns = _advantages(shaped, rollout.values, mask, scores, baseline, bootstrap, hyper, ppo)
    batch = Minibatch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        prefix=prefix,
        loss_mask=mask,
        logprobs=logprobs,
        values=rollout.values,
        advantages=advantages,
        returns=returns,
    )
    if ppo.behaviour == "importance" and ppo.sampling.filtered:
        ratio = jnp.exp(rollout.policy_logprobs - rollout.logprobs)
        batch = batch._replace(weights=jnp.where(mask, jnp.minimum(ratio, hyper.importance_cap), 0.0))
    if ppo.kl.place == "loss":
        batch = batch._replace(ref_logprobs=ref_logprobs, ref_hidden=reference.hidden if reference else None)
    return Experience(batch=batch, rewards=rewards, kl=kl, scores=scores)


def _advantages(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    scores: Scores,
    baseline: float | Float[Array, ""],
    bootstrap: Float[Array, " B"] | None,
    hyper: Hyper,
    ppo: PPOConfig,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(advantages, returns). Those without a critic compare whole responses, the KL penalty in the reward included."""
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
            relative = rloo(totals, ppo.group_size, scores.valid)
        case "grpo" | "dr_grpo":
            relative = grpo(totals, ppo.group_size, ppo.advantage == "grpo", scores.valid)
        case _:
            relative = reinforce(totals, baseline)
    advantages = jnp.where(mask, relative[:, None], 0.0)
    if ppo.advantage == "reinforce" and whiten:
        advantages = advantages * jax.lax.rsqrt(masked_var(advantages, mask) + EPSILON)  # the baseline is the shift
    return advantages, returns


def response_totals(rewards: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Sum of the rewards of each response."""
    return jnp.sum(jnp.where(mask, rewards, 0.0), axis=1)
