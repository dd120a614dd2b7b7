"""Metrics as (total, count) pairs: made, merged, and divided at the end."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ppo_jax.types import Metrics


def means(metrics: Metrics) -> dict[str, float]:
    """{name: total / count} on the host; NaN where nothing was counted."""
    host = jax.device_get(metrics)
    return {name: float(total / count) if count else math.nan for name, (total, count) in host.items()}


def merge_metrics(stacked: Metrics) -> Metrics:
    """One metric tree from many, stacked on axis 0: totals and counts are summed; of *_min and *_max the extreme."""

    def merge(name: str, total: Array, count: Array) -> tuple[Array, Array]:
        if name.endswith(("_min", "_max")):
            return (jnp.min if name.endswith("_min") else jnp.max)(total, axis=0), jnp.max(count, axis=0)
        return jnp.sum(total, axis=0), jnp.sum(count, axis=0)

    return {name: merge(name, *pair) for name, pair in stacked.items()}


def no_metrics(like: Any) -> Metrics:
    """Metrics of the same names and shapes as `like` (which may be abstract) that say nothing."""
    nothing = {"_min": jnp.inf, "_max": -jnp.inf}
    return {
        name: (jnp.full(total.shape, nothing.get(name[-4:], 0.0), jnp.float32), jnp.zeros(count.shape, jnp.float32))
        for name, (total, count) in like.items()
    }
