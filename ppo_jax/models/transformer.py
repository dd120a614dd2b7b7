"""The Llama-family trunk as one pure function: tokens in, hidden states out.

Layers are stacked and scanned. The base's layers are read by index (never sliced or copied); the adapter's
are the scanned inputs, so gradients reach the adapter alone. A loop of many small passes may have them unstacked
(`unstack`): then they run one after the other, and nothing is sliced in the loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import first_layer, unembedding
from ppo_jax.models.attention import attend, attend_cached, rotary, rotate
from ppo_jax.models.config import ModelConfig
from ppo_jax.ops.logprobs import LOWEST, unembed
from ppo_jax.parallel.sharding import constrain, constrain_rows
from ppo_jax.types import PyTree

# One layer: residual stream, weights, LoRA updates, its keys and values (all layers', with its number) -> stream, those
Block = Callable[[Array, PyTree, PyTree, Any, Array | None], tuple[Array, Any]]


class Cache(NamedTuple):
    """Keys and values of every layer for C slots, of which the first `length` are written.

    For unstacked layers they are tuples of L arrays [B, K, C, H]. Where each row has a `length` of its own, a pass has
    one token for each.
    """

    keys: Float[Array, "L B K C H"]
    values: Float[Array, "L B K C H"]
    positions: Int[Array, "B C"]  # -1: padding or not written yet, never attended to
    length: Int[Array, ""] | Int[Array, " B"]


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
        cache = cache._replace(positions=_store_positions(cache, positions))

    block = _layer_block(config, positions, cos_sin, cache, fresh)
    stored = None if cache is None else (cache.keys, cache.values)
    run = _run_one_by_one if isinstance(params["layers"], tuple) else _scan
    x, stored = run(block, params["layers"], adapter, config, x, stored, (start, stop))
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
_CHEAP = {
    "add", "add_any", "and", "broadcast_in_dim", "concatenate", "convert_element_type", "div", "dynamic_slice",
    "exp", "ge", "integer_pow", "iota", "le", "logistic", "lt", "max", "mul", "neg", "or", "reduce_max",
    "reduce_sum", "reshape", "rsqrt", "select_n", "sharding_constraint", "slice", "split", "square", "squeeze",
    "stop_gradient", "sub", "transpose",
}  # fmt: skip


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


def _scan(
    block: Block, base: PyTree, adapter: PyTree, config: ModelConfig, x: Array, stored: Any, layers: tuple[int, int]
) -> tuple[Array, Any]:
    """Layers [start, stop): those that the adapter leaves alone, then the others."""
    start, stop = layers
    stacked = {name: adapter[name] for name in ("lora", "layers") if name in adapter}
    first = first_layer(stacked, config)
    split = min(max(first, start), stop)
    trained = jax.tree.map(lambda leaf: leaf[split - first : stop - first], stacked)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        index, trained = inputs
        layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), base)
        layer |= trained.get("layers", {})
        x, stored = carry
        return block(x, layer, trained.get("lora", {}), stored, index), None

    step = jax.checkpoint(step, policy=SAVED[config.remat], prevent_cse=False)  # in a scan nothing is shared anyway
    for low, high, scanned in ((start, split, {}), (split, stop, trained)):
        if low < high:
            (x, stored), _ = jax.lax.scan(step, (x, stored), (jnp.arange(low, high), scanned))
    return x, stored


def _run_one_by_one(
    block: Block, base: PyTree, adapter: PyTree, config: ModelConfig, x: Array, stored: Any, layers: tuple[int, int]
) -> tuple[Array, Any]:
    """Layers [start, stop) of a model that `unstack` has taken apart."""
    keys, values = map(list, stored)
    for i in range(*layers):
        x, (keys[i], values[i]) = block(x, base[i], adapter["lora"][i], (keys[i], values[i]), None)
    return x, (tuple(keys), tuple(values))


def unstack(params: PyTree, adapter: PyTree, config: ModelConfig) -> tuple[PyTree, PyTree]:
    """(params, adapter) of the same role with every layer's arrays apart, for `apply` with a cache that is `unstacked`.

    It copies every layer, matrices in the activations' dtype.
    """

    def take(stack: PyTree, i: int) -> PyTree:
        """What the arrays of the topmost layers say of layer i."""
        skipped = config.num_layers - max((leaf.shape[0] for leaf in jax.tree.leaves(stack)), default=0)
        return {} if i < skipped else jax.tree.map(lambda leaf: leaf[i - skipped], stack)

    def cast(array: Array) -> Array:
        return array.astype(config.dtype) if array.ndim > 1 else array

    layers, lora = [], []
    for i in range(config.num_layers):
        layers.append(jax.tree.map(cast, take(params["layers"], i) | take(adapter.get("layers", {}), i)))
        lora.append(take(adapter.get("lora", {}), i))
    rest = {name: array for name, array in adapter.items() if name != "layers"}
    return params | {"layers": tuple(layers)}, rest | {"lora": tuple(lora)}


def unstacked(cache: Cache, slots: int) -> Cache:
    """The same cache for unstacked layers, with room for `slots` tokens."""
    more = slots - cache.positions.shape[1]

    def apart(stack: Array) -> Any:
        return tuple(jnp.pad(layer, ((0, 0), (0, 0), (0, more), (0, 0))) for layer in stack)

    positions = jnp.pad(cache.positions, ((0, 0), (0, more)), constant_values=-1)
    return Cache(apart(cache.keys), apart(cache.values), positions, cache.length)


def _layer_block(
    config: ModelConfig, positions: Array, cos_sin: tuple[Array, Array], cache: Cache | None, fresh: bool
) -> Block:
    """What a layer does, whether its arrays are on their own or in stacks."""

    def block(x: Array, layer: PyTree, lora: PyTree, stored: Any, index: Array | None) -> tuple[Array, Any]:
        linear = _linear(layer, lora)
        h = rms_norm(x, layer["attention_norm"], config.norm_eps)
        q, k, v = (linear(name, h).reshape(*h.shape[:2], -1, config.head_dim) for name in ("q", "k", "v"))
        q, k, v = constrain(q, "heads"), constrain(k, "kv_heads"), constrain(v, "kv_heads")
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        if cache is not None:
            stored, kept = _store(stored, (k, v), cache.length, index)
        if cache is None or fresh:
            attended = attend(q, k, v, positions, positions, config.attention, aligned=True)
        else:
            keys, values = kept
            attended = attend_cached(q, keys, values, positions, cache.positions)
        x = constrain(x + linear("o", constrain(attended, "heads").reshape(*h.shape[:2], -1)), "residual")
        h = rms_norm(x, layer["mlp_norm"], config.norm_eps)
        h = constrain(jax.nn.silu(linear("gate", h)) * linear("up", h), "mlp")
        return constrain(x + linear("down", h), "residual"), stored

    return block


def _store_positions(cache: Cache, positions: Int[Array, "B S"]) -> Int[Array, "B C"]:
    if cache.length.ndim:
        return cache.positions.at[jnp.arange(len(positions)), cache.length].set(positions[:, 0])
    return jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.length))


def _store(stored: Any, pair: tuple[Array, Array], length: Array, index: Array | None) -> tuple[Any, Any]:
    """Keys and values written at slots [length, ...): (what is stored, this layer's part of it)."""

    def put(s: Array, x: Float[Array, "B K S H"]) -> Array:
        if length.ndim:
            rows = jnp.arange(len(x))
            return (s.at[rows, :, length] if index is None else s.at[index, rows, :, length]).set(x[:, :, 0])
        if index is None:
            return jax.lax.dynamic_update_slice(s, x, (0, 0, length, 0))
        return jax.lax.dynamic_update_slice(s, x[None], (index, 0, 0, length, 0))

    stored = tuple(put(s, x.swapaxes(1, 2).astype(s.dtype)) for x, s in zip(pair, stored, strict=True))
    if index is None:
        return stored, stored
    return stored, tuple(jax.lax.dynamic_index_in_dim(s, index, keepdims=False) for s in stored)


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
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return Cache(
        keys=constrain(jnp.zeros(shape, config.dtype), "cache"),
        values=constrain(jnp.zeros(shape, config.dtype), "cache"),
        positions=constrain_rows(jnp.full((batch, slots), -1, jnp.int32)),
        length=jnp.zeros((), jnp.int32),
    )


def replace_rows(cache: Cache, rows: Int[Array, " b"], new: Cache) -> Cache:
    """A cache whose rows have lengths of their own, with these rows taken from `new`, which has as many slots."""

    def put(old: Array, fresh: Array) -> Array:
        return old.at[rows].set(fresh) if old.ndim == 4 else old.at[:, rows].set(fresh)  # a layer, or the stack

    keys, values = jax.tree.map(put, (cache.keys, cache.values), (new.keys, new.values))
    return Cache(keys, values, cache.positions.at[rows].set(new.positions), cache.length.at[rows].set(new.length))
