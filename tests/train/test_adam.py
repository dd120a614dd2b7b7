"""Adam by hand, one and two steps, with epsilon where PyTorch and where TensorFlow 1 put it; and torch itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.train.optimizer import OptimizerConfig, make_optimizer

# Gradients 0.5, then -0.25; b1 = 0.9, b2 = 0.999; eps = 0.1, so large that its place shows.
#
# step 1   m = 0.1 * 0.5 = 0.05                       v = 0.001 * 0.25 = 0.00025
#   PyTorch        m_hat = 0.05 / 0.1 = 0.5, v_hat = 0.00025 / 0.001 = 0.25
#                  0.5 / (0.5 + 0.1)                                           = 0.833333
#   TensorFlow 1   sqrt(0.001) / 0.1 = 0.3162278, sqrt(v) = 0.0158114
#                  0.3162278 * 0.05 / (0.0158114 + 0.1)                        = 0.136527
# step 2   m = 0.9 * 0.05 - 0.1 * 0.25 = 0.02         v = 0.999 * 0.00025 + 0.001 * 0.0625 = 0.00031225
#   PyTorch        m_hat = 0.02 / 0.19 = 0.1052632, v_hat = 0.00031225 / 0.001999 = 0.1562031
#                  0.1052632 / (0.3952254 + 0.1)                               = 0.212556
#   TensorFlow 1   sqrt(0.001999) / 0.19 = 0.2353170, sqrt(v) = 0.0176706
#                  0.2353170 * 0.02 / (0.0176706 + 0.1)                        = 0.0399959
GOLDEN = {"pytorch": (0.833333, 0.212556), "tensorflow1": (0.136527, 0.0399959)}


@pytest.mark.parametrize("placement", GOLDEN)
def test_two_steps_by_hand(placement) -> None:
    optimizer = make_optimizer(OptimizerConfig(eps=0.1, eps_placement=placement))
    state = optimizer.init(jnp.zeros(()))
    for gradient, expected in zip((0.5, -0.25), GOLDEN[placement], strict=True):
        direction, state = optimizer.update(jnp.asarray(gradient), state, jnp.zeros(()))
        assert float(direction) == pytest.approx(expected, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6), st.sampled_from([1e-8, 1e-5, 1e-2]))
def test_the_placements_differ_by_the_correction_of_epsilon(gradients, eps) -> None:
    """sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps) = m_hat / (sqrt(v_hat) + eps / sqrt(1 - b2^t))."""
    config = OptimizerConfig(eps=eps, eps_placement="tensorflow1")
    optimizer, m, v = make_optimizer(config), 0.0, 0.0
    state = optimizer.init(jnp.zeros(()))
    for t, g in enumerate(gradients, start=1):
        direction, state = optimizer.update(jnp.asarray(g, jnp.float32), state, jnp.zeros(()))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        correction = np.sqrt(1 - 0.999**t)
        expected = m / (1 - 0.9**t) / (np.sqrt(v) / correction + eps / correction)
        assert float(direction) == pytest.approx(expected, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float) -> None:
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=5).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32)
    ours, theirs = jnp.asarray(start), torch.tensor(start, requires_grad=True)
    optimizer = make_optimizer(OptimizerConfig(eps=1e-3, weight_decay=weight_decay))
    state, rate = optimizer.init(ours), 0.05
    adam = torch.optim.AdamW([theirs], lr=rate, eps=1e-3, weight_decay=weight_decay)
    for gradient in gradients:
        direction, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = ours - rate * direction
        theirs.grad = torch.tensor(gradient)
        adam.step()
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_both_placements_keep_the_same_kind_of_state() -> None:
    """So a run may be continued under the other one, and checkpoints look alike."""
    params = {"w": jnp.ones((2, 3))}
    states = [make_optimizer(OptimizerConfig(eps_placement=p)).init(params) for p in ("pytorch", "tensorflow1")]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert isinstance(states[1], optax.ScaleByAdamState)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"b2": 1.0}, r"b2=1.0 must lie in \[0, 1\)"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_bad_settings_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)
