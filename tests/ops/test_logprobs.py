"""Log-probs and entropies against torch; the chunked form against the plain one, and its memory."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppo_jax.ops.kl import kl_full
from ppo_jax.ops.logprobs import (
    entropy,
    hidden_kl,
    hidden_logprobs,
    hidden_logprobs_and_entropy,
    tempered,
    token_logprobs,
)
from ppo_jax.ops.sampling import filter_logits

B, T, D, V = 3, 7, 5, 11
KEYS = jax.random.split(jax.random.key(0), 4)
LOGITS = 3 * jax.random.normal(KEYS[0], (B, T, V))
TOKENS = jax.random.randint(KEYS[1], (B, T), 0, V)
HIDDEN = jax.random.normal(KEYS[2], (B, T, D))
UNEMBEDDING = jax.random.normal(KEYS[3], (V, D))


def as_torch(x):
    return torch.from_numpy(np.array(x))


def test_token_logprobs_by_hand():
    # softmax(ln 1, ln 3) = (1/4, 3/4); at temperature 1/2 the logits double: (1, 9) / 10.
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 3.0]]))
    np.testing.assert_allclose(token_logprobs(logits, jnp.array([0, 1])), np.log([0.25, 0.75]), rtol=1e-6)
    np.testing.assert_allclose(token_logprobs(logits, jnp.array([0, 1]), 0.5), np.log([0.1, 0.9]), rtol=1e-6)


def test_entropy_by_hand():
    # Uniform over 4: ln 4. (1/2, 1/4, 1/4): 1/2 ln 2 + 2/4 ln 4 = 1.5 ln 2. Excluded tokens add nothing.
    logits = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0.0]]))
    np.testing.assert_allclose(entropy(logits), [np.log(4), 1.5 * np.log(2)], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: entropy(x).sum())(logits)).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_agrees_with_torch(temperature):
    logits = as_torch(LOGITS) / temperature
    expected = torch.log_softmax(logits, -1).gather(-1, as_torch(TOKENS).long()[..., None])[..., 0]
    np.testing.assert_allclose(token_logprobs(LOGITS, TOKENS, temperature), expected, atol=1e-5)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    np.testing.assert_allclose(entropy(LOGITS, temperature), expected, atol=1e-5)


def test_gradients_agree_with_torch():
    logits = as_torch(LOGITS).requires_grad_()
    torch.log_softmax(logits / 0.7, -1).gather(-1, as_torch(TOKENS).long()[..., None]).sum().backward()
    ours = jax.grad(lambda x: token_logprobs(x, TOKENS, 0.7).sum())(LOGITS)
    np.testing.assert_allclose(ours, logits.grad, atol=1e-5)
    logits.grad = None
    torch.distributions.Categorical(logits=logits / 0.7).entropy().sum().backward()
    np.testing.assert_allclose(jax.grad(lambda x: entropy(x, 0.7).sum())(LOGITS), logits.grad, atol=1e-5)


def test_probabilities_sum_to_one():
    every = token_logprobs(jnp.broadcast_to(LOGITS[0, 0], (V, V)), jnp.arange(V), 0.3)
    assert float(jnp.exp(every).sum()) == pytest.approx(1, abs=1e-6)


def test_large_logits_do_not_overflow():
    assert float(token_logprobs(jnp.array([1e4, 1e4 - 1]), jnp.array(0))) == pytest.approx(-np.log1p(np.exp(-1)))


def test_defect_5_traced_and_constant_temperature_agree_exactly():
    traced = jax.jit(token_logprobs)(LOGITS, TOKENS, 0.7)
    constant = jax.jit(lambda x, t: token_logprobs(x, t, 0.7))(LOGITS, TOKENS)
    np.testing.assert_allclose(traced, constant, atol=1e-6)


@pytest.mark.parametrize("zero", [0, 0.0, jnp.array(0.0)])
def test_temperature_zero_means_the_untempered_distribution(zero):
    np.testing.assert_array_equal(tempered(LOGITS, zero), LOGITS)


def test_defect_21_a_nan_logit_shows():
    logits = jnp.array([0.0, jnp.nan, 1.0])
    assert np.isnan(token_logprobs(logits, jnp.array(0))) and np.isnan(entropy(logits))


@pytest.mark.parametrize("chunk", [None, 0, 1, 4, 7, 20, 21])
def test_hidden_logprobs_equals_token_logprobs(chunk):
    @jax.jit
    def compute(hidden, unembedding, temperature):
        arguments = hidden, unembedding, TOKENS, temperature
        return hidden_logprobs(*arguments, chunk=chunk), hidden_logprobs_and_entropy(*arguments, chunk=chunk)

    logits = HIDDEN @ UNEMBEDDING.T
    ours, both = compute(HIDDEN, UNEMBEDDING, 0.7)
    np.testing.assert_allclose(ours, token_logprobs(logits, TOKENS, 0.7), atol=2e-6)
    np.testing.assert_allclose(both[0], ours, atol=2e-6)
    np.testing.assert_allclose(both[1], entropy(logits, 0.7), atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 4, 7])
def test_hidden_logprobs_has_the_gradients_of_token_logprobs(chunk):
    weights = jax.random.normal(jax.random.key(9), (2, B, T))

    def chunked(hidden, unembedding, temperature):
        logprobs, entropies = hidden_logprobs_and_entropy(hidden, unembedding, TOKENS, temperature, chunk=chunk)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropies)

    def plain(hidden, unembedding, temperature):
        logits = jnp.einsum("btd,vd->btv", hidden, unembedding) / temperature
        return jnp.sum(weights[0] * token_logprobs(logits, TOKENS) + weights[1] * entropy(logits))

    arguments = (HIDDEN, UNEMBEDDING, jnp.array(0.7))
    ours, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arguments) for f in (chunked, plain))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_any_leading_shape():
    ours = hidden_logprobs(HIDDEN[0, 0], UNEMBEDDING, TOKENS[0, 0])
    np.testing.assert_allclose(ours, hidden_logprobs(HIDDEN, UNEMBEDDING, TOKENS)[0, 0], rtol=1e-5)


def test_bfloat16_inputs_give_float32_logits():
    # 256.5 + ... needs more than bfloat16's 8 bits: logits rounded to bfloat16 would make these two equal.
    hidden, unembedding = jnp.ones((1, 2), jnp.bfloat16), jnp.array([[256.0, 0.5], [256.0, 0.0]], jnp.bfloat16)
    ours = hidden_logprobs(hidden, unembedding, jnp.array([1]))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, -np.log1p(np.exp(0.5)), rtol=1e-5)


def sizes(jaxpr):
    """Element counts of everything a jaxpr computes, nested ones included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


