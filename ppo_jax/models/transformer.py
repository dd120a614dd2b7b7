"""The Llama-family trunk as one pure function: tokens in, hidden states out.

Layers are stacked and scanned. The base's layers are read by index (never sliced or copied); the adapter's
are the scanned inputs, so gradients reach the adapter alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import first_layer, unembedding
from ppo_jax.models.attention import attend, rotary, rotate
from ppo_jax.models.config import ModelConfig
from ppo_jax.ops.logprobs import LOWEST, unembed
from ppo_jax.parallel.sharding import constrain, constrain_rows
from ppo_jax.types import PyTree

# A scan body over layers: (residual stream, stored keys and values), (layer number, adapter's arrays) -> carry, nothing
Step = Callable[[tuple, tuple], tuple[tuple, None]]


class Cache(NamedTuple):
    """Keys and values of every layer for C slots, of which the first `length` are written."""

    keys: Float[Array, "L B C K H"]
    values: Float[Array, "L B C K H"]
    positions: Int[Array, "B C"]  # -1: padding or not written yet, never attended to
    length: Int[Array, ""]


def positions_from_mask(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Positions 0, 1, 2, ... of each row's real tokens and -1 at its padding, wherever that lies."""
    mask = mask.astype(bool)
    return jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)


@overload
def apply(
    params: PyTree, adapter: PyTree, config: ModelConfig, tokens: Array | None, positions: Array, *,
    cache: None = None, layers: tuple[int, int] | None = None, hidden: Array | None = None,
) -> Array: ...  # fmt: skip
@overload
def apply(
    params: PyTree, adapter: PyTree, config: ModelConfig, tokens: Array | None, positions: Array, *,
    cache: Cache, fresh: bool = False, layers: tuple[int, int] | None = None, hidden: Array | None = None,
) -> tuple[Array, Cache]: ...  # fmt: skip
def apply(
    params: PyTree,
    adapter: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "B S"] | None,
    positions: Int[Array, "B S"],
    *,
    cache: Cache | None = None,
    fresh: bool = False,
    layers: tuple[int, int] | None = None,
    hidden: Float[Array, "B S D"] | None = None,
) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], Cache]:
    """Hidden states of `tokens` under base and adapter, through the final norm.

    Args:
      params: the frozen base (its arrays: `models.layout`).
      adapter: what makes the base a role (`models.adapters`); {} for the base itself.
      tokens: token ids; None when `hidden` is given.
      positions: each token's position in its own sequence; -1 marks padding, which no token attends to.
        Causality follows positions, so left and right padding give equal results.
      cache: earlier keys and values; the new ones are written at slots [length, length + S). Its length grows
        when the last layer has run, so the ranges of one pass share their slots.
      fresh: the cache is empty, so the tokens attend among themselves only: [S, S] scores instead of [S, C], and none
        at all with an attention kernel.
      layers: (start, stop): run this range only. With start > 0 the input is `hidden`, the output of
        [0, start); with stop < L the output is the raw residual stream, without the final norm.
      hidden: the residual stream that enters layer `start`.

    Returns:
      hidden states, and the updated cache when one was given.
    """
    start, stop = layers or (0, config.num_layers)
    _check_input(start, stop, config, tokens, hidden)
    if hidden is None:
        hidden = constrain(adapter.get("embedding", params["embedding"]), "table")[tokens]
    x = constrain(hidden.astype(config.dtype), "residual")
    cos_sin = rotary(positions, config)
    if cache is not None:
        slots = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))
        cache = cache._replace(positions=slots)

    stacked = {name: adapter[name] for name in ("lora", "layers") if name in adapter}
    first = first_layer(stacked, config)
    split = min(max(first, start), stop)
    trained = jax.tree.map(lambda leaf: leaf[split - first : stop - first], stacked)
    step = _layer_step(params["layers"], config, positions, cos_sin, cache, fresh)
    step = jax.checkpoint(step, policy=SAVED[config.remat], prevent_cse=False)  # in a scan nothing is shared anyway
    stored = None if cache is None else (cache.keys, cache.values)
    for low, high, scanned in ((start, split, {}), (split, stop, trained)):
        if low < high:
            (x, stored), _ = jax.lax.scan(step, (x, stored), (jnp.arange(low, high), scanned))
    last = stop == config.num_layers
    if last:
        x = rms_norm(x, adapter.get("final_norm", params["final_norm"]), config.norm_eps)
    if cache is None or stored is None:
        return x
    written = positions.shape[1] if last else 0
    return x, cache._replace(keys=stored[0], values=stored[1], length=cache.length + written)


