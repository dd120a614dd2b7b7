"""Adapters: the pytree that turns the frozen base into a role.

An adapter is a dict with any of these keys; `{}` is the base itself.

    lora          {linear name: Lora}, arrays stacked over the layers it touches
    layers        replacements for entries of `params["layers"]`, stacked likewise
    embedding, final_norm, unembedding          replacements for the arrays of that name

An adapter always touches the *last* n layers, n being the length of its stacked arrays: below
`first_layer(adapter)` all roles share their activations. Nothing downstream asks which kind it is.
"""

import dataclasses
import functools
import re
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import TENSORS, linear_shapes
from ppo_jax.models.quantised import Quantised, dequantise
from ppo_jax.types import PyTree

LINEARS = tuple(tensor.name for tensor in TENSORS if tensor.linear)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which parameters of the base are trained."""

    kind: Literal["lora", "top_k", "full"] = "lora"
    """Training changes low-rank updates (lora), whole last layers (top_k, "freeze" tuning), or everything (full)."""
    layers: int = 0
    """This many layers from the top are touched; 0 means all. Layers below them are computed once per rollout."""
    rank: int = 8
    """A LoRA update has this rank."""
    alpha: float = 16.0
    """A LoRA update is scaled by alpha / rank."""
    targets: tuple[str, ...] = LINEARS
    """These linear maps carry LoRA; where all are named, those that the model has (GPT-2's MLP has no gate). Each is a
    name or a regular expression of names, and may have a rank and an alpha of its own: "q|v:16" or "q|v:16:32"."""
    dora: bool = False
    """LoRA changes the directions of the weights alone, and a length for each output is trained beside it (DoRA)."""

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "top_k", "full"):
            raise ValueError(f"adapter kind={self.kind!r}; allowed: lora, top_k, full")
        if self.kind == "full" and self.layers:
            raise ValueError(f"adapter kind=full trains every layer; layers={self.layers} needs kind=top_k")
        if self.dora and self.kind != "lora":
            raise ValueError(f"adapter dora=True is a form of kind=lora; kind={self.kind} trains whole weights")
        read_targets(self.targets, self.rank, self.alpha)


@flax.struct.dataclass
class Lora:
    """A low-rank update of a stack of linear maps: V = W + scale * a @ b (Hu et al. 2021, section 4.1).

    With a magnitude m it is m * V / |V|, lengths of each output's inputs (DoRA, Liu et al. 2024, equation 5); to
    gradients |V| is a constant (equation 11).
    """

    a: PyTree  # [n, in, r]; tree functions also put shapes, shardings and flags here, so no array type is claimed
    b: PyTree  # [n, r, out]
    scale: float = flax.struct.field(pytree_node=False)  # alpha / rank
    magnitude: PyTree = None  # [n, out]; None: no DoRA
    gain: PyTree = None  # [n, out]: m / |V|, for the time of a pass in place of m (`with_gains`)


def init_adapter(key: PRNGKeyArray, params: PyTree, config: ModelConfig, adapter: AdapterConfig) -> PyTree:
    """A fresh adapter as configured; the role it makes equals the base. `key` is consumed."""
    if not 0 <= adapter.layers <= config.num_layers:
        raise ValueError(f"adapter layers={adapter.layers} must lie in [0, {config.num_layers}]")
    count = adapter.layers or config.num_layers
    if adapter.kind == "full":
        return init_full(params)
    if adapter.kind == "top_k":
        return init_top_k(params, config, count)
    lora = init_lora(key, config, adapter.rank, adapter.alpha, adapter.targets, config.num_layers - count)
    return init_magnitudes(params["layers"], lora, config) if adapter.dora else lora


def init_lora(
    key: PRNGKeyArray,
    config: ModelConfig,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] = LINEARS,
    first_layer: int = 0,
) -> PyTree:
    """A LoRA adapter on the linear maps `targets` of layers >= `first_layer`; equal to the base at the start.

    a ~ U(-1/sqrt(in), 1/sqrt(in)) and b = 0, in float32. `key` is consumed.
    """
    own = read_targets(targets, rank, alpha)
    if rank < 1:
        raise ValueError(f"LoRA rank={rank} must be at least 1")
    if not 0 <= first_layer < config.num_layers:
        raise ValueError(f"first_layer={first_layer} must lie in [0, {config.num_layers})")
    sizes = linear_shapes(config)
    names = [name for name in own if name in sizes or set(own) != set(LINEARS)]
    if absent := [name for name in names if name not in sizes]:
        raise ValueError(f"LoRA targets {absent}: a {config.family} model has no such map; it has {', '.join(sizes)}")
    count = config.num_layers - first_layer
    lora = {}
    for name, subkey in zip(names, jax.random.split(key, len(names)), strict=True):
        (inputs, outputs), (rank, alpha) = sizes[name], own[name]
        bound = inputs**-0.5
        a = jax.random.uniform(subkey, (count, inputs, rank), jnp.float32, -bound, bound)
        lora[name] = Lora(a=a, b=jnp.zeros((count, rank, outputs), jnp.float32), scale=alpha / rank)
    return {"lora": lora}


def init_magnitudes(layers: PyTree, adapter: PyTree, config: ModelConfig) -> PyTree:
    """The LoRA adapter as DoRA that computes the same: magnitudes |W + scale * a @ b|, `layers` holding the W."""
    lengths = _lengths(layers, adapter, first_layer(adapter, config))
    lora = {name: update.replace(magnitude=lengths[name]) for name, update in adapter["lora"].items()}
    return {**adapter, "lora": lora}


def with_gains(layers: PyTree, adapter: PyTree, config: ModelConfig) -> PyTree:
    """The adapter as the layers use it: what DoRA multiplies outputs by, computed once for all tokens of a pass.

    An adapter without magnitudes comes back as it is, and so does one that has its gains already.
    """
    dora = {name: update for name, update in adapter.get("lora", {}).items() if update.magnitude is not None}
    if not dora:
        return adapter
    lengths = _lengths(layers, {**adapter, "lora": dora}, first_layer(adapter, config))
    gains = {
        name: update.replace(magnitude=None, gain=gain(update.magnitude, lengths[name]))
        for name, update in dora.items()
    }
    return {**adapter, "lora": {**adapter["lora"], **gains}}


def gain(magnitude: Array, length: Array) -> Array:
    """magnitude / length; an output without weights stays 0."""
    return magnitude / jnp.where(length > 0, length, 1)


def _lengths(layers: PyTree, adapter: PyTree, first: int) -> dict[str, Float[Array, "n out"]]:
    """|W + scale * a @ b| over the inputs, in float32 and without a gradient, of the layers from `first` up.

    By |W|^2 + 2 scale <W, a @ b> + scale^2 |a @ b|^2: under `vmap` over adapters no W is held once for each.
    """

    def lengths(stack: PyTree, update: Lora, start: int) -> Array:
        def one(inputs: tuple) -> Array:
            index, a, b = inputs
            layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stack)
            w = dequantise(layer, jnp.float32).astype(jnp.float32)
            product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
            update_only = update.scale * product(product(a.T, a), b)
            squares = update.scale * jnp.sum(b * (2 * product(a.T, w) + update_only), axis=0)
            return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(w), axis=0) + squares, 0))

        return jax.lax.map(one, (start + jnp.arange(update.a.shape[0]), update.a, update.b))

    replaced, fixed = adapter.get("layers", {}), jax.lax.stop_gradient
    return {
        name: lengths(fixed(replaced.get(name, layers[name])), fixed(update), 0 if name in replaced else first)
        for name, update in adapter["lora"].items()
    }


def read_targets(targets: tuple[str, ...], rank: int, alpha: float) -> dict[str, tuple[int, float]]:
    """{linear map: its rank and alpha}, in the order of the targets; `rank` and `alpha` where they say none.

    Raises ValueError for a target that no map has, what other programs call it being known; for a map that two of them
    have; and for a rank or alpha that is none.
    """
    found: dict[str, tuple[int, float]] = {}
    unknown = []
    for target in targets:
        pattern, *numbers = target.split(":")
        try:
            names = [name for name in LINEARS if re.fullmatch(pattern, name)]
            own = (int(numbers[0]) if numbers else rank, float(numbers[1]) if numbers[1:] else alpha)
        except (re.error, ValueError) as error:
            raise ValueError(f"LoRA target {target!r} is not NAME, NAME:RANK or NAME:RANK:ALPHA: {error}") from error
        if len(numbers) > 2 or (numbers and (own[0] < 1 or not 0 < own[1] < float("inf"))):
            raise ValueError(f"LoRA target {target!r} is not NAME, NAME:RANK or NAME:RANK:ALPHA, both above 0")
        if twice := [name for name in names if name in found]:
            raise ValueError(f"LoRA targets name {', '.join(twice)} twice: {', '.join(targets)}")
        unknown += [] if names else [pattern]
        found |= dict.fromkeys(names, own)
    if not unknown and found:
        return found
    ours = {name: name.removesuffix("_proj") for name in sorted(unknown)}
    hint = "".join(f"; {name} is {short} here" for name, short in ours.items() if short in LINEARS)
    raise ValueError(f"LoRA targets {sorted(unknown) or 'are empty'}; allowed: {', '.join(LINEARS)}{hint}")


def init_top_k(params: PyTree, config: ModelConfig, k: int) -> PyTree:
    """The last `k` layers copied, to be trained in place of the base's ("freeze" tuning); float32 as in `init_full`."""
    if not 1 <= k <= config.num_layers:
        raise ValueError(f"top-k tuning of k={k} layers; the model has {config.num_layers}")
    last = {name: jax.tree.map(lambda w: w[-k:], weight) for name, weight in params["layers"].items()}
    return {"layers": {name: jnp.array(dequantise(w, jnp.float32), jnp.float32, copy=True) for name, w in last.items()}}


def init_full(params: PyTree) -> PyTree:
    """A full copy of the parameters: full fine-tuning.

    Always float32, whatever the base: bfloat16 has 8 bits, so a step below 0.2 % of a weight would be lost. The trunk
    casts to its activations' dtype, one layer at a time. Raises ValueError for a quantised base, which has no whole
    weights to start from.
    """
    if any(isinstance(weight, Quantised) for weight in params["layers"].values()):
        raise ValueError(
            "full fine-tuning changes every weight, and those of --compute.quantise are frozen: train lora or top_k, "
            "or leave --compute.quantise out"
        )
    return jax.tree.map(lambda w: jnp.array(w, jnp.float32, copy=True), params)


def first_layer(adapter: PyTree, config: ModelConfig) -> int:
    """The lowest layer that the adapter changes (num_layers when it changes none).

    An adapter that replaces the embedding changes every activation: 0.
    """
    stacked = jax.tree.leaves((adapter.get("lora", {}), adapter.get("layers", {})))
    counts = {leaf.shape[0] for leaf in stacked} or {0}
    if len(counts) > 1 or max(counts) > config.num_layers:
        raise ValueError(
            f"the adapter's arrays are stacked over {sorted(counts)} layers; all must have the same number, "
            f"at most num_layers={config.num_layers}"
        )
    return 0 if "embedding" in adapter else config.num_layers - max(counts)


def shared_layers(adapter: PyTree, config: ModelConfig) -> int:
    """How many layers, from the bottom, the role shares with the base; never the last, which the final norm follows."""
    return min(first_layer(adapter, config), config.num_layers - 1)


def merge(params: PyTree, adapter: PyTree, config: ModelConfig) -> PyTree:
    """Parameters of a plain model that computes what `apply(params, adapter, ...)` does, whatever the base's bits."""
    dtype = params["embedding"].dtype
    layers = {name: dequantise(weight, dtype) for name, weight in params["layers"].items()}
    touched = {**adapter.get("layers", {}), **adapter.get("lora", {})}
    for name in touched:
        count = jax.tree.leaves(touched[name])[0].shape[0]
        layers[name] = layers[name].at[-count:].set(_merged(layers[name][-count:], adapter, name))
    whole = {name: _as(array, dtype) for name, array in adapter.items() if name not in ("lora", "layers")}
    return {**params, **whole, "layers": layers}


def merge_one(params: PyTree, adapter: PyTree, key: str, layer: int = 0) -> Array:
    """One array of `merge`, or one layer of it ("embedding", "layers.q"); nothing else is computed."""
    group, _, name = key.rpartition(".")
    if not group:
        return _as(adapter[name], params["embedding"].dtype) if name in adapter else params[name]
    take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=1)  # for every layer the same program
    base = params["layers"][name]
    changes = {kind: {name: adapter[kind][name]} for kind in ("layers", "lora") if name in adapter.get(kind, {})}
    untouched = base.shape[0] - max((x.shape[0] for x in jax.tree.leaves(changes)), default=0)
    if layer < untouched:
        changes = {}
    one = dequantise(jax.tree.map(lambda x: take(x, layer), base), params["embedding"].dtype)
    return _merged(one, jax.tree.map(lambda x: take(x, layer - untouched), changes), name)[0]


def _merged(base: Array, adapter: PyTree, name: str) -> Array:
    """The stack `base` of the linear map `name` with what the adapter says of the same layers."""
    new = adapter.get("layers", {}).get(name)
    base = base if new is None else _as(new, base.dtype)
    if lora := adapter.get("lora", {}).get(name):
        whole = base + lora.scale * jnp.einsum("nir,nro->nio", lora.a, lora.b)
        if lora.magnitude is not None:
            whole *= gain(lora.magnitude, jnp.linalg.norm(whole, axis=1))[:, None]
        base = whole.astype(base.dtype)
    return base


def unembedding(params: PyTree, adapter: PyTree) -> Float[Array, "V D"]:
    """The matrix that maps hidden states to logits, in the base's dtype; the embedding itself when the two are tied."""
    for tree in (adapter, params):
        if "unembedding" in tree:
            return _as(tree["unembedding"], params["embedding"].dtype)
    return _as(adapter.get("embedding", params["embedding"]), params["embedding"].dtype)


def _as(array: Array, dtype: jnp.dtype) -> Array:
    """The array itself where it has that dtype already."""
    return array if array.dtype == dtype else array.astype(dtype)
