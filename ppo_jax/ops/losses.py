"""The losses of PPO, of reward models and of DPO. Each returns (scalar, metrics).

A loss is a sum over valid entries divided by `count`, by default the valid entries of this call. Pass the count of
the whole minibatch to every micro-batch, and the losses and gradients of the micro-batches *sum* to those of the
whole. Metrics are (total, count) of this call only, so they add up in the same way.
"""

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real, Shaped

from ppo_jax.ops.masked import prepare
from ppo_jax.types import Metrics

Scalar = float | Real[Array, ""]
Aggregation = Literal["token-mean", "sequence-mean", "constant"]


def _summary(terms: dict[str, Shaped[Array, "..."]], mask: Bool[Array, "..."]) -> Metrics:
    """{name: (sum over the mask, number of mask entries)}, outside differentiation."""
    count = jnp.sum(mask, dtype=jnp.float32)
    return {
        name: (jax.lax.stop_gradient(jnp.sum(jnp.where(mask, term, 0), dtype=jnp.float32)), count)
        for name, term in terms.items()
    }


def _normalised(
    terms: Float[Array, "..."],
    mask: Bool[Array, "..."],
    count: Scalar | None,
    weights: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    count = jnp.sum(mask, dtype=terms.dtype) if count is None else count
    terms = terms if weights is None else terms * jax.lax.stop_gradient(jnp.where(mask, weights, 0))
    return jnp.sum(jnp.where(mask, terms, 0)) / jnp.maximum(count, 1)


def token_weights(
    mask: Shaped[Array, "B T"], aggregation: Aggregation
) -> tuple[Float[Array, "B T"], Float[Array, " B"]]:
    """How single tokens enter a loss: (weights, units); the loss is sum(weights * terms) / sum(units of all rows).

        token-mean      weight 1,          units |o_i|    every token of the batch counts alike (DAPO)
        sequence-mean   weight 1 / |o_i|,  units 1        every response counts alike (the mean of means)
        constant        weight 1,          units T        a constant length T, so a long response has no smaller
                                                          gradient per token (Dr. GRPO)

    A row without tokens has no units. Weights and units are of each row alone, so micro-batches add up.

    Raises:
      ValueError: unknown aggregation.

    References:
      Yu et al. 2025, "DAPO", section 3.3; Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3.
    """
    mask = mask.astype(bool)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    some = (lengths > 0).astype(jnp.float32)
    ones = mask.astype(jnp.float32)
    match aggregation:
        case "token-mean":
            return ones, lengths
        case "sequence-mean":
            return ones / jnp.maximum(lengths, 1)[:, None], some
        case "constant":
            return ones, some * mask.shape[1]
        case _:
            raise ValueError(f"unknown aggregation {aggregation!r}; choose one of {', '.join(get_args(Aggregation))}")


def clipped_policy_loss(
    logprobs: Float[Array, "*B"],
    old_logprobs: Float[Array, "*B"],
    advantages: Float[Array, "*B"],
    mask: Shaped[Array, "*B"],
    clip_low: Scalar,
    clip_high: Scalar,
    *,
    dual_clip: Scalar = jnp.inf,
    weights: Float[Array, "*B"] | None = None,
    count: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped surrogate, to be minimised.

        ratio = exp(logprob - old_logprob)
        loss  = mean over the mask of max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))

    With a `dual_clip` c, where A < 0 the loss is at most -c A: one very large ratio cannot dominate.

    Only `logprobs` is differentiated. Inputs outside the mask may be NaN or infinite.

    Args:
      clip_low, clip_high: 0.2 and 0.2 in the paper; a larger clip_high is "clip-higher" (DAPO).
      dual_clip: c > 1; infinity turns it off.
      weights: constant factors of the tokens' terms (importance weights, `token_weights`).
      count: normaliser; default the number of mask tokens.

    Metrics (over the mask): `ratio`; `clip_fraction`, where the clipped term is strictly the larger, so the token
    gives no gradient; `dual_clip_fraction`; `approx_kl`, the k3 estimate ratio - 1 - log ratio of KL(old || new);
    `approx_kl_k1`, the estimate -log ratio of the same.

    References:
      Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; Ye et al. 2020, "Mastering Complex
      Control in MOBA Games with Deep Reinforcement Learning", eq. 5 (dual clip).
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    logprobs, mask = prepare(logprobs, mask)
    old_logprobs, advantages = (jax.lax.stop_gradient(prepare(x, mask)[0]) for x in (old_logprobs, advantages))
    log_ratio = logprobs - old_logprobs
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    terms = jnp.maximum(unclipped, clipped)
    bound = jnp.where(advantages < 0, -advantages * dual_clip, jnp.inf)  # no product of 0 and infinity
    metrics = {
        "ratio": ratio,
        "clip_fraction": clipped > unclipped,
        "dual_clip_fraction": terms > bound,
        "approx_kl": jnp.expm1(log_ratio) - log_ratio,
        "approx_kl_k1": -log_ratio,
    }
    return _normalised(jnp.minimum(terms, bound), mask, count, weights), _summary(metrics, mask)


