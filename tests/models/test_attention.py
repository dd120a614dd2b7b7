"""Rotary frequencies by hand, rotation as complex numbers, attention against loops."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.attention import attend
from ppo_jax.models.config import ModelConfig, RopeScaling
from ppo_jax.models.rotary import rope_frequencies, rotary, rotate
from tests.models.tiny import CONFIG

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit_attend = jax.jit(attend, compiler_options=QUICK)
# theta^(-2i/H) = 16^(-i/4): 1, 1/2, 1/4, 1/8
HALVES = dataclasses.replace(CONFIG, head_dim=8, rope_theta=16.0)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def loops(q: jax.Array, k: jax.Array, v: jax.Array, q_positions: np.ndarray, k_positions: np.ndarray) -> np.ndarray:
    """Attention of one query and head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, width = q.shape
    out = np.zeros(q.shape)
    for b, s, n in np.ndindex(batch, queries, heads):
        group = n // (heads // k.shape[2])
        seen = [c for c in range(k.shape[1]) if 0 <= k_positions[b, c] <= q_positions[b, s]]
        if seen:
            weights = np.exp([q[b, s, n] @ k[b, c, group] / math.sqrt(width) for c in seen])
            out[b, s, n] = weights @ v[b, seen, group] / weights.sum()
    return out


def test_frequencies_without_scaling() -> None:
    np.testing.assert_allclose(rope_frequencies(HALVES), [1, 1 / 2, 1 / 4, 1 / 8], rtol=1e-6)


def test_linear_scaling_divides_every_frequency() -> None:
    config = dataclasses.replace(HALVES, rope_scaling=RopeScaling("linear", factor=5.0))
    np.testing.assert_allclose(rope_frequencies(config), [0.2, 0.1, 0.05, 0.025], rtol=1e-6)


def test_llama3_scaling_by_hand() -> None:
    """Turns within the original 8 positions: 8 f / 2 pi = 1.27324, 0.63662, 0.31831, 0.15915.

    keep = clip((turns - 0.25) / (0.75 - 0.25), 0, 1) = 1, 0.77324, 0.13662, 0, and the frequency becomes
    f * (keep + (1 - keep) / 4) = f * (1/4 + 3/4 keep) = f * (1, 0.82993, 0.352465, 0.25).
    """
    scaling = RopeScaling("llama3", 4.0, low_freq_factor=0.25, high_freq_factor=0.75, original_max_positions=8)
    config = dataclasses.replace(HALVES, rope_scaling=scaling)
    np.testing.assert_allclose(rope_frequencies(config), [1, 0.414965, 0.0881163, 0.03125], rtol=1e-5)


def test_llama3_in_the_wavelengths_of_the_released_configs() -> None:
    """Llama 3.1 (H 128, theta 5e5, factor 8): wavelengths under 2048 stay, over 8192 are divided by 8."""
    config = dataclasses.replace(CONFIG, head_dim=128, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0))
    plain = 5e5 ** (-np.arange(64) / 64)
    ratio, wavelength = np.asarray(rope_frequencies(config)) / plain, 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 2048], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 8, rtol=1e-5)
    between = ratio[(wavelength > 2048) & (wavelength < 8192)]
    assert len(between) > 3 and (np.diff(between) < 0).all() and (between < 1).all() and (between > 1 / 8).all()


@pytest.mark.parametrize(("field", "value"), [("head_dim", 7), ("num_heads", 3)])
def test_impossible_heads_are_named(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}={value} is"):
        dataclasses.replace(CONFIG, **{field: value})


def test_rotation_multiplies_complex_pairs() -> None:
    """x_i + j x_{i+H/2} turns by exp(j p f_i): Hugging Face's half-split pairing."""
    positions = jnp.array([[0, 3, 70]])
    x = normal(0, 1, 3, 2, 8)
    rotated = np.asarray(rotate(x, *rotary(positions, HALVES)))
    angle = np.array([0, 3, 70])[:, None, None] * np.array([1, 1 / 2, 1 / 4, 1 / 8])
    expected = (np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])) * np.exp(1j * angle)
    np.testing.assert_allclose(rotated[..., :4] + 1j * rotated[..., 4:], expected, atol=1e-4)


def test_only_position_differences_matter() -> None:
    q, k, v, positions = normal(0, 2, 5, 4, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8), np.arange(5)

    @partial(jax.jit, compiler_options=QUICK)
    def run(offset: int) -> jax.Array:
        at = jnp.broadcast_to(positions + offset, (2, 5))
        turn = rotary(at, HALVES)
        return attend(rotate(q, *turn), rotate(k, *turn), v, at, at)

    np.testing.assert_allclose(run(0), run(40), atol=2e-5)
    unrotated = jit_attend(q, k, v, *(np.broadcast_to(positions, (2, 5)),) * 2)
    assert np.abs(run(0) - unrotated).max() > 0.05  # the rotation is not the identity


def test_two_keys_by_hand() -> None:
    """H = 1: scores (0, log 3), weights (1/4, 3/4), values (0, 4): 3. The first query sees the first key alone."""
    q = jnp.ones((1, 2, 1, 1))
    k, v = (jnp.array(pair).reshape(1, 2, 1, 1) for pair in ([0.0, math.log(3)], [0.0, 4.0]))
    positions = jnp.array([[0, 1]])
    np.testing.assert_allclose(attend(q, k, v, positions, positions)[0, :, 0, 0], [0, 3], rtol=1e-6)


