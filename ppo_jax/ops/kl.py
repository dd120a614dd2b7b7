"""Divergence of the policy from the reference, per token, and the controller of its coefficient."""

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from ppo_jax.ops.logprobs import LOWEST

Scalar = float | Real[Array, ""]
Kind = Literal["k1", "k2", "k3", "abs"]


def kl_penalty(logprobs: Float[Array, "*B"], ref_logprobs: Float[Array, "*B"], kind: Kind = "k1") -> Float[Array, "*B"]:
    """Single-sample estimate of KL(policy || reference) at a token drawn from the policy, in nats.

    With d = log policy(a) - log reference(a):

        k1   d                    unbiased, high variance, may be negative
        k2   d^2 / 2              biased, low variance
        k3   exp(-d) - 1 + d      unbiased, low variance, never negative
        abs  |d|                  no estimate of the KL; a penalty on any departure

    Elementwise, so garbage outside a mask stays where it is.

    As a penalty on the reward of the token, only k1 has the gradient of the KL in expectation.
    As a term of the loss, differentiated through `logprobs` at tokens drawn from the policy, only k2 has the gradient
    of the KL of the same token in expectation, d * grad log policy(a). The gradient of k1 is 0 in expectation, that of
    k3 is biased. None of them sees that a token decides which states come after it, as k1 in the reward does: the
    optimum is another one, token by token policy(a|s) ~ reference(a|s) exp(A(s, a) / beta). `response_k2` sees it.

    Raises:
      ValueError: unknown kind.

    References:
      Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html); Tang and Munos 2025, "On a few
      pitfalls in KL divergence gradient estimation for RL" (the gradients).
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    difference = logprobs - ref_logprobs
    match kind:
        case "k1":
            return difference
        case "k2":
            return 0.5 * jnp.square(difference)
        case "k3":
            return jnp.expm1(-difference) + difference
        case "abs":
            return jnp.abs(difference)
        case _:
            raise ValueError(f"unknown kind of KL penalty {kind!r}; choose one of {', '.join(get_args(Kind))}")


def response_k2(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """(sum_t d_t)^2 / 2 of each response, spread evenly over its tokens; 0 outside the mask. d as in `kl_penalty`.

    As a term of the loss its gradient is sum_t d_t * grad log policy(response): in expectation that of the KL of whole
    responses, which is also what k1 has as a penalty on the reward.

    References:
      Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL", section 3.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    total = jnp.sum(jnp.where(mask, logprobs - ref_logprobs, 0.0), axis=1, keepdims=True)
    length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jnp.where(mask, 0.5 * jnp.square(total) / length, 0.0)


def kl_full(logits: Float[Array, "*B V"], ref_logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(policy || reference) = sum_v p_v (log p_v - log q_v) over the last axis, in nats, exactly (no sampling).

    Tokens that the policy excludes (logit -inf) contribute 0. Divide logits by the temperature beforehand.
    """
    chex.assert_equal_shape([logits, ref_logits])
    logp = jax.nn.log_softmax(jnp.maximum(logits.astype(jnp.float32), LOWEST), axis=-1)
    logq = jax.nn.log_softmax(jnp.maximum(ref_logits.astype(jnp.float32), LOWEST), axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def adaptive_kl(coef: Scalar, observed_kl: Scalar, n: Scalar, target: Scalar, horizon: Scalar) -> Float[Array, ""]:
    """Next KL coefficient of the log-space proportional controller.

        e     = clip(observed_kl / target - 1, -0.2, 0.2)
        coef' = coef * max(1 + e * n / horizon, 0.1)

    The lower bound acts only where n exceeds 4.5 horizons: there the paper's factor would be 0 or negative, and a
    coefficient that has been 0 stays so.

    Args:
      observed_kl, target: nats per response (the sum over its tokens), averaged over responses.
      n: episodes since the last update.
      horizon: episodes over which a full error changes the coefficient by a fifth.

    References:
      Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """
    error = jnp.clip(observed_kl / jnp.asarray(target, jnp.float32) - 1, -0.2, 0.2)
    return coef * jnp.maximum(1 + error * n / horizon, 0.1)


def linear_kl(start: Scalar, end: Scalar, step: Scalar, steps: Scalar) -> Float[Array, ""]:
    """KL coefficient that moves linearly: start + (end - start) * min(step / steps, 1).

    Args:
      step: iterations done; the coefficient is `start` at 0 and `end` from `steps` on.
    """
    share = jnp.clip(jnp.asarray(step, jnp.float32) / jnp.maximum(steps, 1), 0, 1)
    return start + (jnp.asarray(end, jnp.float32) - start) * share
