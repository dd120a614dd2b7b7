"""The language of 24 words: its sentences, and what a response is worth."""

import jax.numpy as jnp
import numpy as np

from experiments.papers.words import BAD, END, GOOD, WORTH, T, count_worth, first_worth, write_sentences
from ppo_jax.types import Rollout


def test_sentences_follow_the_table_and_stay_ended() -> None:
    chances = np.zeros((3, 3))
    chances[1, 2], chances[2, 1], chances[2, END] = 1.0, 0.75, 0.25  # 1 is followed by 2; 2 by 1, or by the end
    tokens = write_sentences(chances, 4000, np.random.default_rng(0))
    pairs = np.stack([tokens[:, :-1].ravel(), tokens[:, 1:].ravel()], axis=1)
    assert {tuple(pair) for pair in pairs.tolist()} == {(1, 2), (2, 1), (2, END), (END, END)}
    after_two = pairs[pairs[:, 0] == 2, 1]
    assert abs((after_two == END).mean() - 0.25) < 0.02


def test_worth_counts_words_of_the_response_alone() -> None:
    good, bad = 1, 1 + len(GOOD)
    assert WORTH[good] == 1 and WORTH[bad] == -1 and WORTH.sum() == len(GOOD) - len(BAD)
    tokens = np.full((2, 2 + T), good)
    tokens[1, 2] = bad
    mask = np.arange(T) < np.array([[3], [2]])
    unused = jnp.zeros((2, T))
    rollout = Rollout(
        jnp.asarray(tokens), jnp.ones((2, 2), bool), jnp.asarray(mask), unused, unused, unused, mask[:, 0], mask[:, 0]
    )
    assert count_worth(rollout).tolist() == [3, 0]
    assert first_worth(rollout).tolist() == [1, -1]