def test_scores_are_divided_by_the_root_of_the_width() -> None:
    """H = 4: q.k = 2 log 3, divided by sqrt(4) again log 3."""
    q, k = jnp.ones((1, 2, 1, 4)), jnp.array([[0.0] * 4, [math.log(3) / 2] * 4]).reshape(1, 2, 1, 4)
    v, positions = jnp.array([[0.0] * 4, [4.0] * 4]).reshape(1, 2, 1, 4), jnp.array([[0, 1]])
    np.testing.assert_allclose(attend(q, k, v, positions, positions)[0, 1, 0], [3, 3, 3, 3], rtol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_against_loops(kv_heads: int) -> None:
    """Padding left, inside and right; more keys than queries; positions that jump."""
    k_positions = np.array([[-1, -1, 0, 1, 2, 3], [0, -1, 1, 2, -1, 7], [4, 3, 2, 1, 0, -1]])
    q_positions = np.array([[0, 3, -1], [1, 7, 2], [0, 2, 9]])
    q, k, v = normal(0, 3, 3, 4, 6) * 2, normal(1, 3, 6, kv_heads, 6), normal(2, 3, 6, kv_heads, 6)
    out = np.asarray(jit_attend(q, k, v, jnp.asarray(q_positions), jnp.asarray(k_positions)))
    expected, real = loops(q, k, v, q_positions, k_positions), q_positions >= 0
    np.testing.assert_allclose(out[real], expected[real], atol=1e-5)
    assert np.isfinite(out).all()


def test_grouped_queries_equal_repeated_heads() -> None:
    q, k, v = normal(0, 2, 5, 6, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    positions = np.broadcast_to(np.arange(5), (2, 5))
    grouped = jit_attend(q, k, v, positions, positions)
    repeated = jit_attend(q, *(np.repeat(x, 3, axis=2) for x in (k, v)), positions, positions)
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)
    tiled = jit_attend(q, *(np.tile(x, (1, 1, 3, 1)) for x in (k, v)), positions, positions)
    assert np.abs(grouped - tiled).max() > 0.1  # head n reads n // 3, not n % 2


def test_the_order_of_the_slots_is_irrelevant() -> None:
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
    positions, order = np.broadcast_to(np.arange(5), (2, 5)), np.array([3, 0, 4, 1, 2])
    shuffled = jit_attend(q, k[:, order], v[:, order], positions, positions[:, order])
    np.testing.assert_allclose(shuffled, jit_attend(q, k, v, positions, positions), atol=1e-6)


def test_invisible_keys_have_no_weight_at_all() -> None:
    q, k, v = normal(0, 1, 3, 2, 4), normal(1, 1, 4, 1, 4), normal(2, 1, 4, 1, 4)
    q_positions, k_positions = jnp.array([[0, 1, 2]]), jnp.array([[-1, 0, 1, 3]])

    @partial(jax.jit, compiler_options=QUICK)
    def run(k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out, pull = jax.vjp(lambda k, v: attend(q, k, v, q_positions, k_positions), k, v)
        return out, pull(jnp.ones_like(out))

    huge = np.array([1e15, 0.0, 0.0, -1e15], np.float32).reshape(1, 4, 1, 1)
    out, slopes = run(k + huge, v + huge)
    np.testing.assert_array_equal(out, run(k, v)[0])
    for slope in slopes:
        np.testing.assert_array_equal(slope[:, [0, 3]], 0)


def test_a_row_that_sees_nothing_is_finite_and_so_is_its_gradient() -> None:
    q, k, v = normal(0, 1, 3, 2, 4), normal(1, 1, 3, 1, 4), normal(2, 1, 3, 1, 4)
    nowhere = jnp.asarray(np.full((1, 3), -1))
    both = jax.jit(jax.value_and_grad(lambda q: attend(q, k, v, nowhere, nowhere).sum()), compiler_options=QUICK)
    out, slopes = both(q)
    assert np.isfinite(out) and np.isfinite(slopes).all()


def test_bfloat16_scores_are_float32() -> None:
    """q.k = 256 and 257, over sqrt(2): the weight of the second is 1 / (1 + exp(-1/sqrt 2)) = 0.66977.

    bfloat16 has no number between 256 and 258; scores rounded to it would give 1/2 or 0.80.
    """
    q = jnp.array([256.0, 1.0], jnp.bfloat16).reshape(1, 1, 1, 2)
    k = jnp.array([[1.0, 0.0], [1.0, 1.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.array([[0.0, 0.0], [1.0, 1.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    out = jit_attend(q, k, v, jnp.array([[1]]), jnp.array([[0, 1]]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 0.66977, atol=2**-8)


def test_angles_are_float32_whatever_the_model() -> None:
    """At position 1000 a bfloat16 angle would be off by whole radians."""
    config: ModelConfig = dataclasses.replace(HALVES, dtype="bfloat16")
    cos, sin = rotary(jnp.array([[1000, 1001]]), config)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (1, 2, 1, 4)
    np.testing.assert_allclose(cos[0, :, 0, 0], np.cos([1000.0, 1001.0]), atol=1e-4)
    assert rotate(jnp.ones((1, 2, 1, 8), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
