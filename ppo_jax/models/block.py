"""What one layer computes: attention and MLP, each with its norms, as the flags of `ModelConfig` say."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppo_jax.models.attention import Rule, attend, attend_cached
from ppo_jax.models.cache import Cache, store
from ppo_jax.models.config import Activation, ModelConfig
from ppo_jax.models.quantised import multiply
from ppo_jax.models.rotary import Rotations, rotate
from ppo_jax.parallel.sharding import constrain
from ppo_jax.types import PyTree

# One layer: residual stream, weights, LoRA updates, its keys and values (all layers', with its number) -> stream, those
Block = Callable[[Array, PyTree, PyTree, Any, int | Array], tuple[Array, Any]]
Linear = Callable[[str, Array], Array]

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def layer_block(config: ModelConfig, positions: Array, rotations: Rotations, cache: Cache | None, fresh: bool) -> Block:
    """What a layer does, whether its arrays are on their own (its number is an int) or in stacks (an array).

    h = x + r * after(attention(before(x)))        before, after: norms, or nothing; r = residual_scale
    y = h + r * after(mlp(before(h)))              parallel: y = h + r * after(mlp(before(x)))
    """

    def block(x: Array, layer: PyTree, lora: PyTree, stored: Any, index: int | Array) -> tuple[Array, Any]:
        linear, norm = _linear(layer, lora), partial(normalise, config, layer)

        def branch(name: str, compute: Callable[[Array], Array], x: Array, stream: Array) -> Array:
            h = x if config.norm_place == "after" else norm(f"{name}_norm", x)
            update = compute(h)
            if config.norm_place != "before":
                update = norm(f"{name}_post_norm", update)
            return stream + (update if config.residual_scale == 1 else update * config.residual_scale)

        def attention(h: Array) -> Array:
            nonlocal stored
            q, k, v = _heads(config, layer, linear, h)
            q, k = _rotated(config, rotations, index, q, k)
            if cache is not None:
                stored, kept = store(stored, (k, v), cache.length, index)
            if cache is None or fresh:
                rule = _rule(config, index, positions.shape[1])
                attended = attend(q, k, v, positions, positions, config.attention, aligned=True, rule=rule)
            else:
                rule, (keys, values) = _rule(config, index, cache.positions.shape[1]), kept
                attended = attend_cached(q, keys, values, positions, cache.positions, rule)
            return linear("o", constrain(attended, "heads").reshape(*h.shape[:2], -1))

        h = constrain(branch("attention", attention, x, x), "residual")
        return constrain(
            branch("mlp", partial(_mlp, config, linear), x if config.parallel else h, h), "residual"
        ), stored

    return block


def normalise(config: ModelConfig, arrays: PyTree, name: str, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """The norm `name` of a layer, or of the whole model, over the last axis of x, in float32."""
    weight = arrays[name]
    if config.norm_offset:
        weight = 1 + weight.astype(jnp.float32)
    if config.norm == "layer":
        return layer_norm(x, weight, arrays[f"{name}_bias"], config.norm_eps)
    return rms_norm(x, weight, config.norm_eps)


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * weight in float32 (Zhang & Sennrich 2019, equation 4)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*batch D"]:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias in float32 (Ba et al. 2016, equation 4)."""
    centred = x.astype(jnp.float32)
    centred -= jnp.mean(centred, axis=-1, keepdims=True)
    return (rms_norm(centred, weight, eps) + bias.astype(jnp.float32)).astype(x.dtype)


def _heads(config: ModelConfig, layer: PyTree, linear: Linear, h: Array) -> tuple[Array, Array, Array]:
    """Queries [B, S, N, H], keys and values [B, S, K, H], before rotation."""

    def heads(name: str) -> Array:
        flat, normed = linear(name, h), config.qk_norm if name != "v" else "none"
        if normed == "width":
            flat = normalise(config, layer, f"{name}_norm", flat)
        apart = flat.reshape(*h.shape[:2], -1, config.head_dim)
        return normalise(config, layer, f"{name}_norm", apart) if normed == "head" else apart

    q, k, v = (heads(name) for name in ("q", "k", "v"))
    return constrain(q, "heads"), constrain(k, "kv_heads"), constrain(v, "kv_heads")


def _rotated(config: ModelConfig, rotations: Rotations, index: int | Array, q: Array, k: Array) -> tuple[Array, Array]:
    """Queries and keys at their positions."""
    if config.learned_positions:
        return q, k
    cos_sin = _choose(config, index, config.windowed, rotations.windowed, rotations.whole)
    still = (jnp.ones_like(cos_sin[0]), jnp.zeros_like(cos_sin[1])) if config.unrotated else cos_sin
    cos_sin = _choose(config, index, config.unrotated, still, cos_sin)
    return rotate(q, *cos_sin), rotate(k, *cos_sin)


def _rule(config: ModelConfig, index: int | Array, slots: int) -> Rule:
    """How the scores of a layer become weights; a window is left out where no row of `slots` can leave it."""
    if config.window is None or config.window >= slots:
        return Rule(config.attention_scale, config.attention_cap)
    window = _choose(config, index, config.windowed, config.window, slots)  # a window of all slots is none
    return Rule(config.attention_scale, config.attention_cap, window)


def _choose(config: ModelConfig, index: int | Array, layers: tuple[int, ...], inside: Any, outside: Any) -> Any:
    """`inside` where the layer is one of `layers`, else `outside`; nothing is compiled where that is known before."""
    alike = [layer in layers for layer in range(config.num_layers)]
    if inside is outside or isinstance(index, int) or len(set(alike)) == 1:
        return inside if alike[index if isinstance(index, int) else 0] else outside
    chosen = jnp.asarray(alike)[index]
    return jax.tree.map(lambda one, other: jnp.where(chosen, one, other), inside, outside)


def _mlp(config: ModelConfig, linear: Linear, h: Array) -> Array:
    """down(activation(gate h) * up h), or down(activation(up h)) without a gate (Shazeer 2020)."""
    activate = ACTIVATIONS[config.activation]
    inner = activate(linear("gate", h)) * linear("up", h) if config.gated else activate(linear("up", h))
    return linear("down", constrain(inner, "mlp"))


def _linear(layer: PyTree, lora: PyTree) -> Linear:
    """name, x -> (x W (+ scale x a b)) (* gain) (+ bias), in the dtype of x."""

    def linear(name: str, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])  # one contracted dimension in the weight's gradient: no transposed copies
        y = multiply(rows, layer[name])
        if name in lora:
            update = lora[name]
            y += ((rows @ update.a.astype(x.dtype)) @ update.b.astype(x.dtype)) * update.scale
            if update.gain is not None:
                y = (y * update.gain).astype(x.dtype)
        if f"{name}_bias" in layer:
            y += layer[f"{name}_bias"].astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    return linear
