"""The loss of PPO on a minibatch: clipped policy loss, value loss, entropy bonus, KL term, pretraining term."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ppo_jax.models.adapters import unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.heads import value
from ppo_jax.models.roles import before_response, role_hidden
from ppo_jax.models.transformer import apply, finish_logits, positions_from_mask
from ppo_jax.ops.kl import kl_penalty, response_k2
from ppo_jax.ops.logprobs import LOWEST, hidden_kl, hidden_logprobs, hidden_logprobs_and_entropy
from ppo_jax.ops.losses import clipped_policy_loss, clipped_value_loss, token_weights
from ppo_jax.ops.sampling import filter_logits
from ppo_jax.train.options import Algorithm
from ppo_jax.types import Frozen, Hyper, Metrics, Minibatch, Policy, Texts


class Counts(NamedTuple):
    """What the sums of a minibatch are divided by, whatever its micro-batches."""

    units: Float[Array, ""]  # of its tokens (`ops.losses.token_weights`)
    predicted: Float[Array, ""] | None = None  # tokens of its pretraining texts; None: those of the rows at hand


class Outputs(NamedTuple):
    """What the policy says of the responses of a minibatch."""

    hidden: Float[Array, "B T D"]  # the states in which the tokens were chosen
    table: Float[Array, "V D"]  # its unembedding
    logprobs: Float[Array, "B T"]  # of the tokens, at the sampling temperature (LOWEST: a filter excludes it)
    entropy: Float[Array, "B T"]
    mask: Bool[Array, "B T"]  # tokens that count, of those that the policy can still sample


def evaluate_policy(policy: Policy, algorithm: Algorithm, frozen: Frozen, batch: Minibatch, hyper: Hyper) -> Outputs:
    """One pass of the policy over a minibatch; differentiable in `policy`."""
    ppo, sampling, length = algorithm.ppo, algorithm.ppo.sampling, batch.loss_mask.shape[1]
    trunk = role_hidden(frozen.base, policy.adapter, algorithm.model, batch.tokens, batch.mask, batch.prefix)
    hidden = before_response(trunk, length)
    actions, table = batch.tokens[:, -length:], unembedding(frozen.base, policy.adapter)
    keep = None
    if ppo.behaviour == "filtered" and sampling.filtered:

        def keep(logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
            return filter_logits(logits, sampling.top_k, sampling.top_p, sampling.min_p)

    finish = partial(finish_logits, algorithm.model)
    logprobs, entropy = hidden_logprobs_and_entropy(
        hidden, table, actions, hyper.temperature, ppo.logprob_chunk, keep, finish=finish
    )
    mask = batch.loss_mask
    if keep is not None:
        # The filter of the new policy may exclude an old token: its ratio is 0, without a gradient.
        mask = mask & (logprobs > LOWEST / 2)
    return Outputs(hidden, table, logprobs, jnp.where(mask, entropy, 0.0), mask)


def count_units(algorithm: Algorithm, minibatch: Minibatch) -> Counts:
    """The counts of a whole minibatch."""
    texts = minibatch.pretrain
    units = jnp.sum(token_weights(minibatch.loss_mask, algorithm.ppo.aggregation)[1])
    return Counts(units, None if texts is None else jnp.sum(predicted(texts), dtype=jnp.float32))


def ppo_loss(
    policy: Policy, algorithm: Algorithm, frozen: Frozen, batch: Minibatch, counts: Counts, hyper: Hyper
) -> tuple[Float[Array, ""], Metrics]:
    """L = L_clip + vf_coef L_value - entropy_coef H + kl_coef KL (when placed in the loss) + ptx_coef L_pretraining.

    Each is a weighted sum over this batch's tokens (`ops.losses.token_weights`) divided by `counts`, those of the
    whole minibatch; so the losses and gradients of micro-batches sum to those of the minibatch.
    """
    ppo, count = algorithm.ppo, counts.units
    outputs = evaluate_policy(policy, algorithm, frozen, batch, hyper)
    weights, units = token_weights(batch.loss_mask, ppo.aggregation)
    weighted = weights if batch.weights is None else weights * batch.weights
    units_here, tokens = jnp.sum(units), jnp.sum(batch.loss_mask, dtype=jnp.float32)

    def mean(loss: Float[Array, ""]) -> tuple[Array, Array]:
        """`total / count` must be the mean over the units whatever the micro-batches, so undo the division by count."""
        return loss * count, units_here

    policy_loss, metrics = clipped_policy_loss(
        outputs.logprobs,
        batch.logprobs,
        batch.advantages,
        outputs.mask,
        hyper.clip_low,
        hyper.clip_high,
        dual_clip=hyper.dual_clip,
        weights=weighted,
        count=count,
    )
    loss = policy_loss - hyper.entropy_coef * jnp.sum(weights * outputs.entropy) / jnp.maximum(count, 1)
    metrics |= _extremes(outputs.logprobs - batch.logprobs, outputs.mask)
    metrics |= {
        "policy_loss": mean(policy_loss),
        "entropy": (jnp.sum(outputs.entropy), jnp.sum(outputs.mask, dtype=jnp.float32)),
    }
    if ppo.behaviour == "filtered" and ppo.sampling.filtered:
        outside = batch.loss_mask & ~outputs.mask
        metrics["outside_filter"] = (jnp.sum(outside, dtype=jnp.float32), tokens)
    if ppo.has_critic:
        value_loss, value_metrics = _value_loss(policy, algorithm, frozen, batch, outputs, count, hyper)
        loss += hyper.vf_coef * value_loss
        metrics |= value_metrics | {"value_loss": mean(value_loss)}
    if ppo.kl.place == "loss":
        terms = _kl_terms(outputs, algorithm, frozen, batch, hyper)
        kl_loss = jnp.sum(jnp.where(outputs.mask, weighted * terms, 0.0)) / jnp.maximum(count, 1)
        loss += hyper.kl_coef * kl_loss
        metrics["kl_loss"] = mean(kl_loss)
    if batch.pretrain is not None:
        total, number = pretraining_loss(policy, frozen, batch.pretrain, algorithm.model, ppo.logprob_chunk)
        loss += hyper.ptx_coef * total / jnp.maximum(number if counts.predicted is None else counts.predicted, 1)
        metrics["ptx_loss"] = (total, number)
    return loss, jax.lax.stop_gradient(metrics | {"loss": mean(loss)})


def _value_loss(
    policy: Policy,
    algorithm: Algorithm,
    frozen: Frozen,
    batch: Minibatch,
    outputs: Outputs,
    count: Float[Array, ""],
    hyper: Hyper,
) -> tuple[Float[Array, ""], Metrics]:
    """Of the values read from the policy's hidden states, or from those of the critic's own adapter."""
    hidden = outputs.hidden
    if policy.critic is not None:
        trunk = role_hidden(frozen.base, policy.critic, algorithm.model, batch.tokens, batch.mask, batch.prefix)
        hidden = before_response(trunk, batch.loss_mask.shape[1])
    return clipped_value_loss(
        value(policy.value_head, hidden),
        batch.values,
        batch.returns,
        batch.loss_mask,
        hyper.value_clip,
        huber_delta=hyper.huber_delta,
        weights=token_weights(batch.loss_mask, algorithm.ppo.aggregation)[0],
        count=count,
    )


def _extremes(log_ratio: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Metrics:
    """Smallest and largest ratio."""
    some = mask.any().astype(jnp.float32)
    low, high = (jnp.where(mask, log_ratio, fill) for fill in (jnp.inf, -jnp.inf))
    return {"ratio_min": (jnp.exp(jnp.min(low)), some), "ratio_max": (jnp.exp(jnp.max(high)), some)}


def _kl_terms(
    outputs: Outputs, algorithm: Algorithm, frozen: Frozen, batch: Minibatch, hyper: Hyper
) -> Float[Array, "B T"]:
    """What is differentiated when the KL is a term of the loss (`ops.kl.kl_penalty` says which gradients are right)."""
    ppo = algorithm.ppo
    if ppo.kl.estimator == "full":
        assert batch.ref_hidden is not None
        ref_table = unembedding(frozen.base, frozen.reference)
        sides = outputs.hidden, outputs.table, batch.ref_hidden, ref_table
        finish = partial(finish_logits, algorithm.model)
        return hidden_kl(*sides, hyper.temperature, ppo.logprob_chunk, finish=finish)
    assert batch.ref_logprobs is not None
    # Outside the mask a log-prob may be -1e30 (a filter), whose exponential has no gradient to be masked afterwards.
    logprobs = jnp.where(outputs.mask, outputs.logprobs, batch.ref_logprobs)
    if ppo.kl.per == "response":
        return response_k2(logprobs, batch.ref_logprobs, outputs.mask)
    return kl_penalty(logprobs, batch.ref_logprobs, ppo.kl.estimator)


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
    finish = partial(finish_logits, config)
    logprobs = hidden_logprobs(hidden[:, :-1], table, texts.tokens[:, 1:], 1.0, chunk, finish=finish)
    return -jnp.sum(jnp.where(mask, logprobs, 0.0)), jnp.sum(mask, dtype=jnp.float32)
