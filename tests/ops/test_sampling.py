"""Sampling: frequencies against probabilities, the support of the filters, and whose log-probs come back."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.ops.sampling import _pick, filter_logits, penalise_repetition, sample

DRAWS = 10_000
jit_sample = jax.jit(lambda key, logits, temperature: sample(key, logits, temperature))
jit_filtered_sample = jax.jit(lambda *arguments: sample(*arguments))  # top_k and top_p traced: one program for all
jit_filter = jax.jit(filter_logits)


def draw(logits, temperature=1.0, **filters):
    """DRAWS independent tokens from one row of logits, and their log-probs."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    if filters:
        return jit_filtered_sample(
            jax.random.key(0), rows, temperature, filters.get("top_k", 0), filters.get("top_p", 1.0)
        )
    return jit_sample(jax.random.key(0), rows, temperature)


def p_value(tokens, probabilities):
    """Chi-square test that tokens were drawn with these probabilities (all expected counts large enough)."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    probabilities = np.asarray(probabilities, np.float64)
    return stats.chisquare(counts, probabilities / probabilities.sum() * DRAWS).pvalue


# 7: less than one block of the cumulative sum; 256: one; 600: three, the last one partly padding.
@pytest.mark.parametrize("vocab", [7, 256, 600])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_probabilities(vocab, temperature):
    logits = jax.random.normal(jax.random.key(vocab), (vocab,)) * 0.5
    tokens, _ = draw(logits, temperature)
    assert p_value(tokens, jax.nn.softmax(logits / temperature)) > 1e-3
    assert p_value(tokens, jax.nn.softmax(logits / (temperature * 1.5))) < 1e-6  # the test can tell


def test_the_tail_behind_a_dominant_token_is_sampled_faithfully():
    # Half of the mass on token 0, the other half spread evenly over the 1,000 others: 10 bins of 100.
    logits = np.append(np.log(1000), np.zeros(1000))
    tokens = np.asarray(draw(logits)[0])
    assert abs((tokens == 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(DRAWS)
    counts = np.bincount((tokens[tokens > 0] - 1) // 100, minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_per_row_keys_give_independent_rows_and_equal_single_calls():
    keys, logits = jax.random.split(jax.random.key(0), 6), jax.random.normal(jax.random.key(1), (6, 50))
    tokens, logprobs = jax.jit(jax.vmap(sample, in_axes=(0, 0, None)))(keys, logits, 1.0)
    for row in range(6):
        token, logprob = jit_sample(keys[row], logits[row], 1.0)
        assert token == tokens[row] and float(logprob) == pytest.approx(float(logprobs[row]), abs=1e-6)


def test_defect_3_rows_draw_differently_and_keys_matter():
    logits = jnp.zeros((100, 1000))
    a, again, b = (np.asarray(jit_sample(jax.random.key(seed), logits, 1.0)[0]) for seed in (0, 0, 1))
    assert (a == again).all() and (a != b).mean() > 0.9
    assert len(set(a)) > 80  # 100 draws from 1000: about 95 different ones


def test_both_levels_of_the_draw_have_their_own_randomness():
    # With one shared uniform, the block would determine the place inside the block.
    tokens = np.asarray(draw(jnp.zeros(512))[0])
    assert abs(np.corrcoef(tokens // 256, tokens % 256)[0, 1]) < 0.04


@pytest.mark.parametrize("temperature", [0, 0.0, jnp.array(0.0)])
def test_greedy_takes_the_lowest_largest_token_with_untempered_log_probs(temperature):
    logits = jnp.array([[1.0, 3.0, 2.0, 3.0], [-5.0, -7.0, -6.0, -5.0]])
    tokens, logprobs = sample(jax.random.key(0), logits, temperature)
    np.testing.assert_array_equal(tokens, [1, 0])
    np.testing.assert_allclose(logprobs, token_logprobs(logits, tokens, 1.0), atol=1e-6)
    np.testing.assert_allclose(logprobs, token_logprobs(logits, tokens, temperature), atol=1e-6)


def test_greedy_over_many_blocks_is_argmax():
    logits = jax.random.normal(jax.random.key(0), (100, 1000))
    np.testing.assert_array_equal(jit_sample(jax.random.key(1), logits, 0.0)[0], logits.argmax(-1))


def test_traced_and_constant_temperature_draw_the_same():
    logits = jax.random.normal(jax.random.key(0), (50, 300))
    constant = jax.jit(lambda k, x: sample(k, x, 0.7))(jax.random.key(1), logits)
    np.testing.assert_array_equal(jit_sample(jax.random.key(1), logits, 0.7)[0], constant[0])


def test_changing_the_temperature_does_not_recompile():
    compiled = jax.jit(lambda *arguments: sample(*arguments))
    for temperature in (0.0, 0.7, 1.0):
        compiled(jax.random.key(0), jnp.zeros((2, 5)), temperature)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    ("settings", "support"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.6}, [1, 3]),  # 0.4 does not reach 0.6, 0.4 + 0.3 does
        ({"top_p": 0.75}, [1, 2, 3]),
        ({"top_p": 0.0}, [1]),  # always at least one token
        ({"top_k": 3, "top_p": 0.75}, [1, 3]),  # of the three, renormalised: 0.444 + 0.333 = 0.778 reaches 0.75
        ({"top_k": 5, "top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ],
)
def test_filters_by_hand_and_defect_20_log_probs_of_the_filtered_distribution(settings, support):
    probabilities = np.array([0.05, 0.4, 0.2, 0.3, 0.05])
    tokens, logprobs = draw(np.log(probabilities), **settings)
    kept = np.where(np.isin(np.arange(5), support), probabilities, 0) / probabilities[support].sum()
    assert sorted(set(tokens.tolist())) == support
    np.testing.assert_allclose(np.exp(logprobs), kept[tokens], rtol=1e-5)
    if len(support) > 1:
        counts = np.bincount(tokens, minlength=5)
        assert stats.chisquare(counts[support], kept[support] * DRAWS).pvalue > 1e-3


def test_filters_act_on_the_tempered_distribution():
    # At temperature 1/2, (0.5, 0.3, 0.2) becomes (25, 9, 4) / 38: 0.658 alone reaches 0.6.
    tokens, _ = draw(np.log([0.5, 0.3, 0.2]), temperature=0.5, top_p=0.6)
    assert set(tokens.tolist()) == {0}


@pytest.mark.parametrize("filters", [(3, 1.0), (0, 0.5), (3, 0.5)])
def test_constant_filters_keep_what_traced_ones_keep(filters):
    logits = jax.random.normal(jax.random.key(0), (4, 12))
    constant = jax.jit(lambda x: filter_logits(x, *filters))(logits)
    np.testing.assert_array_equal(constant, jit_filter(logits, *filters))
    assert (np.asarray(constant) < -1e29).any()


def test_ties_keep_the_exact_number_and_the_lower_ids():
    uniform = jnp.zeros((1, 8))
    assert (np.asarray(jit_filter(uniform, 3, 1.0)) == 0).tolist() == [[True] * 3 + [False] * 5]
    assert (np.asarray(jit_filter(uniform, 0, 0.5)) == 0).tolist() == [[True] * 4 + [False] * 4]


def reference_filter(logits, top_k, top_p):
    """By sorting, in float64: which tokens are kept, and how far each running mass is from p."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    weights = np.exp(logits[order].astype(np.float64) - logits.max())
    mass_before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
    kept = order if top_p >= 1 else order[mass_before < top_p]
    return set(kept.tolist()) | {int(order[0])}, np.abs(mass_before - top_p).min()


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        12,
        elements=st.one_of(st.integers(-3, 3).map(float), st.floats(-30, 30, width=32, allow_subnormal=False)),
    ),
    st.integers(0, 15),
    st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
)
def test_filter_agrees_with_sorting(logits, top_k, top_p):
    expected, distance = reference_filter(logits, top_k, top_p)
    assume(top_p == 1 or distance > 1e-4)  # at an exact boundary rounding decides
    kept = np.asarray(jit_filter(logits, top_k, top_p)) > -1e29
    assert set(np.flatnonzero(kept).tolist()) == expected
    np.testing.assert_array_equal(jit_filter(logits, top_k, top_p)[kept], logits[kept])


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, 16, elements=st.one_of(st.just(0.0), st.floats(0, 1, width=32))),
    st.sampled_from([0.0, 0.25, 0.5, 1 - 2**-23, 1.0]),
)
def test_an_impossible_token_is_never_picked(weights, uniform):
    assume(weights.max() > 1e-30)
    assert weights[int(jax.jit(_pick)(weights, jnp.float32(uniform)))] > 0


