"""From one score per response to one reward per token, and the running scale of scores."""

from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from ppo_jax.ops.masked import deviations, masked_mean, prepare

Scalar = float | Real[Array, ""]


def last_token(mask: Shaped[Array, "*B T"]) -> Bool[Array, "*B T"]:
    """True at the last position of the mask in each row; nowhere in a row whose mask is empty."""
    mask = mask.astype(bool)
    later = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]  # valid positions from here on, this one included
    return mask & (later == 1)


def shape_rewards(
    scores: Real[Array, " B"],
    kl: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    kl_coef: float | Real[Array, ""],
) -> Float[Array, "B T"]:
    """r_t = -kl_coef * kl_t, plus the score at the last response token; 0 outside the mask.

    "Last" is the last position of the mask, whatever tokens lie there: an EOS, or a sampled pad id, is a token like
    any other. A row with an empty mask (a failed reward, an empty response) is all zeros, even if its score is NaN.

    References:
      Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", eq. 2.
    """
    chex.assert_equal_shape([kl, mask])
    chex.assert_shape(scores, kl.shape[:1])
    penalty, mask = prepare(kl, mask)
    return -kl_coef * penalty + jnp.where(last_token(mask), scores[:, None].astype(penalty.dtype), 0)


def adjust_scores(
    scores: Real[Array, " B"],
    lengths: Real[Array, " B"],
    terminated: Bool[Array, " B"],
    clip: Scalar,
    length_penalty: Scalar,
    missing_eos: Scalar,
    missing_eos_rule: Literal["off", "subtract", "replace"] = "off",
) -> Float[Array, " B"]:
    """Scores clipped to [-clip, clip], then penalised for what a reward model does not see.

        s' = clip(s) - length_penalty * length
        s' = s' - missing_eos      where the response was cut by length ("subtract")
        s' = -missing_eos          in its place ("replace")

    Args:
      lengths: response tokens.
      terminated: the response ended by a stop token.
      clip: infinity turns it off.

    Raises:
      ValueError: unknown rule.

    References:
      Ziegler et al. 2019, section 3.1.1 (a fixed low reward for texts without an end: "replace");
      Huang et al. 2024, "The N Implementation Details of RLHF with PPO", detail 3.
    """
    chex.assert_equal_shape([scores, lengths, terminated])
    adjusted = jnp.clip(scores.astype(jnp.float32), -clip, clip) - length_penalty * lengths
    match missing_eos_rule:
        case "off":
            return adjusted
        case "subtract":
            return jnp.where(terminated, adjusted, adjusted - missing_eos)
        case "replace":
            return jnp.where(terminated, adjusted, -jnp.asarray(missing_eos, jnp.float32))
        case _:
            raise ValueError(f"unknown missing_eos rule {missing_eos_rule!r}; choose off, subtract or replace")


def truncation_mask(
    tokens: Int[Array, "B T"], mask: Shaped[Array, "B T"], stop_ids: tuple[int, ...]
) -> tuple[Bool[Array, "B T"], Bool[Array, " B"]]:
    """The mask up to and including the first of `stop_ids` in each row, and whether there was one.

    For responses that went on after a token at which the text to be scored ends.

    References:
      Ziegler et al. 2019, section 3.1.1; Huang et al. 2024, "The N Implementation Details", detail 3.
    """
    chex.assert_equal_shape([tokens, mask])
    ends = jnp.isin(tokens, jnp.array(stop_ids, jnp.int32)) & mask.astype(bool)
    before = jnp.cumsum(ends, axis=-1) - ends  # stop tokens strictly before this position
    return mask.astype(bool) & (before == 0), ends.any(axis=-1)


class RunningMoments(NamedTuple):
    """Count, mean and sum of squared deviations of every valid score seen so far.

    Equal, up to rounding, to the moments of all batches concatenated. Save it with the checkpoint.

    References:
      Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """

    count: Float[Array, ""]  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    mean: Float[Array, ""]
    m2: Float[Array, ""]  # sum of (x - mean)^2

    @classmethod
    def init(cls) -> "RunningMoments":
        """Nothing seen yet."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    def update(self, x: Real[Array, "*B"], valid: Shaped[Array, "*B"] | None = None) -> "RunningMoments":
        """Moments after also seeing the valid entries of x (all when `valid` is None).

        n = n_a + n_b,  d = mean_b - mean_a
        mean = mean_a + d n_b / n
        m2   = m2_a + m2_b + d^2 n_a n_b / n
        """
        valid = jnp.ones(jnp.shape(x), bool) if valid is None else valid
        batch_count = jnp.sum(valid.astype(bool), dtype=jnp.float32)
        deviation, _ = deviations(x, valid)
        difference = masked_mean(x, valid) - self.mean
        count = self.count + batch_count
        share = batch_count / jnp.maximum(count, 1)
        # An empty batch changes nothing, also when its mean (0 by convention) is far from ours.
        return RunningMoments(
            count=count,
            mean=self.mean + difference * share,
            m2=self.m2 + jnp.sum(jnp.square(deviation)) + jnp.square(difference) * self.count * share,
        )

    @property
    def std(self) -> Float[Array, ""]:
        """Unbiased standard deviation sqrt(m2 / (n - 1)); 1 while it is unknown (n < 2) or zero."""
        variance = self.m2 / jnp.maximum(self.count - 1, 1)
        return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1)

    def normalise(self, x: Real[Array, "*B"], shift_mean: bool = True) -> Float[Array, "*B"]:
        """(x - mean) / std. With fewer than two samples seen, x unchanged: a lone score must not become 0.

        Args:
          shift_mean: False only divides by the standard deviation (the sign of a score keeps its meaning).
        """
        shift = jnp.where(self.count >= 2, self.mean, 0) if shift_mean else 0.0
        return (x - shift) / self.std
