"""Advantages: GAE with a critic, leave-one-out and group-relative baselines without one."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real, Shaped

from ppo_jax.ops.masked import deviations, prepare

Scalar = float | Real[Array, ""]


def gae(
    rewards: Real[Array, "*B T"],
    values: Float[Array, "*B T"],
    mask: Shaped[Array, "*B T"],
    gamma: Scalar,
    lam: Scalar,
    bootstrap: Float[Array, "*B"] | None = None,
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
    """Generalised advantage estimation over the valid positions of each row.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        return  = A_t + V_t

    t + 1 is the *next valid* position: masked positions are skipped wherever they lie (padding, or tokens in the
    middle that the policy did not write). After the last valid position A is 0, and V is 0 (a response is an episode,
    whether it ended itself or was cut by length) or `bootstrap`. Both results are 0 outside the mask.

    Args:
      rewards, values: V_t is the value of the state before token t.
      bootstrap: V of the state after the last valid token: 0 where the response ended itself, the critic's value
        where it was cut (Pardo et al. 2018, "Time Limits in Reinforcement Learning"). None: 0 everywhere.

    References:
      Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.
    """
    chex.assert_equal_shape([rewards, values, mask])
    rewards, mask = prepare(rewards, mask)
    values, _ = prepare(values, mask)

    def step(
        carry: tuple[Float[Array, "*B"], Float[Array, "*B"]],
        inputs: tuple[Float[Array, "*B"], Float[Array, "*B"], Bool[Array, "*B"]],
    ) -> tuple[tuple[Float[Array, "*B"], Float[Array, "*B"]], Float[Array, "*B"]]:
        next_value, next_advantage = carry
        reward, value, valid = inputs
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        carry = (jnp.where(valid, value, next_value), jnp.where(valid, advantage, next_advantage))
        return carry, jnp.where(valid, advantage, 0)

    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, values, mask))
    zero = jnp.zeros(rewards.shape[:-1], jnp.result_type(rewards, values))
    after = zero if bootstrap is None else jnp.asarray(bootstrap, zero.dtype)
    _, advantages = jax.lax.scan(step, (after, zero), time_first, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, jnp.where(mask, advantages + values, 0)


def rewards_to_go(rewards: Real[Array, "*B T"], mask: Shaped[Array, "*B T"], gamma: Scalar) -> Float[Array, "*B T"]:
    """sum_{s >= t} gamma^(s - t) r_s over the valid positions: GAE with lam 1 and without a critic.

    Whitened over the batch this is the advantage of REINFORCE++ (Hu 2025, "REINFORCE++", eq. 6-7).
    """
    return gae(rewards, jnp.zeros_like(rewards, jnp.float32), mask, gamma, 1.0)[0]


def reinforce(scores: Real[Array, " B"], baseline: Scalar) -> Float[Array, " B"]:
    """Score minus one baseline for all: A_i = R_i - b.

    The estimate stays unbiased as long as b does not depend on these scores: use the mean of *earlier* ones.

    References:
      Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning".
    """
    return scores - jnp.asarray(baseline, jnp.float32)


def _groups(
    scores: Real[Array, " B"], group_size: int, valid: Shaped[Array, " B"] | None
) -> tuple[Float[Array, "G k"], Bool[Array, "G k"]]:
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: a group baseline needs at least 2 responses per prompt")
    if scores.shape[0] % group_size:
        raise ValueError(f"{scores.shape[0]} scores do not divide into groups of group_size={group_size}")
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    return prepare(scores.reshape(-1, group_size), valid.reshape(-1, group_size))


def rloo(scores: Real[Array, " B"], group_size: int, valid: Shaped[Array, " B"] | None = None) -> Float[Array, " B"]:
    """Score minus the mean score of the *other* responses to the same prompt.

        A_i = R_i - 1/(k-1) sum_{j != i} R_j = k/(k-1) (R_i - mean(R))

    Args:
      scores: consecutive runs of `group_size` rows answer the same prompt.
      valid: rows that are False count in no baseline and get 0; k is then the valid rows of the group. A row that
        is alone has no baseline and gets 0.

    Raises:
      ValueError: group_size < 2, or it does not divide the batch.

    References:
      Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, "Back to Basics".
    """
    groups, mask = _groups(scores, group_size, valid)
    count = jnp.sum(mask, axis=1, keepdims=True, dtype=groups.dtype)
    deviation, _ = deviations(groups, mask, axis=1)
    return (deviation * count / jnp.maximum(count - 1, 1)).reshape(-1)


def grpo(
    scores: Real[Array, " B"], group_size: int, scale: bool = True, valid: Shaped[Array, " B"] | None = None
) -> Float[Array, " B"]:
    """Score relative to its group: (R_i - mean(R)) / (std(R) + 1e-8), or without the division.

    The standard deviation is the population's (/ k), so two different scores become exactly -1 and +1. Equal
    scores give 0.

    Args:
      scores: consecutive runs of `group_size` rows answer the same prompt.
      scale: False leaves the division out ("Dr. GRPO": it favours prompts on which all responses are alike).
      valid: as in `rloo`.

    Raises:
      ValueError: group_size < 2, or it does not divide the batch.

    References:
      Shao et al. 2024, "DeepSeekMath", section 4.1.2; Liu et al. 2025, "Understanding R1-Zero-Like Training".
    """
    groups, mask = _groups(scores, group_size, valid)
    deviation, _ = deviations(groups, mask, axis=1)
    if scale:
        count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        deviation = deviation / (jnp.sqrt(jnp.sum(jnp.square(deviation), axis=1, keepdims=True) / count) + 1e-8)
    return deviation.reshape(-1)
