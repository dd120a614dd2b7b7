"""The kernels against the XLA reference, at every real token: padding anywhere, grouped heads, gradients, a mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.models.attention import attend, flash, implementation_for, splash
from ppo_jax.models.config import Attention
from ppo_jax.models.layout import init_params
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.state import zero_value_head
from ppo_jax.types import Policy, Prompts
from tests.models.tiny import CONFIG

B, S, N, K, H = 4, 150, 4, 2, 64
# Rows as PPO makes them: left-padded, left- and right-padded, whole, and nothing but padding.
START, END = np.array([20, 7, 0, S]), np.array([S, 140, S, S])
SLOTS = np.arange(S)
REAL = (START[:, None] <= SLOTS) & (END[:, None] > SLOTS)
POSITIONS = jnp.asarray(np.where(REAL, SLOTS - START[:, None], -1), jnp.int32)


def normal(seed: int, heads: int, rows: int = B) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, S, heads, H)), jnp.float32)


Q, KEYS, VALUES = normal(0, N), normal(1, K), normal(2, K)


def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attend(q, k, v, POSITIONS, POSITIONS)


KERNELS = {
    "splash": lambda q, k, v: splash(q, k, v, POSITIONS, interpret=True),
    # The same preparation and call as on a GPU, computed by XLA.
    "flash": lambda q, k, v: flash(q, k, v, POSITIONS, implementation="xla"),
}


def slopes(function, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    """Gradients of a function of the real tokens' results alone."""
    mask = jnp.asarray(REAL)[..., None, None]
    loss = lambda *xs: jnp.sum(jnp.where(mask, jnp.sin(function(*xs)), 0))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_equals_the_reference_forward_and_backward(name: str) -> None:
    found = jax.jit(KERNELS[name])(Q, KEYS, VALUES)
    expected = reference(Q, KEYS, VALUES)
    assert found.shape == expected.shape and found.dtype == expected.dtype and bool(jnp.isfinite(found).all())
    np.testing.assert_allclose(np.asarray(found)[REAL], np.asarray(expected)[REAL], atol=2e-5)
    (value, grads), (value_too, grads_too) = (slopes(f, Q, KEYS, VALUES) for f in (KERNELS[name], reference))
    assert float(value) == pytest.approx(float(value_too), rel=1e-5)
    for gradient, expected in zip(grads, grads_too, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=5e-5)
        assert np.abs(expected).max() > 0.1 and not np.asarray(gradient)[~REAL].any()


def test_under_a_mesh_each_device_runs_the_kernel_on_its_rows_and_heads() -> None:
    with jax.set_mesh(jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)):
        found = jax.jit(KERNELS["splash"])(Q, KEYS, VALUES)
        shape = found.sharding.shard_shape(found.shape)
    assert shape == (B // 2, S, N // 2, H)
    np.testing.assert_allclose(np.asarray(found)[REAL], np.asarray(reference(Q, KEYS, VALUES))[REAL], atol=2e-5)


def test_for_a_tpu_the_kernel_is_compiled_in_and_no_square_of_scores_is() -> None:
    def lowered(aligned: bool) -> str:
        program = jax.jit(lambda q, k, v: attend(q, k, v, POSITIONS, POSITIONS, "splash", aligned))
        return program.trace(Q, KEYS, VALUES).lower(lowering_platforms=("tpu",)).as_text()

    kernel, xla = lowered(aligned=True), lowered(aligned=False)
    assert "tpu_custom_call" in kernel and not re.search(rf"{S}x{S}xf32", kernel)
    assert "tpu_custom_call" not in xla and re.search(rf"{S}x{S}xf32", xla)  # decoding keeps XLA


@pytest.mark.parametrize(("attention", "kernels"), [("splash", 1), ("xla", 0)])
def test_for_a_tpu_the_kernel_reads_the_prompt_and_decoding_is_xla(attention: Attention, kernels: int) -> None:
    config = dataclasses.replace(CONFIG, head_dim=H, attention=attention, max_positions=512)
    prompts = Prompts(jnp.ones((2, 130), jnp.int32), jnp.ones((2, 130), bool), jnp.arange(2))

    def rollout(key: jax.Array) -> jax.Array:
        policy = Policy({}, zero_value_head(config))
        return generate(init_params(key, config), policy, config, prompts, key, Sampling(16)).tokens

    text = jax.jit(rollout).trace(jax.random.key(0)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == kernels
    assert bool(re.search(r"x130x130xf32", text)) == (kernels == 0)
    assert not re.search(r"x130x146xf32", text)  # the prompt never attends to the slots of the response


def test_one_query_is_left_to_xla_whatever_was_asked_for() -> None:
    q, k, v, one = Q[:, :1], KEYS[:, :1], VALUES[:, :1], POSITIONS[:, :1]
    found = attend(q, k, v, one, one, "splash", aligned=True)
    np.testing.assert_array_equal(found, attend(q, k, v, one, one))


def test_auto_means_the_reference_on_a_cpu() -> None:
    assert implementation_for(Q, KEYS, "auto") == "xla"
    np.testing.assert_array_equal(
        attend(Q, KEYS, VALUES, POSITIONS, POSITIONS, "auto", aligned=True), reference(Q, KEYS, VALUES)
    )


def test_a_kernel_that_cannot_serve_says_why() -> None:
    half = Q.astype(jnp.bfloat16)
    assert implementation_for(half, half, "cudnn") == "cudnn" and implementation_for(Q, KEYS, "splash") == "splash"
    with pytest.raises(ValueError, match="'cudnn' cannot be used.*computes in bfloat16, the activations are float32"):
        implementation_for(Q, KEYS, "cudnn")
    with pytest.raises(ValueError, match="multiple of 8 up to 128; this model's is 63"):
        implementation_for(half[..., :63], half[..., :63], "cudnn")
    with pytest.raises(ValueError, match="multiple of 64; this model's is 48; choose 'auto' or 'xla'"):
        implementation_for(Q[..., :48], KEYS[..., :48], "splash")
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)):
        with pytest.raises(ValueError, match="3 rows do not divide over data x fsdp = 2 devices"):
            implementation_for(Q[:3], KEYS[:3], "splash")
        with pytest.raises(ValueError, match="2 key/value heads do not divide over tensor = 4 devices"):
            implementation_for(Q, KEYS, "splash")
