"""The trunk of every family as one pure function: tokens in, hidden states out.

Layers are stacked and scanned. The base's layers are read by index (never sliced or copied); the adapter's
are the scanned inputs, so gradients reach the adapter alone. A loop of many small passes may have them unstacked
(`unstack`): then they run one after the other, and nothing is sliced in the loop.
"""

from typing import Any, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ppo_jax.models.adapters import first_layer, unembedding, with_gains
from ppo_jax.models.block import Block, layer_block, normalise
from ppo_jax.models.cache import Cache, store_positions
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.quantised import Quantised
from ppo_jax.models.rotary import rotations
from ppo_jax.ops.logprobs import LOWEST, unembed
from ppo_jax.parallel.sharding import constrain
from ppo_jax.types import PyTree


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
    if positions.dtype == bool:
        raise TypeError(
            "positions are integers, -1 for padding; those of a mask are models.transformer.positions_from_mask(mask)"
        )
    _check_input(start, stop, config, tokens, hidden)
    if hidden is None:
        hidden = _embed(params, adapter, config, tokens, positions)
    x = constrain(hidden.astype(config.dtype), "residual")
    rotated = rotations(positions, config)
    if cache is not None:
        cache = cache._replace(positions=store_positions(cache, positions))

    block = layer_block(config, positions, rotated, cache, fresh)
    stored = None if cache is None else (cache.keys, cache.values)
    run = _run_one_by_one if isinstance(params["layers"], tuple) else _scan
    x, stored = run(block, params["layers"], adapter, config, x, stored, (start, stop))
    last = stop == config.num_layers
    if last:
        x = normalise(config, params | adapter, "final_norm", x)
    if cache is None or stored is None:
        return x
    written = positions.shape[1] if last else 0
    return x, cache._replace(keys=stored[0], values=stored[1], length=cache.length + written)


def logits(
    params: PyTree, adapter: PyTree, config: ModelConfig, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch V"]:
    """Logits of the next token from final hidden states h, the last step of the model under base and adapter.

        z = cap * tanh(h @ unembedding.T / (s * cap))

    accumulated and kept in float32, with the family's s = `config.logit_divisor` and cap = `config.logit_cap`; most
    have neither: z = h @ unembedding.T. A row of the vocabulary without a token gets -1e30.
    Log-probs, entropies and KL of the whole package are those of these logits, divided by the temperature.
    """
    return finish_logits(config, unembed(hidden, constrain(unembedding(params, adapter), "table")))


def finish_logits(config: ModelConfig, raw: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """What the model makes of hidden @ unembedding.T. Sampler, log-probs, entropy and KL all go through it.

    It is divided and capped as `logits` says. Rows of the vocabulary without a token (`config.tokenless`) get -1e30, a
    probability of exactly 0.
    """
    if config.logit_divisor != 1:
        raw = raw / config.logit_divisor
    if config.logit_cap is not None:
        raw = config.logit_cap * jnp.tanh(raw / config.logit_cap)
    if not config.tokenless:
        return raw
    rows, off = jnp.arange(raw.shape[-1]), jnp.zeros(raw.shape[-1], bool)
    for start, stop in config.tokenless:
        off |= (rows >= start) & (rows < stop)
    return jnp.where(off, LOWEST, raw)


def _embed(params: PyTree, adapter: PyTree, config: ModelConfig, tokens: Array | None, positions: Array) -> Array:
    """What enters the first layer: the tokens' embeddings, scaled, and those of their positions, if there are any."""
    x = constrain(adapter.get("embedding", params["embedding"]), "table")[tokens]
    if config.embedding_scale != 1:
        x = x.astype(config.dtype) * jnp.asarray(config.embedding_scale, config.dtype)
    if config.learned_positions:
        table = adapter.get("positions", params["positions"])
        x = x.astype(config.dtype) + table[jnp.maximum(positions, 0)].astype(config.dtype)
    return x


def _check_input(start: int, stop: int, config: ModelConfig, tokens: Array | None, hidden: Array | None) -> None:
    if not 0 <= start < stop <= config.num_layers:
        raise ValueError(f"layers [{start}, {stop}) is empty or not within [0, {config.num_layers})")
    if (hidden is None) == (tokens is None) or (hidden is None) != (start == 0):
        raise ValueError(f"layers [{start}, {stop}): give tokens when start is 0, else hidden, and not both")


# Steps that cost no more to do again than to read back: elementwise ones, shapes, and a layer read from the stack.
_CHEAP = {
    "add", "add_any", "and", "broadcast_in_dim", "concatenate", "convert_element_type", "div", "dynamic_slice",
    "erfc", "exp", "ge", "gt", "integer_pow", "iota", "le", "logistic", "lt", "max", "mul", "neg", "or", "reduce_max",
    "reduce_sum", "reshape", "rsqrt", "select_n", "sharding_constraint", "slice", "split", "square", "squeeze",
    "stop_gradient", "sub", "tanh", "transpose",
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
    stacked = with_gains(base, stacked, config)
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
        x, (keys[i], values[i]) = block(x, base[i], adapter["lora"][i], (keys[i], values[i]), i)
    return x, (tuple(keys), tuple(values))


def unstack(params: PyTree, adapter: PyTree, config: ModelConfig) -> tuple[PyTree, PyTree]:
    """(params, adapter) of the same role with every layer's arrays apart, for `apply` with a cache that is `unstacked`.

    It copies every layer, matrices in the activations' dtype, or quantised as they are.
    """

    def take(stack: PyTree, i: int) -> PyTree:
        """What the arrays of the topmost layers say of layer i."""
        skipped = config.num_layers - max((leaf.shape[0] for leaf in jax.tree.leaves(stack)), default=0)
        return {} if i < skipped else jax.tree.map(lambda leaf: leaf[i - skipped], stack)

    def cast(array: Array | Quantised) -> Array | Quantised:
        return array if isinstance(array, Quantised) or array.ndim < 2 else array.astype(config.dtype)

    adapter = with_gains(params["layers"], adapter, config)
    layers, lora = [], []
    for i in range(config.num_layers):
        layer = take(params["layers"], i) | take(adapter.get("layers", {}), i)
        layers.append({name: cast(array) for name, array in layer.items()})
        lora.append(take(adapter.get("lora", {}), i))
    rest = {name: array for name, array in adapter.items() if name != "layers"}
    return params | {"layers": tuple(layers)}, rest | {"lora": tuple(lora)}
