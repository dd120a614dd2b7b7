"""Rotary positions (Su et al. 2021, section 3.4) and the ways in which checkpoints stretch them."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppo_jax.models.config import ModelConfig, RopeScaling

CosSin = tuple[Array, Array]


class Rotations(NamedTuple):
    """cos and sin [B, S, 1, R/2] of the rotation angles, float32; () where positions are learned."""

    whole: CosSin | tuple[()]  # of layers that see whole sequences
    windowed: CosSin | tuple[()]  # of layers with a window: the same arrays, or those of another base


def rotations(positions: Int[Array, "B S"], config: ModelConfig) -> Rotations:
    """The rotations of tokens at `positions`, for both kinds of layers."""
    if config.learned_positions:
        return Rotations((), ())
    whole = rotary(positions, config)
    if config.window_theta is None:
        return Rotations(whole, whole)
    other = dataclasses.replace(config, rope_theta=config.window_theta, rope_scaling=None)
    return Rotations(whole, rotary(positions, other))


def rotary(positions: Int[Array, "B S"], config: ModelConfig) -> CosSin:
    """cos and sin [B, S, 1, R/2] of the rotation angles, float32."""
    angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    strength = 1.0 if config.rope_scaling is None else config.rope_scaling.strength
    if strength == 1:
        return jnp.cos(angle), jnp.sin(angle)
    return strength * jnp.cos(angle), strength * jnp.sin(angle)


def rope_frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Radians per position of each rotary pair: theta^(-2i/R), stretched by the checkpoint's scaling.

    R is the rotated width of a head. The `llama3` rule: The Llama 3 Herd of Models, and the released configs.
    """
    half = config.rotated // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        return frequency / jnp.array(scaling.short, jnp.float32)
    return (_yarn if scaling.kind == "yarn" else _llama3)(frequency, scaling, config.rope_theta)


def _llama3(frequency: Float[Array, " half"], scaling: RopeScaling, theta: float) -> Float[Array, " half"]:
    # turns: how often a pair rotates within the original context; few turns = low frequency = divided by factor.
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def _yarn(frequency: Float[Array, " half"], scaling: RopeScaling, theta: float) -> Float[Array, " half"]:
    """Peng et al. 2023, section 3.2: pairs below one limit are kept, those above the other divided by the factor."""
    half = frequency.shape[0]

    def pair(turns: float) -> float:
        """The number of the pair that turns so often within the original context."""
        return half * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (jnp.arange(half, dtype=jnp.float32) - low) / (high - low if high != low else 0.001)
    divided = jnp.clip(ramp, 0.0, 1.0)
    return (1 - divided) * frequency + divided * frequency / scaling.factor


def rotate(x: Float[Array, "B S N H"], cos: Array, sin: Array) -> Float[Array, "B S N H"]:
    """Rotates the pairs (x_i, x_{i+R/2}) of the first R entries: Hugging Face's half-split layout, not interleaved."""
    width = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)
