"""From numbers to `Scores`: the one place that decides what is finite and what is valid."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ppo_jax.types import Scores


def number(value: Any) -> tuple[float, str | None]:
    """(value, None) of a finite real number, else (NaN, what is wrong with it). A fraction stays a fraction."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a NumPy, JAX or torch scalar
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan, f"{type(value).__name__} in place of a number"
    if value != value:
        return math.nan, "NaN"
    if not abs(value) <= float(np.finfo(np.float32).max):
        return math.nan, "infinity" if isinstance(value, float) and math.isinf(value) else "too large for float32"
    return float(value), None


def to_scores(rows: Sequence[float] | np.ndarray, parts: Mapping[str, np.ndarray] | None = None) -> Scores:
    """Scores of a host reward (numpy arrays), valid where finite in float32; a failed row is NaN."""
    with np.errstate(over="ignore"):
        reward: Any = np.asarray(rows).astype(np.float32)
    valid: Any = np.isfinite(reward)
    named: Any = {name: np.asarray(part, np.float32) for name, part in (parts or {}).items()}
    return Scores(np.where(valid, reward, np.float32(np.nan)), valid, named)  # type: ignore[arg-type]


def only_finite(scores: Scores) -> Scores:
    """A score that is not finite is invalid, whatever the reward said of it."""
    finite = jnp.isfinite(scores.reward)
    if scores.tokens is not None:
        finite &= jnp.isfinite(scores.tokens).all(axis=1)
    return scores._replace(valid=scores.valid.astype(bool) & finite)


def as_scores(scores: Scores, rows: int, length: int | None = None) -> Scores:
    """A host reward's answer in the dtypes that the device expects; ValueError when it is not one number per row.

    Rewards of single tokens, where there are some, are [rows, length].

    A score that is not finite is invalid, whatever the reward said of it.
    """
    columns = {"reward": scores.reward, "valid": scores.valid, **scores.parts}
    for name, column in columns.items():
        if np.shape(column) != (rows,):
            raise ValueError(f"the reward returned {name} of shape {np.shape(column)} for {rows} responses")
    tokens = None
    if scores.tokens is not None:
        if np.ndim(scores.tokens) != 2 or np.shape(scores.tokens) != (rows, length or np.shape(scores.tokens)[1]):
            raise ValueError(
                f"the reward returned tokens of shape {np.shape(scores.tokens)} for {rows} responses of {length} slots"
            )
        tokens = jnp.asarray(scores.tokens, jnp.float32)
    reward = np.asarray(scores.reward, np.float32)
    parts = {name: jnp.asarray(part, jnp.float32) for name, part in scores.parts.items()}
    valid = np.asarray(scores.valid, bool) & np.isfinite(reward)
    return Scores(jnp.asarray(reward), jnp.asarray(valid), parts, tokens)
