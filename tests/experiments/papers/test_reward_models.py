"""Labels that are nested, buckets of some sentences, and ridge regression on words against its primal form."""

import numpy as np

from experiments.movie_reviews import Review
from experiments.papers.reward_models import Corpus, choose_labels, describe, fit_ridge, take
from ppo_jax.train.comparisons import Bucket


def test_more_labels_hold_the_fewer_and_no_others() -> None:
    rows = np.arange(7, 57)
    few, many = (choose_labels(rows, count, seed=3) for count in (5, 20))
    assert list(many[:5]) == list(few) and len(set(many.tolist())) == 20 and set(many.tolist()) <= set(rows.tolist())
    assert list(choose_labels(rows, 5, seed=4)) != list(few)


def test_buckets_of_some_sentences_are_numbered_by_their_place_in_the_choice() -> None:
    tokens = np.arange(12).reshape(4, 3)
    buckets = [
        Bucket(np.array([5, 0]), tokens[:2], tokens[:2] >= 0, tokens[:2].astype(np.float32)),
        Bucket(np.array([2, 9]), tokens[2:], tokens[2:] >= 0, tokens[2:].astype(np.float32)),
    ]
    corpus = Corpus(None, None, buckets, 1, np.zeros((10, 1)), [], np.arange(1), np.arange(1))  # type: ignore[arg-type]
    found = take(corpus, np.array([9, 0, 5]), describe("SmolLM2", "LoRA", 100))
    assert [(b.index.tolist(), b.tokens[:, 0].tolist()) for b in found] == [([2, 1], [0, 3]), ([0], [9])]
    assert found[1].prefix is not None and found[1].prefix[0, 0] == 9
    assert all(b.prefix is None for b in take(corpus, np.array([9]), describe("small", "full", 100)))


def test_ridge_is_that_of_the_normal_equations() -> None:
    texts = ["good film", "bad film", "good good plot", "a bad bad plot"]
    train = [
        Review(i, rating, text) for i, (rating, text) in enumerate(zip((2.0, -2.0, 1.5, -1.0), texts, strict=True))
    ]
    test = [Review(9, 0.0, "Good plot, unknown"), Review(10, 0.0, "bad")]
    words = ["a", "bad", "film", "good", "plot"]
    x, z = (np.array([[w in r.text.lower() for w in words] for r in part], float) for part in (train, test))
    x[:, 0], z[:, 0] = [0, 0, 0, 1], 0  # the word, not the letter
    y = np.array([r.rating for r in train])
    expected = z @ np.linalg.solve(x.T @ x + 0.5 * np.eye(5), x.T @ (y - y.mean()))
    np.testing.assert_allclose(fit_ridge(train, test, l2=0.5), expected, rtol=1e-4)
