"""A world small enough for a test: rated sentences of a toy grammar, a tokenizer of their words, a random model."""

import numpy as np

from experiments.movie_reviews import Review
from ppo_jax.cli.demo.language import BAD, END, GOOD, OTHER, model

__all__ = ["BAD", "END", "GOOD", "OTHER", "model", "reviews"]


def reviews(count: int = 240, seed: int = 0) -> list[Review]:
    """Random sentences of 6 to 14 words; the rating is the good words less the bad ones, with a little noise."""
    rng = np.random.default_rng(seed)
    words = np.array(GOOD + BAD + OTHER)
    found: dict[str, Review] = {}
    while len(found) < count:
        chosen = rng.choice(words, size=rng.integers(6, 15))
        rating = float(np.isin(chosen, GOOD).sum() - np.isin(chosen, BAD).sum() + rng.normal(0, 0.2))
        text = " ".join(chosen)
        found.setdefault(text, Review(len(found), float(np.clip(rating, -4, 4)), text))
    return list(found.values())