def logits(
    params: PyTree, adapter: PyTree, config: ModelConfig, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch V"]:
    """Logits of the next token from final hidden states: hidden @ unembedding.T, accumulated and kept in float32.

    The last step of the model under base and adapter.
    """
    return finish_logits(config, unembed(hidden, constrain(unembedding(params, adapter), "table")))


def finish_logits(config: ModelConfig, raw: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """What the model makes of hidden @ unembedding.T. Sampler, log-probs, entropy and KL all go through it.

    Rows of the vocabulary without a token (`config.tokenless`) get -1e30, a probability of exactly 0. Where a family
    scales its logits or caps them, by fields of `config`, it is done here.
    """
    if not config.tokenless:
        return raw
    rows, off = jnp.arange(raw.shape[-1]), jnp.zeros(raw.shape[-1], bool)
    for start, stop in config.tokenless:
        off |= (rows >= start) & (rows < stop)
    return jnp.where(off, LOWEST, raw)


def _check_input(start: int, stop: int, config: ModelConfig, tokens: Array | None, hidden: Array | None) -> None:
    if not 0 <= start < stop <= config.num_layers:
        raise ValueError(f"layers [{start}, {stop}) is empty or not within [0, {config.num_layers})")
    if (hidden is None) == (tokens is None) or (hidden is None) != (start == 0):
        raise ValueError(f"layers [{start}, {stop}): give tokens when start is 0, else hidden, and not both")


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * weight in float32 (Zhang & Sennrich 2019, equation 4)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


# Steps that cost no more to do again than to read back: elementwise ones, shapes, and a layer read from the stack.
_CHEAP = frozenset(
    "add add_any and broadcast_in_dim concatenate convert_element_type div dynamic_slice exp ge integer_pow iota le "
    "logistic lt max mul neg or reduce_max reduce_sum reshape rsqrt select_n sharding_constraint slice split square "
    "squeeze stop_gradient sub transpose".split()
)


def _costly(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep for the backward pass what products and attention kernels gave; it does the rest again.

    Writing and reading the rest takes longer than computing it (measured on CPUs). A layer's weights as read from the
    stack, kept, would be a second copy of the whole frozen base.
    """
    return primitive.name not in _CHEAP


# ModelConfig.remat -> what of a layer is saved for the backward pass.
SAVED = {
    "none": _costly,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _layer_step(
    base: PyTree, config: ModelConfig, positions: Array, cos_sin: tuple[Array, Array], cache: Cache | None, fresh: bool
) -> Step:
    """The scan body over layers: carry (residual stream, stored keys and values)."""

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        x, stored = carry
        index, trained = inputs
        layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), base)
        layer |= trained.get("layers", {})
        linear = _linear(layer, trained.get("lora", {}))
        h = rms_norm(x, layer["attention_norm"], config.norm_eps)
        q, k, v = (linear(name, h).reshape(*h.shape[:2], -1, config.head_dim) for name in ("q", "k", "v"))
        q, k, v = constrain(q, "heads"), constrain(k, "kv_heads"), constrain(v, "kv_heads")
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        k_positions = positions
        if cache is not None:
            at = (index, 0, cache.length, 0, 0)
            keys, values = stored
            stored = (
                jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), at),
                jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), at),
            )
            if not fresh:
                k, v = (jax.lax.dynamic_index_in_dim(s, index, keepdims=False) for s in stored)
                k_positions = cache.positions
        attended = attend(q, k, v, positions, k_positions, config.attention, aligned=cache is None or fresh)
        x = constrain(x + linear("o", constrain(attended, "heads").reshape(*h.shape[:2], -1)), "residual")
        h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
        h = constrain(jax.nn.silu(linear("gate", h)) * linear("up", h), "mlp")
        x = constrain(x + linear("down", h), "residual")
        return (x, stored), None

    return step


def _linear(layer: PyTree, lora: PyTree) -> Callable[[str, Array], Array]:
    """name, x -> x W (+ scale x a b) (+ bias), in the dtype of x."""

    def linear(name: str, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])  # one contracted dimension in the weight's gradient: no transposed copies
        y = rows @ layer[name].astype(x.dtype)
        if name in lora:
            update = lora[name]
            y += ((rows @ update.a.astype(x.dtype)) @ update.b.astype(x.dtype)) * update.scale
        if f"{name}_bias" in layer:
            y += layer[f"{name}_bias"].astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    return linear


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
