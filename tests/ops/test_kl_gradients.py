"""Which estimator may stand where: expected gradients over all actions of a softmax policy, without sampling.

For pi = softmax(theta) over 8 actions and a reference q, with d = log pi - log q and s = grad log pi (E[s] = 0):

    grad KL(pi || q) = E[d s]
    k1 as reward      E[k1 s] = E[d s]                                    the gradient
    k2 as loss        E[grad d^2 / 2] = E[d s]                            the gradient
    k3 as loss        E[grad (exp(-d) - 1 + d)] = E[(1 - q / pi) s]
                      = -sum_a q_a s_a = grad KL(q || pi)                 of the other divergence
    k1 as loss        E[grad d] = E[s] = 0                                nothing at all
    k3 as reward      E[k3 s] = E[d s] + sum_a q_a s_a                    off by grad KL(q || pi)

(Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL".)
"""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.ops.kl import kl_full, kl_penalty, response_k2
from ppo_jax.ops.losses import clipped_policy_loss

ACTIONS = 8
logits = hnp.arrays(np.float32, ACTIONS, elements=st.floats(-3, 3, width=32))
many = settings(max_examples=50, deadline=None)


def as_reward(theta: jax.Array, ref: jax.Array, kind: str) -> jax.Array:
    """E[gradient of PPO's loss whose advantage is minus the estimate], for a fresh sample of every action."""
    logq = jax.nn.log_softmax(ref)

    def one(theta: jax.Array, action: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(theta)[action]
        penalty = kl_penalty(logp, logq[action], kind)
        return clipped_policy_loss(logp, logp, -penalty, jnp.ones((), bool), 0.2, 0.2)[0]

    return jax.nn.softmax(theta) @ jax.vmap(jax.grad(one), (None, 0))(theta, jnp.arange(ACTIONS))


def as_loss(theta: jax.Array, ref: jax.Array, kind: str) -> jax.Array:
    """E[gradient of the estimate], the estimate being differentiated as it stands."""
    logq = jax.nn.log_softmax(ref)

    def one(theta: jax.Array, action: jax.Array) -> jax.Array:
        return kl_penalty(jax.nn.log_softmax(theta)[action], logq[action], kind)

    return jax.nn.softmax(theta) @ jax.vmap(jax.grad(one), (None, 0))(theta, jnp.arange(ACTIONS))


exact = jax.jit(jax.grad(kl_full))
reverse = jax.jit(jax.grad(lambda theta, ref: kl_full(ref, theta)))
reward_k1, reward_k3 = (jax.jit(lambda a, b, k=kind: as_reward(a, b, k)) for kind in ("k1", "k3"))
loss_k1, loss_k2, loss_k3 = (jax.jit(lambda a, b, k=kind: as_loss(a, b, k)) for kind in ("k1", "k2", "k3"))


@many
@given(logits, logits)
def test_k1_as_reward_and_k2_as_loss_have_the_gradient_of_the_divergence(theta, ref):
    expected = exact(theta, ref)
    for function in (reward_k1, loss_k2):
        np.testing.assert_allclose(function(theta, ref), expected, rtol=1e-3, atol=2e-5)


@many
@given(logits, logits)
def test_k3_as_loss_has_the_gradient_of_the_other_divergence(theta, ref):
    np.testing.assert_allclose(loss_k3(theta, ref), reverse(theta, ref), rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(loss_k1(theta, ref), 0, atol=1e-6)
    expected = exact(theta, ref) - reverse(theta, ref)
    np.testing.assert_allclose(reward_k3(theta, ref), expected, rtol=1e-3, atol=1e-4)


def test_k3_is_biased_both_as_loss_and_as_reward():
    """Two actions, pi = (1/2, 1/2), q = (1/4, 3/4). With s_1 = (1/2, -1/2) = -s_2 for the two logits:

    grad KL(pi || q) = 1/2 ln(2) s_1 + 1/2 ln(2/3) s_2 = 1/2 ln(3) s_1 = (0.274653, -0.274653)
    grad KL(q || pi) = -(1/4 s_1 + 3/4 s_2) = 1/2 s_1 = (0.25, -0.25)
    k3 as reward: the difference, (0.024653, -0.024653): a tenth of what it should be
    """
    theta = jnp.full(ACTIONS, -1e9).at[:2].set(0.0)
    ref = jnp.full(ACTIONS, -1e9).at[:2].set(jnp.log(jnp.array([0.25, 0.75])))
    sign = np.array([1, -1])
    np.testing.assert_allclose(exact(theta, ref)[:2], 0.274653 * sign, rtol=1e-5)
    np.testing.assert_allclose(loss_k2(theta, ref)[:2], 0.274653 * sign, rtol=1e-5)
    np.testing.assert_allclose(reward_k1(theta, ref)[:2], 0.274653 * sign, rtol=1e-5)
    np.testing.assert_allclose(loss_k3(theta, ref)[:2], 0.25 * sign, rtol=1e-5)
    np.testing.assert_allclose(reward_k3(theta, ref)[:2], 0.024653 * sign, rtol=1e-3)


def test_k2_of_whole_responses_has_the_gradient_of_their_kl_and_k2_of_tokens_has_not():
    """Two tokens of three, all nine responses enumerated: the second token's distribution depends on the first."""
    rng = np.random.default_rng(3)
    first, second = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(3, 3)))
    reference = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(3, 3)))

    def logprobs(params):
        one, two = jax.nn.log_softmax(params[0]), jax.nn.log_softmax(params[1], axis=-1)
        return jnp.stack([jnp.repeat(one, 3), two.reshape(-1)], axis=1)  # [9, 2]

    policy, mask = (first, second), jnp.ones((9, 2), bool)
    drawn = jnp.exp(jnp.sum(logprobs(policy), axis=1))  # how often each response is sampled; not differentiated

    def exact(params):
        ours = jnp.sum(logprobs(params), axis=1)
        return jnp.sum(jnp.exp(ours) * (ours - jnp.sum(logprobs(reference), axis=1)))

    wanted = jax.grad(exact)(policy)
    whole = jax.grad(lambda p: jnp.sum(drawn[:, None] * response_k2(logprobs(p), logprobs(reference), mask)))(policy)
    tokens = jax.grad(lambda p: jnp.sum(drawn[:, None] * kl_penalty(logprobs(p), logprobs(reference), "k2")))(policy)
    for found, expected in zip(whole, wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(tokens[1], wanted[1], atol=1e-6)  # the last token has no later ones
    assert np.abs(tokens[0] - wanted[0]).max() > 0.01


def test_k2_of_responses_ignores_what_no_mask_covers():
    logprobs = jnp.asarray([[0.5, jnp.nan], [1.0, 2.0]])
    mask = jnp.asarray([[True, False], [True, True]])
    np.testing.assert_allclose(response_k2(logprobs, jnp.zeros((2, 2)), mask), [[0.125, 0], [2.25, 2.25]])
