"""The key/value cache of incremental decoding, updated in place."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppo_jax.models.config import ModelConfig
from ppo_jax.sharding import constrain, constrain_rows


class Cache(NamedTuple):
    """Keys and values of every layer for C slots, of which the first `length` are written."""

    keys: Float[Array, "L B C K H"]
    values: Float[Array, "L B C K H"]
    positions: Int[Array, "B C"]  # -1: padding or not written yet, never attended to
    length: Int[Array, ""]


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` rows of `slots` tokens each (prompt and response together).

    Under `jax.set_mesh` it is born sharded: rows over ("data", "fsdp"), key/value heads over "tensor".
    """
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return Cache(
        keys=constrain(jnp.zeros(shape, config.dtype), "cache"),
        values=constrain(jnp.zeros(shape, config.dtype), "cache"),
        positions=constrain_rows(jnp.full((batch, slots), -1, jnp.int32)),
        length=jnp.zeros((), jnp.int32),
    )
