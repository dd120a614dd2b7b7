"""Rotary positions and causal grouped-query attention."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppo_jax.models.config import ModelConfig, RopeScaling

# A finite stand-in for minus infinity: a row with nothing to attend to stays finite (and is masked later).
MASKED = -1e30


def rope_frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Radians per position of each rotary pair: theta^(-2i/H), stretched by the checkpoint's scaling.

    RoPE: Su et al. 2021, section 3.4. The `llama3` rule: The Llama 3 Herd of Models, and the released configs.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    return _llama3(frequency, scaling)


def _llama3(frequency: Float[Array, " half"], scaling: RopeScaling) -> Float[Array, " half"]:
    # turns: how often a pair rotates within the original context; few turns = low frequency = divided by factor.
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rotary(positions: Int[Array, "B S"], config: ModelConfig) -> tuple[Array, Array]:
    """cos and sin [B, S, 1, H/2] of the rotation angles, float32."""
    angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B S N H"], cos: Array, sin: Array) -> Float[Array, "B S N H"]:
    """Rotates the pairs (x_i, x_{i+H/2}): Hugging Face's half-split layout, not the interleaved one."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K H"],
    q_positions: Int[Array, "B S"],
    k_positions: Int[Array, "B C"],
) -> Float[Array, "B S N H"]:
    """softmax(q k' / sqrt(H)) v over the keys with 0 <= k_position <= q_position; softmax in float32.

    Query head n reads key/value head n // (N / K) (grouped-query attention, Ainslie et al. 2023).
    """
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("bskgh,bckh->bkgsc", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(width)
    visible = (k_positions[:, None, :] >= 0) & (k_positions[:, None, :] <= q_positions[:, :, None])
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgsc,bckh->bskgh", weights, v).reshape(batch, queries, heads, width)
