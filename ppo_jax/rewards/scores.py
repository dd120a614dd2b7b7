"""What happens to a failed score: it is decided here, and nowhere else.

A score has failed where the reward says so (`Scores.valid` is False), where it is no finite float32 (NaN, infinity, too
large, no number at all), or where a reward of one of its tokens is not finite. Then

    the row is invalid      `valid` is False and `reward` is NaN: no number stands in for the score
    nothing is learnt       the row has an empty mask, so it counts in no loss, whitening or baseline
                            (train/experience.py; the rewards of its tokens are then zeros that nobody reads), in no
                            running statistics (ops/rewards.py) and in no mean of the log (train/metrics.py); a
                            minibatch without a valid row makes no step at all (train/ppo.py)
    it is counted           as `invalid_scores`, and its cause is named once (rewards/failures.py)
    too many stop the run   (train/loop.py, --loop.max-failed)

`to_scores` is the rule, for arrays of the device and of the host. Every reward of ours ends in it, and what other
people's rewards return goes through it before it is used: `only_finite`, or `as_scores` for what comes from the host.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.types import Scores


def to_scores(reward: Any, parts: Mapping[str, Any] | None = None, tokens: Any = None, valid: Any = None) -> Scores:
    """Scores of rows: valid where `reward` [B] is finite in float32; NaN and invalid elsewhere.

    Arrays of JAX stay on the device, so it may be traced; everything else becomes a numpy array.

    Args:
      parts: named components [B], for the log.
      tokens: rewards of single tokens [B, T]; a row of which one is not finite is invalid.
      valid: [B], False where the reward itself says that it failed; None: it does not say.
    """
    xp: Any = jnp if isinstance(reward, jax.Array) else np
    with np.errstate(over="ignore"):
        reward = xp.asarray(reward).astype(np.float32)
        named = {name: xp.asarray(part, np.float32) for name, part in (parts or {}).items()}
        tokens = None if tokens is None else xp.asarray(tokens, np.float32)
    good = xp.isfinite(reward)
    if valid is not None:
        good = good & xp.asarray(valid, bool)
    if tokens is not None:
        good = good & xp.isfinite(tokens).all(axis=1)
    return Scores(xp.where(good, reward, np.float32(np.nan)), good, named, tokens)


def only_finite(scores: Scores) -> Scores:
    """The same scores, invalid where they are not finite, whatever the reward said of them."""
    return to_scores(scores.reward, scores.parts, scores.tokens, scores.valid)


def as_scores(scores: Scores, rows: int, length: int | None = None) -> Scores:
    """A host reward's answer as the device expects it (`only_finite`); ValueError when it is not one number per row.

    Rewards of single tokens, where there are some, are [rows, length].
    """
    columns = {"reward": scores.reward, "valid": scores.valid, **scores.parts}
    for name, column in columns.items():
        if np.shape(column) != (rows,):
            raise ValueError(f"the reward returned {name} of shape {np.shape(column)} for {rows} responses")
    tokens = scores.tokens
    if tokens is not None and (np.ndim(tokens) != 2 or np.shape(tokens) != (rows, length or np.shape(tokens)[1])):
        raise ValueError(
            f"the reward returned tokens of shape {np.shape(tokens)} for {rows} responses of {length} slots"
        )
    return jax.tree.map(jnp.asarray, only_finite(jax.tree.map(np.asarray, scores)))


def number(value: Any) -> tuple[float, str | None]:
    """(value, None) of a finite real number, else (NaN, what is wrong with it). A fraction stays a fraction."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a NumPy, JAX or torch scalar
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan, _named(value)
    if value != value:
        return math.nan, "NaN"
    if not abs(value) <= float(np.finfo(np.float32).max):
        return math.nan, "infinity" if isinstance(value, float) and math.isinf(value) else "too large for float32"
    return float(value), None


def _named(value: Any) -> str:
    """What stands in place of a number. JSON has no NaN, so services write it as text."""
    try:
        if isinstance(value, str) and not math.isfinite(float(value)):
            return "the text NaN or Infinity in place of a number"
    except ValueError:
        pass
    return f"{type(value).__name__} in place of a number"
