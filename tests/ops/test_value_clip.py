"""Rounding must not look like clipping."""

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.ops.losses import clipped_value_loss


def test_a_value_inside_its_range_never_counts_as_clipped() -> None:
    # old + (v - old) differs from v by an ulp for many float32 pairs; the clipped value must be v itself.
    old, noise, target = jax.random.normal(jax.random.key(0), (3, 4096))
    values, returns = 3 * noise, old + target
    loss, metrics = clipped_value_loss(values, old, returns, jnp.ones(4096, bool), 100.0)
    assert float(metrics["value_clip_fraction"][0]) == 0
    np.testing.assert_array_equal(loss, 0.5 * metrics["value_error"][0] / 4096)
    assert bool(jnp.any(old + (values - old) != values))  # the example has teeth