def test_a_cumulative_sum_that_rounds_as_on_accelerators_still_picks_no_impossible_token(monkeypatch):
    # Summed as a tree, the cumulative weight can rise where the weight is 0. Aim the uniforms exactly there.
    tree = lambda x, axis: jax.lax.associative_scan(jnp.add, x, axis=axis)
    weights = jax.random.uniform(jax.random.key(0), (2000, 64)) * jax.random.bernoulli(
        jax.random.key(1), 0.5, (2000, 64)
    )
    cumulative = np.asarray(tree(weights, -1))
    row, place = np.nonzero((np.asarray(weights)[:, 1:] == 0) & (np.diff(cumulative) > 0))
    assert len(row) > 100
    monkeypatch.setattr(jnp, "cumsum", tree)
    picked = jax.jit(lambda w, u: _pick(w, u))(weights[row], cumulative[row, place] / cumulative[row, -1])
    assert (np.asarray(weights)[row, picked] > 0).all()


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_no_filter_compiles_to_no_search():
    def names(**filters):
        jaxpr = jax.make_jaxpr(lambda k, x, t: sample(k, x, t, **filters))(jax.random.key(0), jnp.zeros((2, 9)), 0.7)
        return set(primitives(jaxpr.jaxpr))

    search = {"sort", "top_k", "while", "scan"}
    assert not names() & search
    assert not names(top_k=0, top_p=1.0) & search
    assert names(top_k=3) & search