def hlo_sizes(function, *arguments):
    """Element counts of every array in the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    for shape in re.findall(r"(?:f32|bf16|s32|pred)\[([\d,]+)\]", text):
        yield int(np.prod([int(n) for n in shape.split(",")]))


@pytest.mark.parametrize("differentiate", [False, True])
def test_no_array_holds_the_logits_of_all_positions(differentiate):
    rows, steps, width, vocab, chunk = 4, 16, 2, 50, 8
    hidden, unembedding = jnp.ones((rows, steps, width)), jnp.ones((vocab, width))
    tokens = jnp.zeros((rows, steps), jnp.int32)

    def program(chunk):
        def f(hidden, unembedding):
            logprobs, entropies = hidden_logprobs_and_entropy(hidden, unembedding, tokens, 0.7, chunk=chunk)
            return logprobs.sum() + entropies.sum()

        return jax.grad(f, argnums=(0, 1)) if differentiate else f

    for measure in (
        lambda f: sizes(jax.make_jaxpr(f)(hidden, unembedding).jaxpr),
        lambda f: hlo_sizes(f, hidden, unembedding),
    ):
        assert max(measure(program(None))) >= rows * steps * vocab  # the measure sees it when it is there
        assert max(measure(program(chunk))) <= chunk * vocab


def test_log_probs_alone_do_not_pay_for_the_entropy():
    def primitives(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)

    def exponentials(function, chunk):
        jaxpr = jax.make_jaxpr(lambda h, u: function(h, u, TOKENS, chunk=chunk))(HIDDEN, UNEMBEDDING).jaxpr
        return list(primitives(jaxpr)).count("exp")

    for chunk, (function, count) in itertools.product(
        (None, 4), ((hidden_logprobs, 1), (hidden_logprobs_and_entropy, 3))
    ):
        assert exponentials(function, chunk) == count, (chunk, function)


@pytest.mark.parametrize("chunk", [0, 4])
def test_hidden_kl_is_that_of_the_logits(chunk):
    """Value and gradient, at a temperature, in pieces that do not divide the 21 positions."""
    reference, table = HIDDEN[::-1] * 0.5, UNEMBEDDING[::-1]

    def from_logits(hidden):
        return kl_full(hidden @ UNEMBEDDING.T / 0.7, reference @ table.T / 0.7)

    def from_hidden(hidden):
        return hidden_kl(hidden, UNEMBEDDING, reference, table, 0.7, chunk)

    np.testing.assert_allclose(from_hidden(HIDDEN), from_logits(HIDDEN), rtol=1e-4, atol=1e-6)
    left, right = (jax.grad(lambda h, f=f: jnp.sum(jnp.sin(f(h))))(HIDDEN) for f in (from_hidden, from_logits))
    np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)


def test_a_filter_in_the_loss_is_that_of_the_sampler():
    """Log-probs and entropy of the filtered distribution; a token outside it has none to speak of."""
    logits = tempered(HIDDEN @ UNEMBEDDING.T, 0.7)
    kept = filter_logits(logits, 3)
    keep = lambda x: filter_logits(x, 3)
    for chunk in (0, 4):
        logprobs, entropies = hidden_logprobs_and_entropy(HIDDEN, UNEMBEDDING, TOKENS, 0.7, chunk, keep)
        inside = np.asarray(jnp.take_along_axis(kept, TOKENS[..., None], -1)[..., 0]) > -1e29
        assert 0 < inside.sum() < inside.size
        np.testing.assert_allclose(logprobs[inside], token_logprobs(kept, TOKENS)[inside], rtol=1e-5, atol=1e-6)
        assert (np.asarray(logprobs)[~inside] < -1e29).all()
        np.testing.assert_allclose(entropies, entropy(kept), rtol=1e-5, atol=1e-6)
