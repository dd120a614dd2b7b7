"""The loss of PPO on a minibatch: clipped policy loss, value loss, entropy bonus, KL term, pretraining term."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.models.adapters import unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import value
from ppo_jax.models.roles import before_response, policy_depth, role_hidden
from ppo_jax.models.transformer import apply, positions_from_mask
from ppo_jax.ops.kl import kl_penalty
from ppo_jax.ops.logprobs import LOWEST, hidden_kl, hidden_logprobs, hidden_logprobs_and_entropy
from ppo_jax.ops.losses import clipped_policy_loss, clipped_value_loss, token_weights
from ppo_jax.ops.sampling import filter_logits
from ppo_jax.train.options import PPOConfig
from ppo_jax.types import Frozen, Hyper, Metrics, Minibatch, Policy, Texts


def ppo_loss(
    policy: Policy,
    frozen: Frozen,
    batch: Minibatch,
    count: Float[Array, ""],
    hyper: Hyper,
    config: ModelConfig,
    ppo: PPOConfig,
    kl_coef: Float[Array, ""] | float = 0.0,
    text_count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """L = L_clip + vf_coef L_value - entropy_coef H + kl_coef KL (when placed in the loss) + ptx_coef L_pretraining.

    Each is a weighted sum over this batch's tokens (`ops.losses.token_weights`) divided by `count`, the units of the
    whole minibatch; so the losses and gradients of micro-batches sum to those of the minibatch.

    Args:
      text_count: predicted tokens of the whole minibatch's pretraining texts; None: those of `batch`.
    """
    length = batch.loss_mask.shape[1]
    depth = policy_depth(policy, config)
    trunk = role_hidden(frozen.base, policy.adapter, config, batch.tokens, batch.mask, batch.prefix, depth)
    hidden = before_response(trunk, length)
    actions, table = batch.tokens[:, -length:], unembedding(frozen.base, policy.adapter)
    sampling, keep = ppo.sampling, None
    if ppo.behaviour == "filtered" and sampling.filtered:

        def keep(logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
            return filter_logits(logits, sampling.top_k, sampling.top_p, sampling.min_p)

    logprobs, entropy = hidden_logprobs_and_entropy(hidden, table, actions, hyper.temperature, ppo.logprob_chunk, keep)
    mask = batch.loss_mask
    weights, units = token_weights(mask, ppo.aggregation)
    units_here, tokens = jnp.sum(units), jnp.sum(mask, dtype=jnp.float32)
    extra: Metrics = {}
    if keep is not None:
        # The filter of the new policy may exclude an old token: its ratio is 0, without a gradient.
        inside = logprobs > LOWEST / 2
        extra["outside_filter"] = (jnp.sum(mask & ~inside, dtype=jnp.float32), tokens)
        mask = mask & inside
    policy_loss, policy_metrics = clipped_policy_loss(
        logprobs,
        batch.logprobs,
        batch.advantages,
        mask,
        hyper.clip_low,
        hyper.clip_high,
        dual_clip=hyper.dual_clip,
        weights=weights if batch.weights is None else weights * batch.weights,
        count=count,
    )
    entropy = jnp.where(mask, entropy, 0.0)
    loss = policy_loss - hyper.entropy_coef * jnp.sum(weights * entropy) / jnp.maximum(count, 1)
    # `total / count` must be the mean over the units whatever the micro-batches, so undo the division by count.
    metrics = policy_metrics | extra | _extremes(logprobs - batch.logprobs, mask)
    metrics |= {"policy_loss": (policy_loss * count, units_here), "entropy": (jnp.sum(entropy), tokens)}

    if ppo.has_critic:
        value_loss, value_metrics = _value_loss(policy, frozen, batch, hidden, weights, count, hyper, config)
        loss += hyper.vf_coef * value_loss
        metrics |= value_metrics | {"value_loss": (value_loss * count, units_here)}
    if ppo.kl.place == "loss":
        terms = _kl_terms(hidden, table, mask, logprobs, batch, frozen, hyper, ppo)
        weights = weights if batch.weights is None else weights * batch.weights
        kl_loss = jnp.sum(jnp.where(mask, weights * terms, 0.0)) / jnp.maximum(count, 1)
        loss += kl_coef * kl_loss
        metrics["kl_loss"] = (kl_loss * count, units_here)
    if batch.pretrain is not None:
        total, number = pretraining_loss(policy, frozen, batch.pretrain, config, ppo.logprob_chunk)
        loss += hyper.ptx_coef * total / jnp.maximum(number if text_count is None else text_count, 1)
        metrics["ptx_loss"] = (total, number)
    metrics["loss"] = (loss * count, units_here)
    return loss, jax.lax.stop_gradient(metrics)


def _value_loss(
    policy: Policy,
    frozen: Frozen,
    batch: Minibatch,
    hidden: Float[Array, "B T D"],
    weights: Float[Array, "B T"],
    count: Float[Array, ""],
    hyper: Hyper,
    config: ModelConfig,
) -> tuple[Float[Array, ""], Metrics]:
    """Of the values read from the policy's hidden states, or from those of the critic's own adapter."""
    if policy.critic is not None:
        depth = policy_depth(policy, config)
        trunk = role_hidden(frozen.base, policy.critic, config, batch.tokens, batch.mask, batch.prefix, depth)
        hidden = before_response(trunk, batch.loss_mask.shape[1])
    return clipped_value_loss(
        value(policy.value_head, hidden),
        batch.values,
        batch.returns,
        batch.loss_mask,
        hyper.value_clip,
        huber_delta=hyper.huber_delta,
        weights=weights,
        count=count,
    )


def _extremes(log_ratio: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Metrics:
    """Smallest and largest ratio."""
    some = mask.any().astype(jnp.float32)
    low, high = (jnp.where(mask, log_ratio, fill) for fill in (jnp.inf, -jnp.inf))
    return {"ratio_min": (jnp.exp(jnp.min(low)), some), "ratio_max": (jnp.exp(jnp.max(high)), some)}


def _kl_terms(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    mask: Bool[Array, "B T"],
    logprobs: Float[Array, "B T"],
    batch: Minibatch,
    frozen: Frozen,
    hyper: Hyper,
    ppo: PPOConfig,
) -> Float[Array, "B T"]:
    """What is differentiated when the KL is a term of the loss (`ops.kl.kl_penalty` says which gradients are right)."""
    if ppo.kl.estimator == "full":
        assert batch.ref_hidden is not None
        ref_table = unembedding(frozen.base, {})
        return hidden_kl(hidden, table, batch.ref_hidden, ref_table, hyper.temperature, ppo.logprob_chunk)
    assert batch.ref_logprobs is not None
    # Outside the mask a log-prob may be -1e30 (a filter), whose exponential has no gradient to be masked afterwards.
    return kl_penalty(jnp.where(mask, logprobs, batch.ref_logprobs), batch.ref_logprobs, ppo.kl.estimator)


def predicted(texts: Texts) -> Bool[Array, "B M"]:
    """Where a text's next token is predicted: M = N - 1 positions."""
    return texts.mask[:, 1:] & texts.mask[:, :-1]


def pretraining_loss(
    policy: Policy, frozen: Frozen, texts: Texts, config: ModelConfig, chunk: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, number) of -log pi(x_{t+1} | x_{<=t}) over the texts of PPO-ptx, at temperature 1.

    References:
      Ouyang et al. 2022, "InstructGPT", eq. 2.
    """
    hidden = apply(frozen.base, policy.adapter, config, texts.tokens, positions_from_mask(texts.mask))
    table, mask = unembedding(frozen.base, policy.adapter), predicted(texts)
    logprobs = hidden_logprobs(hidden[:, :-1], table, texts.tokens[:, 1:], 1.0, chunk)
    return -jnp.sum(jnp.where(mask, logprobs, 0.0)), jnp.sum(mask, dtype=jnp.float32)