def clipped_value_loss(
    values: Float[Array, "*B"],
    old_values: Float[Array, "*B"],
    returns: Float[Array, "*B"],
    mask: Shaped[Array, "*B"],
    clip: Scalar,
    *,
    huber_delta: Scalar = jnp.inf,
    weights: Float[Array, "*B"] | None = None,
    count: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Half the mean over the mask of the larger of two squared errors.

        V_clip = clip(V, V_old - clip, V_old + clip)
        loss   = 0.5 * mean of max((V - R)^2, (V_clip - R)^2)

    With a finite `huber_delta` d an error e counts as m (|e| - m / 2), m = min(|e|, d), in place of e^2 / 2.

    Only `values` is differentiated. Inputs outside the mask may be NaN or infinite.

    Args:
      clip: in units of the return; infinity turns it off.
      huber_delta: in units of the return; infinity is the squared error.
      weights: constant factors of the tokens' terms (`token_weights`).
      count: normaliser; default the number of mask tokens.

    Metrics (over the mask): `value_error`, the squared error (V - R)^2 without clipping; `value_clip_fraction`, where
    the clipped error is strictly the larger.

    References:
      OpenAI baselines `ppo2`; Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9; Huber 1964, "Robust
      Estimation of a Location Parameter".
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    values, mask = prepare(values, mask)
    old_values, returns = (jax.lax.stop_gradient(prepare(x, mask)[0]) for x in (old_values, returns))

    def penalty(error: Float[Array, "*B"]) -> Float[Array, "*B"]:
        size = jnp.abs(error)
        inside = jnp.minimum(size, huber_delta)
        return inside * (size - 0.5 * inside)

    unclipped = penalty(values - returns)
    # Not old + clip(V - old): that rounds where nothing is clipped, and would count as clipped.
    clipped = penalty(jnp.clip(values, old_values - clip, old_values + clip) - returns)
    metrics = {"value_error": jnp.square(values - returns), "value_clip_fraction": clipped > unclipped}
    return _normalised(jnp.maximum(unclipped, clipped), mask, count, weights), _summary(metrics, mask)


def _preferred(difference: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """1 where the chosen side wins, 1/2 at a tie (an untrained head ties everywhere and knows nothing)."""
    return jnp.where(difference == 0, 0.5, difference > 0)


def bradley_terry_loss(
    chosen: Float[Array, "*B"],
    rejected: Float[Array, "*B"],
    margin: float | Float[Array, "*B"] = 0.0,
    *,
    mask: Shaped[Array, "*B"] | None = None,
    count: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Negative log-likelihood of the preferences: mean of -log sigmoid(chosen - rejected - margin).

    Args:
      chosen, rejected: scores of the two responses of each pair.
      margin: how far apart they should be (0 is Bradley-Terry).
      mask: pairs that count; default all.
      count: normaliser; default the number of pairs that count.

    Metrics: `accuracy` (a tie is a half), `margin`, the mean of chosen - rejected.

    References:
      Bradley and Terry 1952; Ouyang et al. 2022, "InstructGPT", eq. 1; Touvron et al. 2023, "Llama 2", eq. 2 (margin).
    """
    chex.assert_equal_shape([chosen, rejected])
    difference, mask = prepare(chosen - rejected, jnp.ones(jnp.shape(chosen), bool) if mask is None else mask)
    loss = _normalised(-jax.nn.log_sigmoid(difference - margin), mask, count)
    return loss, _summary({"accuracy": _preferred(difference), "margin": difference}, mask)


def dpo_loss(
    chosen_logprobs: Float[Array, "*B"],
    rejected_logprobs: Float[Array, "*B"],
    ref_chosen_logprobs: Float[Array, "*B"],
    ref_rejected_logprobs: Float[Array, "*B"],
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    *,
    mask: Shaped[Array, "*B"] | None = None,
    count: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Direct preference optimisation on summed response log-probs.

        reward(y) = beta (log policy(y) - log reference(y))
        h         = reward(chosen) - reward(rejected)
        loss      = mean of -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)

    Args:
      *_logprobs: nats, summed over the tokens of each response. The reference's are constants.
      label_smoothing: eps, the probability that a label is flipped (conservative DPO).
      mask: pairs that count; default all.
      count: normaliser; default the number of pairs that count.

    Metrics: `accuracy` of h > 0 (a tie is a half), `margin` h, `chosen_reward`, `rejected_reward`.

    References:
      Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; Mitchell 2023 for the smoothing.
    """
    chex.assert_equal_shape([chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs])
    mask = jnp.ones(jnp.shape(chosen_logprobs), bool) if mask is None else mask
    chosen, mask = prepare(beta * (chosen_logprobs - jax.lax.stop_gradient(ref_chosen_logprobs)), mask)
    rejected, _ = prepare(beta * (rejected_logprobs - jax.lax.stop_gradient(ref_rejected_logprobs)), mask)
    difference = chosen - rejected
    right, wrong = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
    loss = _normalised(-(1 - label_smoothing) * right - label_smoothing * wrong, mask, count)
    metrics = {
        "accuracy": _preferred(difference),
        "margin": difference,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    return loss, _summary(metrics, mask)
