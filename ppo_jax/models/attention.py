"""Causal grouped-query attention over three implementations.

`xla` works everywhere and is what the others are tested against. The kernels never hold the [S, S] scores, but know
causality by slot, not by position. For a pass over whole rows (`aligned`) the two agree once padding is out of the
way, since positions grow along a row's slots: `splash` keeps padding apart by segment ids, `cudnn` gets the real
tokens moved to the front and their number. What a padding slot gets back differs, and nobody reads it.
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.extend.backend import get_backend
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ppo_jax.models.config import Attention

# A finite stand-in for minus infinity: a row with nothing to attend to stays finite (and is masked later).
MASKED = -1e30


class Rule(NamedTuple):
    """How the scores q k' of a layer become weights, beside causality."""

    scale: float | None = None  # of the scores; None: 1 / sqrt(H)
    cap: float | None = None  # scores become cap * tanh(scores / cap)
    window: int | Array | None = None  # a token sees this many positions, its own included


PLAIN = Rule()


def attend(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K H"],
    q_positions: Int[Array, "B S"],
    k_positions: Int[Array, "B C"],
    implementation: Attention = "xla",
    aligned: bool = False,
    rule: Rule = PLAIN,
) -> Float[Array, "B S N H"]:
    """softmax(q k' / sqrt(H)) v over the keys with 0 <= k_position <= q_position; softmax in float32.

    Query head n reads key/value head n // (N / K) (grouped-query attention, Ainslie et al. 2023).

    Args:
      implementation: `auto` takes the device's kernel where it applies; a kernel that is asked for by name and cannot
        serve these shapes raises ValueError. Passes that are not `aligned` (decoding with a cache) are always `xla`.
      aligned: query slot i is key slot i (whole rows, or the prefill of an empty cache), and positions grow along the
        slots of each row, padding (-1) left out.
      rule: another scale than 1 / sqrt(H), a cap, or a window: 0 <= q_position - k_position < window.
    """
    chosen = implementation_for(q, k, implementation, rule) if aligned and q.shape[1] > 1 else "xla"
    if chosen != "xla" and rule.scale is not None:  # the kernels know 1 / sqrt(H) alone
        q = q * jnp.asarray(rule.scale * math.sqrt(q.shape[-1]), q.dtype)
    if chosen == "splash":
        return splash(q, k, v, q_positions)
    if chosen == "cudnn":
        return flash(q, k, v, q_positions)
    return attend_cached(q, k.swapaxes(1, 2), v.swapaxes(1, 2), q_positions, k_positions, rule)


def attend_cached(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    q_positions: Int[Array, "B S"],
    k_positions: Int[Array, "B C"],
    rule: Rule = PLAIN,
) -> Float[Array, "B S N H"]:
    """`attend` by XLA over keys and values as the cache holds them: read where they lie, heads of a group together."""
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    # A plain product for each row and key/value head: CPUs have a fast one for it, and none for the einsum's layouts.
    grouped = q.reshape(batch, queries, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, groups * queries, width)
    scores = jnp.matmul(grouped, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, queries, -1)
    scores = scores / math.sqrt(width) if rule.scale is None else scores * rule.scale
    if rule.cap is not None:
        scores = rule.cap * jnp.tanh(scores / rule.cap)
    visible = (k_positions[:, None, :] >= 0) & (k_positions[:, None, :] <= q_positions[:, :, None])
    if rule.window is not None:
        visible &= k_positions[:, None, :] > q_positions[:, :, None] - rule.window
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    attended = jnp.matmul(weights.reshape(batch, kv_heads, groups * queries, -1), v)
    return attended.reshape(batch, heads, queries, width).swapaxes(1, 2)


def implementation_for(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], wanted: Attention, rule: Rule = PLAIN
) -> Literal["xla", "cudnn", "splash"]:
    """What computes an aligned pass of these shapes and dtypes on the default platform (see `attend`)."""
    platform = {"tpu": "splash", "gpu": "cudnn"}.get(jax.default_backend(), "xla")
    chosen = platform if wanted == "auto" else wanted
    problem = {"splash": _splash_problem, "cudnn": _cudnn_problem}.get(chosen, lambda q, k: None)(q, k)
    if chosen != "xla" and (rule.cap is not None or rule.window is not None):
        problem = "this model caps its scores, or has windows shorter than the rows, which only 'xla' computes here"
    if problem and wanted != "auto":
        raise ValueError(f"attention={wanted!r} cannot be used: {problem}; choose 'auto' or 'xla'")
    return "xla" if problem else chosen  # type: ignore[return-value]


