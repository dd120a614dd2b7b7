"""KL estimators: values by hand, their expectations against the exact divergence, torch, and the controller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppo_jax.ops.kl import adaptive_kl, kl_full, kl_penalty, linear_kl

KINDS = ["k1", "k2", "k3", "abs"]
LOGITS, REF = 2 * jax.random.normal(jax.random.key(0), (2, 6, 13))


# d = log(1/2) - log(1/4) = ln 2 = 0.693147:  k2 = d^2/2 = 0.240227,  k3 = 1/2 - 1 + ln 2 = 0.193147
# d = log(1/4) - log(1/2) = -ln 2:            k2 the same,             k3 = 2 - 1 - ln 2   = 0.306853
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.693147, -0.693147]),
        ("k2", [0.240227, 0.240227]),
        ("k3", [0.193147, 0.306853]),
        ("abs", [0.693147, 0.693147]),
    ],
)
def test_kl_penalty_by_hand(kind, expected):
    logprobs, ref = jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.25, 0.5]))
    np.testing.assert_allclose(kl_penalty(logprobs, ref, kind), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_policies_have_no_penalty(kind):
    x = jnp.array([-1.0, -20.0])
    np.testing.assert_array_equal(kl_penalty(x, x, kind), 0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_exact_divergence(kind):
    # E_{v ~ policy}[estimate] is a finite sum over the vocabulary.
    logp, logq = jax.nn.log_softmax(LOGITS), jax.nn.log_softmax(REF)
    expected = jnp.sum(jnp.exp(logp) * kl_penalty(logp, logq, kind), axis=-1)
    np.testing.assert_allclose(expected, kl_full(LOGITS, REF), rtol=1e-4)


@pytest.mark.parametrize("kind", ["k2", "k3", "abs"])
def test_never_negative(kind):
    logp, logq = jax.nn.log_softmax(LOGITS), jax.nn.log_softmax(REF)
    assert (np.asarray(kl_penalty(logp, logq, kind)) >= 0).all()


def test_k3_keeps_precision_near_zero():
    # d = 1e-4: exp(-d) - 1 + d = d^2/2 = 5e-9; the direct formula loses it to rounding in exp(-d).
    assert float(kl_penalty(jnp.array(1e-4), jnp.array(0.0), "k3")) == pytest.approx(5e-9, rel=0.02)


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3, abs"):
        kl_penalty.__wrapped__(jnp.zeros(1), jnp.zeros(1), "k4")  # past the annotation, which tests also check


def test_kl_full_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3) = 0.346574 - 0.202733
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    assert float(kl_full(p, q)) == pytest.approx(0.143841, rel=1e-5)


def test_kl_full_agrees_with_torch():
    p, q = (torch.distributions.Categorical(logits=torch.from_numpy(np.array(x))) for x in (LOGITS, REF))
    np.testing.assert_allclose(kl_full(LOGITS, REF), torch.distributions.kl_divergence(p, q), rtol=1e-4)


def test_kl_full_of_a_filtered_policy_is_finite():
    # p = (1, 0), q = (1/2, 1/2): ln 2, from 1 ln 2 + 0 ln 0.
    value, gradient = jax.value_and_grad(lambda x: kl_full(x, jnp.zeros(2)))(jnp.array([0.0, -jnp.inf]))
    assert float(value) == pytest.approx(np.log(2)) and np.isfinite(gradient).all()


def test_adaptive_kl_over_a_sequence():
    # n / horizon = 256 / 10000 = 0.0256.
    #   9.0 nats: 9/6 - 1 = 0.5, clipped to 0.2:   0.2       * (1 + 0.2 * 0.0256) = 0.201024
    #   3.0 nats: -0.5, clipped to -0.2:           0.201024  * (1 - 0.00512)      = 0.1999947571
    #   6.6 nats: 0.1, not clipped:                0.1999948 * (1 + 0.00256)      = 0.2005067437
    #   6.0 nats: on target, unchanged
    coef, seen = 0.2, []
    for observed in (9.0, 3.0, 6.6, 6.0):
        coef = adaptive_kl(coef, observed, 256, 6.0, 10_000.0)
        seen.append(float(coef))
    np.testing.assert_allclose(seen, [0.201024, 0.1999947571, 0.2005067437, 0.2005067437], rtol=1e-6)


@pytest.mark.parametrize("n", [5, 5.5, 100])
def test_the_adaptive_coefficient_never_turns_negative_or_stays_at_0(n: float):
    """With n / horizon = 5 and an error of -0.2 the paper's factor is 0."""
    coef = adaptive_kl(0.2, 0.0, n, 6.0, 1.0)
    assert float(coef) == pytest.approx(0.02)
    assert float(adaptive_kl(0.2, 0.0, 4.0, 6.0, 1.0)) == pytest.approx(0.04)  # below that the formula as it is


def test_adaptive_kl_is_traceable():
    traced = jax.jit(adaptive_kl)(0.2, 9.0, 256, 6.0, 10_000.0)
    assert float(traced) == pytest.approx(0.201024)


# 0.2 towards 0.05 in 4 steps: -0.0375 a step, then it stays.
@pytest.mark.parametrize(("step", "expected"), [(0, 0.2), (1, 0.1625), (2, 0.125), (4, 0.05), (9, 0.05)])
def test_linear_coefficient_by_hand(step, expected):
    assert float(linear_kl(0.2, 0.05, step, 4)) == pytest.approx(expected, rel=1e-6)
    assert float(jax.jit(linear_kl)(0.2, 0.05, step, 4.0)) == pytest.approx(expected, rel=1e-6)
