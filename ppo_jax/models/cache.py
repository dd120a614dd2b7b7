"""Keys and values that decoding keeps: stacked over the layers, or layer by layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppo_jax.models.config import ModelConfig
from ppo_jax.parallel.sharding import constrain, constrain_rows


class Cache(NamedTuple):
    """Keys and values of every layer for C slots, of which the first `length` are written.

    For unstacked layers they are tuples of L arrays [B, K, C, H]. Where each row has a `length` of its own, a pass has
    one token for each.
    """

    keys: Float[Array, "L B K C H"]
    values: Float[Array, "L B K C H"]
    positions: Int[Array, "B C"]  # -1: padding or not written yet, never attended to
    length: Int[Array, ""] | Int[Array, " B"]


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


def store_positions(cache: Cache, positions: Int[Array, "B S"]) -> Int[Array, "B C"]:
    """The cache's positions with those of a pass written at slots [length, ...)."""
    if cache.length.ndim:
        return cache.positions.at[jnp.arange(len(positions)), cache.length].set(positions[:, 0])
    return jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))


def store(stored: Any, pair: tuple[Array, Array], length: Array, index: int | Array) -> tuple[Any, Any]:
    """Keys and values written at slots [length, ...): (what is stored, this layer's part of it)."""
    own = isinstance(index, int)  # this layer's arrays are on their own

    def put(s: Array, x: Float[Array, "B K S H"]) -> Array:
        if length.ndim:
            rows = jnp.arange(len(x))
            return (s.at[rows, :, length] if own else s.at[index, rows, :, length]).set(x[:, :, 0])
        if own:
            return jax.lax.dynamic_update_slice(s, x, (0, 0, length, 0))
        return jax.lax.dynamic_update_slice(s, x[None], (index, 0, 0, length, 0))

    stored = tuple(put(s, x.swapaxes(1, 2).astype(s.dtype)) for x, s in zip(pair, stored, strict=True))
    if own:
        return stored, stored
    return stored, tuple(jax.lax.dynamic_index_in_dim(s, index, keepdims=False) for s in stored)


def replace_rows(cache: Cache, rows: Int[Array, " b"], new: Cache) -> Cache:
    """A cache whose rows have lengths of their own, with these rows taken from `new`, which has as many slots."""

    def put(old: Array, fresh: Array) -> Array:
        return old.at[rows].set(fresh) if old.ndim == 4 else old.at[:, rows].set(fresh)  # a layer, or the stack

    keys, values = jax.tree.map(put, (cache.keys, cache.values), (new.keys, new.values))
    return Cache(keys, values, cache.positions.at[rows].set(new.positions), cache.length.at[rows].set(new.length))