def flash(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: Int[Array, "B S"],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S N H"]:
    """Aligned attention by `jax.nn.dot_product_attention` (cuDNN: FlashAttention-2, Dao 2023).

    cuDNN masks a row's end only, so the real tokens of each row move to its front, and their results back.
    """
    slots = jnp.arange(positions.shape[1])
    order = jnp.argsort(jnp.where(positions >= 0, slots, slots + slots.size), axis=1)  # real tokens first, in order
    back = jnp.argsort(order, axis=1)
    lengths = jnp.maximum(jnp.sum(positions >= 0, axis=1, dtype=jnp.int32), 1)  # no row without a key
    front = [jnp.take_along_axis(x, order[..., None, None], axis=1) for x in (q, k, v)]
    attended = jax.nn.dot_product_attention(
        *front,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    # Nothing is said of a padding slot's result; what follows puts it into the cache, and 0 x NaN is no 0.
    in_place = jnp.take_along_axis(attended, back[..., None, None], axis=1)
    return jnp.where((positions >= 0)[..., None, None], in_place, 0)


def _cudnn_problem(q: Array, k: Array) -> str | None:
    if jax.default_backend() == "gpu" and "rocm" in get_backend().platform_version:
        return "this GPU runs on ROCm, which has no cuDNN"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention computes in bfloat16, the activations are {q.dtype} (set dtype=bfloat16)"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN attention needs a head width that is a multiple of 8 up to 128; this model's is {q.shape[-1]}"
    return None


def splash(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: Int[Array, "B S"],
    interpret: bool = False,
) -> Float[Array, "B S N H"]:
    """Aligned attention by JAX's splash kernel for TPUs: blocks of the causal mask that are empty are never visited.

    Rows are filled up to whole blocks. Under a mesh (`jax.set_mesh`) each device runs the kernel on its rows and heads;
    XLA cannot split a kernel by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _splash_local(q, k, v, positions, interpret=interpret)
    rows = tuple(name for name in ("data", "fsdp") if name in mesh.auto_axes)
    heads = "tensor" if "tensor" in mesh.auto_axes else None
    spec = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(
        partial(_splash_local, interpret=interpret),
        in_specs=(spec, spec, spec, PartitionSpec(rows, None)),
        out_specs=spec,
        axis_names=set(mesh.auto_axes),  # where each device has its own members, their axis is taken already
        check_vma=False,
    )(q, k, v, positions)


def _splash_local(q: Array, k: Array, v: Array, positions: Array, *, interpret: bool) -> Float[Array, "B S N H"]:
    length, heads, width = q.shape[1:]
    whole = -(-length // 128) * 128  # the kernel's lanes
    block = next(size for size in (512, 384, 256, 128) if whole % size == 0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((whole, whole))] * heads),
        block_sizes=splash_attention.BlockSizes(*(block,) * 8),  # forward, d(key, value) and d(query)
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    fill = ((0, 0), (0, whole - length), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, fill).swapaxes(1, 2) for x in (q / math.sqrt(width), k, v))
    real = jnp.pad((positions >= 0).astype(jnp.int32), fill[:2])  # segment 0: padding
    out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash_attention.SegmentIds(s, s)))(q, k, v, real)
    return out.swapaxes(1, 2)[:, :length].astype(v.dtype)


def _splash_problem(q: Array, k: Array) -> str | None:
    if q.shape[-1] % 64:
        return f"splash attention needs a head width that is a multiple of 64; this model's is {q.shape[-1]}"
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else {name: mesh.shape[name] for name in mesh.auto_axes}
    rows, heads = math.prod(sizes.get(name, 1) for name in ("data", "fsdp")), sizes.get("tensor", 1)
    if q.shape[0] % rows:
        return f"{q.shape[0]} rows do not divide over data x fsdp = {rows} devices"
    if k.shape[2] % heads:
        return f"{k.shape[2]} key/value heads do not divide over tensor = {heads} devices"
    return None
