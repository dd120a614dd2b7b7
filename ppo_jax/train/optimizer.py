"""What every stage does with gradients: sum them over micro-batches, clip them, step."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ppo_jax.types import Metrics, PyTree

Params = TypeVar("Params")
Batch = TypeVar("Batch")


def make_optimizer(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam's direction m / (sqrt(v) + eps), bias-corrected (Kingma & Ba 2015, algorithm 1).

    Learning rate and gradient clip are traced and applied in `descend`.
    """
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def accumulate(
    gradient: Callable[[Params, Batch], tuple[Params, Metrics]], params: Params, batch: Batch, pieces: int
) -> tuple[Params, Metrics]:
    """Sum of `gradient` and of its metrics over `pieces` equal micro-batches of rows.

    The losses are sums divided by the count of the *whole* batch, so this is the whole batch's gradient. Summed in
    float32, since bfloat16 would lose small pieces; returned in the parameters' dtypes.
    """

    def add(total: Params, piece: Batch) -> tuple[Params, Metrics]:
        grads, metrics = gradient(params, piece)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), metrics

    split = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, metrics = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), jax.tree.map(jnp.sum, metrics)


def descend(
    params: Params,
    grads: Params,
    opt_state: optax.OptState,
    optimizer: optax.GradientTransformation,
    learning_rate: float | Float[Array, ""],
    max_grad_norm: float | Float[Array, ""],
) -> tuple[Params, optax.OptState, Metrics]:
    """params - learning_rate * direction(g min(1, max_grad_norm / |g|)), |g| being the global norm.

    The metric `grad_norm` is |g| before the clip.
    """
    norm = optax.tree.norm(grads)
    clipped: PyTree = optax.clip_by_global_norm(max_grad_norm).update(grads, optax.EmptyState())[0]
    direction, opt_state = optimizer.update(clipped, opt_state, params)
    stepped = jax.tree.map(lambda p, d: (p - learning_rate * d).astype(p.dtype), params, direction)
    return stepped, opt_state, {"grad_norm": (norm, jnp.ones(()))}
