"""Texts of different lengths: buckets that lose none, features, kept prefixes, and batches of what is rated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.models.adapters import first_layer
from ppo_jax.train.comparisons import bucket_texts, head_scores, keep_prefix, rated_batches, text_features
from ppo_jax.train.reward import comparison_loss
from tests.models.tiny import CONFIG
from tests.train.reward_toy import BASE, PAD, TRUNK, role, scores_of, texts
from tests.train.toy import assert_close


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=20))
def test_every_text_is_in_exactly_one_bucket_the_shortest_that_fits(rows: list[list[int]]):
    lengths = [12, 3, 7]
    buckets = bucket_texts(rows, lengths, PAD)
    found = {}
    for bucket in buckets:
        assert bucket.tokens.shape == bucket.mask.shape
        for place, tokens, mask in zip(bucket.index, bucket.tokens, bucket.mask, strict=True):
            assert place not in found
            found[int(place)] = tokens[mask].tolist()
            assert mask.tolist() == sorted(mask, reverse=True), "padding on the right"
            assert len(mask) == min(length for length in lengths if length >= mask.sum())
    assert found == dict(enumerate(rows))
    sizes = [bucket.tokens.shape[1] for bucket in buckets]
    assert len(set(sizes)) == len(sizes), "one program a length"


@pytest.mark.parametrize(("rows", "sizes"), [([[1, 2], []], "0 to 2"), ([[1], [1, 2, 3, 4, 5]], "1 to 5")])
def test_texts_that_fit_no_bucket_are_refused(rows: list[list[int]], sizes: str):
    with pytest.raises(ValueError, match=rf"texts have {sizes} tokens; allowed are 1 to 4"):
        bucket_texts(rows, [2, 4], PAD)


def test_features_come_in_the_order_of_the_texts_and_a_kept_prefix_changes_nothing():
    rows = texts()
    buckets = bucket_texts(rows, [4, 9], PAD)
    assert len(buckets) == 2
    layers = first_layer(role().adapter, TRUNK)
    assert layers == 1
    kept = list(keep_prefix(BASE, TRUNK, buckets, layers, batch_size=4))
    assert [bucket.prefix.shape for bucket in kept] == [(*b.tokens.shape, CONFIG.hidden_size) for b in buckets]
    plain = text_features(BASE, role(), TRUNK, buckets, batch_size=4)
    np.testing.assert_allclose(text_features(BASE, role(), TRUNK, kept, 4, layers), plain, rtol=1e-4, atol=1e-5)
    scores = head_scores(role().head, plain)
    for i in (0, 5, 10):  # one text at a time, without padding
        tokens = jnp.asarray([rows[i]], jnp.int32)
        alone = scores_of(BASE, role(), TRUNK, tokens, jnp.ones(tokens.shape, bool))[0]
        assert scores[i] == pytest.approx(float(alone), rel=1e-4, abs=1e-5)


def test_a_prefix_of_no_layers_is_no_prefix():
    buckets = bucket_texts(texts(), [9], PAD)
    assert list(keep_prefix(BASE, TRUNK, buckets, 0, 4)) == buckets


def test_the_loss_from_kept_prefixes_is_the_loss():
    layers = first_layer(role().adapter, TRUNK)
    buckets = bucket_texts(texts(4), [9], PAD)
    kept = list(keep_prefix(BASE, TRUNK, buckets, layers, 4))
    ratings = np.array([1.0, 2.0, 3.0, 4.0])
    (plain,), (shared,) = (rated_batches(b, ratings, 4, np.random.default_rng(0)) for b in (buckets, kept))
    loss = jax.jit(jax.value_and_grad(comparison_loss, has_aux=True), static_argnums=2)
    assert_close(loss(role(), BASE, TRUNK, shared), loss(role(), BASE, TRUNK, plain), rtol=1e-3, atol=1e-5)


@given(st.integers(1, 23), st.integers(2, 6), st.integers(0, 99))
def test_batches_hold_every_text_and_compare_no_filler(count: int, size: int, seed: int):
    """Every pair of *different* texts of a batch that the ratings order is compared exactly once."""
    rng = np.random.default_rng(seed)
    rows = [[i + 1] * int(rng.integers(1, 5)) for i in range(count)]  # a text's first token names it
    ratings = rng.integers(0, 4, count).astype(float)
    batches = rated_batches(bucket_texts(rows, [2, 4], PAD), ratings, size, rng)
    seen: list[int] = []
    for batch in batches:
        names = np.asarray(batch.tokens)[:, 0] - 1
        better = np.asarray(batch.better)
        assert len(names) == size and not np.any(batch.margin)
        pairs = [(names[i], names[j]) for i, j in zip(*np.nonzero(better), strict=True)]
        members = set(names.tolist())
        assert sorted(pairs) == sorted((a, b) for a in members for b in members if ratings[a] > ratings[b])
        seen += members
    assert sorted(seen) == list(range(count))


def test_every_epoch_cuts_other_batches():
    buckets = bucket_texts(texts(20), [9], PAD)
    rng = np.random.default_rng(0)
    first, second = (rated_batches(buckets, np.arange(20.0), 4, rng) for _ in range(2))
    assert any(np.any(a.tokens != b.tokens) for a, b in zip(first, second, strict=True))


def test_features_of_equal_shapes_are_compiled_once(caplog: pytest.LogCaptureFixture):
    """A second measurement, of a role with other values, reuses the program of the first."""
    buckets = bucket_texts(texts(), [9], PAD)
    first = text_features(BASE, role(), TRUNK, buckets, batch_size=4)
    list(keep_prefix(BASE, TRUNK, buckets, 1, 4))
    other = jax.tree.map(lambda x: 2 * x, role())
    caplog.clear()
    with jax.log_compiles():
        assert not np.array_equal(first, text_features(BASE, other, TRUNK, buckets, batch_size=4))
        list(keep_prefix(BASE, TRUNK, buckets, 1, 4))
    assert not [record for record in caplog.records if "ompiling" in record.getMessage()]
