"""Keys and values that decoding keeps: stacked over the layers, or layer by layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppo_jax.models.config import ModelConfig
from ppo_jax.parallel.sharding import constrain, constrain_rows


class Cache(NamedTuple):
    """Keys and values of every layer for C slots, of which the first `length` are written.

    For unstacked layers they are tuples of L arrays [B, K, C, H].
    """

    keys: Float[Array, "L B K C H"]
    values: Float[Array, "L B K C H"]
    positions: Int[Array, "B C"]  # -1: padding or not written yet, never attended to
    length: Int[Array, ""]


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` rows of `slots` tokens each (prompt and response together).

    Under `jax.set_mesh` it is born sharded: rows over ("data", "fsdp"), key/value heads over "tensor".
    """
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return Cache(
        keys=constrain(jnp.zeros(shape, config.dtype), "cache"),
        values=constrain(jnp.zeros(shape, config.dtype), "cache"),
        positions=constrain_rows(jnp.full((batch, slots), -1, jnp.int32)),
        length=jnp.zeros((), jnp.int32),
    )


def unstacked(cache: Cache, slots: int) -> Cache:
    """The same cache for unstacked layers, with room for `slots` tokens."""
    more = slots - cache.positions.shape[1]

    def apart(stack: Array) -> Any:
        return tuple(jnp.pad(layer, ((0, 0), (0, 0), (0, more), (0, 0))) for layer in stack)

    positions = jnp.pad(cache.positions, ((0, 0), (0, more)), constant_values=-1)
    return Cache(apart(cache.keys), apart(cache.values), positions, cache.length)


def store(stored: Any, pair: tuple[Array, Array], length: Array, index: int | Array) -> tuple[Any, Any]:
    """Keys and values written at slots [length, ...): (what is stored, this layer's part of it)."""
    new = [x.swapaxes(1, 2).astype(s.dtype) for x, s in zip(pair, stored, strict=True)]
    if isinstance(index, int):  # this layer's arrays are on their own
        stored = tuple(jax.lax.dynamic_update_slice(s, x, (0, 0, length, 0)) for s, x in zip(stored, new, strict=True))
        return stored, stored
    at = (index, 0, 0, length, 0)
    stored = tuple(jax.lax.dynamic_update_slice(s, x[None], at) for s, x in zip(stored, new, strict=True))
    return stored, tuple(jax.lax.dynamic_index_in_dim(s, index, keepdims=False) for s in stored)
