"""The toy world: sentences whose rating counts words, a tokenizer that reads them, a model that runs."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import smoke
from ppo_jax.models.transformer import apply, positions_from_mask


def test_reviews_are_distinct_and_the_same_for_the_same_seed():
    reviews = smoke.reviews(100, seed=1)
    assert reviews == smoke.reviews(100, seed=1)
    assert reviews != smoke.reviews(100, seed=2)
    assert len({review.text for review in reviews}) == len({review.id for review in reviews}) == 100
    assert all(6 <= len(review.text.split()) <= 14 for review in reviews)


def test_rating_is_good_words_less_bad_ones_with_a_little_noise():
    for review in smoke.reviews(100):
        words = review.text.split()
        points = sum(word in smoke.GOOD for word in words) - sum(word in smoke.BAD for word in words)
        assert -4 <= review.rating <= 4
        assert abs(review.rating - np.clip(points, -4, 4)) < 1.0


def test_tokenizer_has_one_token_a_word_and_reads_it_back():
    model = smoke.model()
    text = smoke.reviews(1)[0].text
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.split())
    assert model.decode(np.array(ids)) == text
    (end,) = model.stop_ids
    assert model.decode(np.array([*ids, end])) == text
    assert len(model.tokenizer) == model.config.vocab_size


def test_models_of_two_seeds_are_told_apart():
    first, again, other = smoke.model(0), smoke.model(0), smoke.model(1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first.params, again.params)
    assert all(jax.tree.leaves(same))
    assert bool((first.params["embedding"] != other.params["embedding"]).any())


def test_the_base_is_undecided_but_not_indifferent():
    """PPO needs something to explore and something to leave: entropies between none and all."""
    model = smoke.model()
    ids = jnp.asarray([model.tokenizer("the film was very", add_special_tokens=False)["input_ids"]])
    hidden = apply(model.params, {}, model.config, ids, positions_from_mask(jnp.ones(ids.shape, bool)))
    logs = jax.nn.log_softmax(hidden[0] @ model.params["embedding"].T / 0.7)
    entropy = -(jnp.exp(logs) * logs).sum(-1)
    assert float(entropy.min()) > 0.3 and float(entropy.max()) < np.log(model.config.vocab_size) - 0.2
