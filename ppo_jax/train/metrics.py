"""What the log says of one rollout. docs/metrics.md defines every name."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppo_jax.ops.kl import Kind, kl_penalty
from ppo_jax.ops.masked import masked_var
from ppo_jax.train.options import Algorithm
from ppo_jax.types import Experience, Hyper, Metrics, Rollout, Scores


def experience_metrics(
    algorithm: Algorithm,
    experience: Experience,
    rollout: Rollout,
    raw: Scores,
    ref_logprobs: Float[Array, "B T"],
    hyper: Hyper,
) -> Metrics:
    """Sums and counts over rows with a valid score.

    Args:
      raw: the scores as the reward gave them (those of `experience` are adjusted).
    """
    batch, valid = experience.batch, experience.scores.valid
    mask = batch.loss_mask
    one = jnp.ones(())
    rows, tokens = jnp.sum(valid, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)
    measured = jnp.minimum(rows, 1)  # a spread of no rows is unknown, not 0
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)

    def per_row(x: Array) -> tuple[Array, Array]:
        return jnp.sum(jnp.where(valid, x, 0.0)), rows

    def per_token(x: Array) -> tuple[Array, Array]:
        return jnp.sum(jnp.where(mask, x, 0.0)), tokens

    def std(x: Array, where: Array) -> tuple[Array, Array]:
        return jnp.sqrt(masked_var(x, where)) * measured, measured

    def extremes(name: str, x: Array) -> Metrics:
        return {
            f"{name}_min": (jnp.min(jnp.where(valid, x, jnp.inf)), measured),
            f"{name}_max": (jnp.max(jnp.where(valid, x, -jnp.inf)), measured),
        }

    metrics = {
        "reward": per_row(raw.reward),
        "reward_std": std(raw.reward, valid),
        "score": per_row(experience.scores.reward),
        "shaped_reward": (per_token(experience.rewards)[0], rows),
        "response_length": (jnp.sum(lengths), rows),
        "eos_rate": per_row(rollout.terminated.astype(jnp.float32)),
        "invalid_scores": (jnp.sum(~valid, dtype=jnp.float32), jnp.asarray(valid.size, jnp.float32)),
        "advantage": per_token(batch.advantages),
        "advantage_std": std(batch.advantages, mask),
        "return": per_token(batch.returns),
        "return_std": std(batch.returns, mask),
        "kl_coef": (jnp.asarray(hyper.kl_coef, jnp.float32), one),
        "learning_rate": (jnp.asarray(hyper.learning_rate, jnp.float32), one),
    }
    metrics |= extremes("reward", raw.reward) | extremes("response_length", lengths)
    metrics |= _kl(batch.logprobs, ref_logprobs, mask, rows, tokens)
    metrics |= {f"reward/{name}": per_row(part) for name, part in raw.parts.items()}
    metrics |= _of_choices(algorithm, experience, rollout, rows, tokens)
    return metrics


def _of_choices(algorithm: Algorithm, experience: Experience, rollout: Rollout, rows: Array, tokens: Array) -> Metrics:
    """What is logged only where the algorithm's choices give it a meaning."""
    ppo, batch, mask, measured = algorithm.ppo, experience.batch, experience.batch.loss_mask, jnp.minimum(rows, 1)

    def per_token(x: Array) -> tuple[Array, Array]:
        return jnp.sum(jnp.where(mask, x, 0.0)), tokens

    metrics: Metrics = {}
    if ppo.kl.estimator == "full" and ppo.kl.place == "reward":
        total, _ = per_token(experience.kl)
        metrics |= {"kl_full": (total, rows), "kl_full_per_token": (total, tokens)}
    if ppo.has_critic:
        total_var = jnp.maximum(masked_var(batch.returns, mask), 1e-8)
        unexplained = masked_var(batch.returns - batch.values, mask) / total_var
        metrics["value"] = per_token(batch.values)
        metrics["explained_variance"] = ((1 - unexplained) * measured, measured)
    if ppo.sampling.filtered:
        # > 0: the filters made sampled tokens more likely than the policy would have.
        metrics["behaviour_mismatch"] = per_token(rollout.logprobs - rollout.policy_logprobs)
    if batch.weights is not None:
        metrics["importance_weight"] = per_token(batch.weights)
    return metrics


def _kl(logprobs: Array, ref_logprobs: Array, mask: Array, rows: Array, tokens: Array) -> Metrics:
    """Every estimator, summed over a response and as the mean of its tokens; `kl` is k1, whose unit is nats."""
    metrics: Metrics = {}
    kinds: dict[str, Kind] = {"kl": "k1", "kl_k2": "k2", "kl_k3": "k3", "kl_abs": "abs"}
    for name, kind in kinds.items():
        total = jnp.sum(jnp.where(mask, kl_penalty(logprobs, ref_logprobs, kind), 0.0))
        metrics |= {name: (total, rows), f"{name}_per_token": (total, tokens)}
    return metrics


def observed_kl(metrics: Metrics) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(nats per response by k1, responses): what the adaptive coefficient steers, whatever estimator penalises."""
    total, rows = metrics["kl"]
    return total / jnp.maximum(rows, 1), rows
