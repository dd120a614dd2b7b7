"""The losses of PPO, of reward models and of DPO. Each returns (scalar, metrics).

A loss is a sum over valid entries divided by `count`, by default the valid entries of this call. Pass the count of
the whole minibatch to every micro-batch, and the losses and gradients of the micro-batches *sum* to those of the
whole. Metrics are (total, count) of this call only, so they add up in the same way.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real, Shaped

from ppo_jax.ops.masked import prepare
from ppo_jax.types import Metrics

Scalar = float | Real[Array, ""]


def _summary(terms: dict[str, Shaped[Array, "..."]], mask: Bool[Array, "..."]) -> Metrics:
    """{name: (sum over the mask, number of mask entries)}, outside differentiation."""
    count = jnp.sum(mask, dtype=jnp.float32)
    return {
        name: (jax.lax.stop_gradient(jnp.sum(jnp.where(mask, term, 0), dtype=jnp.float32)), count)
        for name, term in terms.items()
    }


def _normalised(terms: Float[Array, "..."], mask: Bool[Array, "..."], count: Scalar | None) -> Float[Array, ""]:
    count = jnp.sum(mask, dtype=terms.dtype) if count is None else count
    return jnp.sum(jnp.where(mask, terms, 0)) / jnp.maximum(count, 1)


def clipped_policy_loss(
    logprobs: Float[Array, "*B"],
    old_logprobs: Float[Array, "*B"],
    advantages: Float[Array, "*B"],
    mask: Shaped[Array, "*B"],
    clip_low: Scalar,
    clip_high: Scalar,
    *,
    count: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped surrogate, to be minimised.

        ratio = exp(logprob - old_logprob)
        loss  = mean over the mask of max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))

    Only `logprobs` is differentiated. Inputs outside the mask may be NaN or infinite.

    Args:
      clip_low, clip_high: 0.2 and 0.2 in the paper; a larger clip_high is "clip-higher" (DAPO).
      count: normaliser; default the number of mask tokens.

    Metrics (over the mask): `ratio`; `clip_fraction`, where the clipped term is strictly the larger, so the token
    gives no gradient; `approx_kl`, the k3 estimate ratio - 1 - log ratio of KL(old || new); `approx_kl_k1`, the
    estimate -log ratio of the same.

    References:
      Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    logprobs, mask = prepare(logprobs, mask)
    old_logprobs, advantages = (jax.lax.stop_gradient(prepare(x, mask)[0]) for x in (old_logprobs, advantages))
    log_ratio = logprobs - old_logprobs
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    metrics = {
        "ratio": ratio,
        "clip_fraction": clipped > unclipped,
        "approx_kl": jnp.expm1(log_ratio) - log_ratio,
        "approx_kl_k1": -log_ratio,
    }
    return _normalised(jnp.maximum(unclipped, clipped), mask, count), _summary(metrics, mask)


def clipped_value_loss(
    values: Float[Array, "*B"],
    old_values: Float[Array, "*B"],
    returns: Float[Array, "*B"],
    mask: Shaped[Array, "*B"],
    clip: Scalar,
    *,
    count: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Half the mean over the mask of the larger of two squared errors.

        V_clip = clip(V, V_old - clip, V_old + clip)
        loss   = 0.5 * mean of max((V - R)^2, (V_clip - R)^2)

    Only `values` is differentiated. Inputs outside the mask may be NaN or infinite.

    Args:
      clip: in units of the return.
      count: normaliser; default the number of mask tokens.

    Metrics (over the mask): `value_error`, the squared error (V - R)^2 without clipping; `value_clip_fraction`, where
    the clipped error is strictly the larger.

    References:
      OpenAI baselines `ppo2`; Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9.
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    values, mask = prepare(values, mask)
    old_values, returns = (jax.lax.stop_gradient(prepare(x, mask)[0]) for x in (old_values, returns))
    unclipped = jnp.square(values - returns)
    # Not old + clip(V - old): that rounds where nothing is clipped, and would count as clipped.
    clipped = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
    metrics = {"value_error": unclipped, "value_clip_fraction": clipped > unclipped}
    return 0.5 * _normalised(jnp.maximum(unclipped, clipped), mask, count), _summary(metrics, mask)


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