@pytest.mark.parametrize("filters", [None, (0, 1.0), (2, 1.0), (0, 0.5)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_defect_21_a_nan_logit_shows_and_the_token_stays_in_the_vocabulary(filters, temperature, nan):
    logits = jnp.array([0.0, nan, 1.0])
    if filters:
        token, logprob = jit_filtered_sample(jax.random.key(0), logits, temperature, *filters)
    else:
        token, logprob = jit_sample(jax.random.key(0), logits, temperature)
    assert 0 <= int(token) < 3 and np.isnan(logprob)


def test_bfloat16_logits():
    tokens, logprobs = sample(jax.random.key(0), jnp.zeros((4, 6), jnp.bfloat16), 1.0)
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, -np.log(6), rtol=1e-6)


# Probabilities 0.5, 0.3, 0.15, 0.05: at least 0.4 * 0.5 = 0.2 keeps the first two.
@pytest.mark.parametrize(("min_p", "kept"), [(0.0, 4), (0.1, 4), (0.11, 3), (0.4, 2), (0.61, 1), (1.0, 1)])
def test_min_p_by_hand(min_p, kept):
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    filtered = filter_logits(logits, 0, 1.0, min_p)
    np.testing.assert_array_equal(filtered > -1e29, np.arange(4) < kept)
    np.testing.assert_array_equal(jax.jit(filter_logits)(logits, 0, 1.0, min_p), filtered)


def test_repetition_penalty_by_hand():
    logits, seen = jnp.array([3.0, -3.0, 3.0, -3.0]), jnp.array([True, True, False, False])
    np.testing.assert_allclose(penalise_repetition(logits, seen, 1.5), [2.0, -4.5, 3.0, -3.0])


def test_filters_pass_gradients_through_what_they_keep():
    """What is kept is not differentiated; the log-prob of a kept token is."""
    logits = jnp.array([2.0, 1.0, 0.0, -1.0])
    gradient = jax.grad(lambda x: token_logprobs(filter_logits(x, 2, 0.99, 0.01), jnp.int32(1)))(logits)
    p = np.exp([2.0, 1.0]) / np.exp([2.0, 1.0]).sum()
    np.testing.assert_allclose(gradient, [-p[0], 1 - p[1], 0, 0], rtol=1e-5, atol=1e-7)
