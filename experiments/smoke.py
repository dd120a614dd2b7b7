"""A world small enough for a test: rated sentences of a toy grammar, a tokenizer of their words, a random model."""

import hashlib

import jax
import numpy as np
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from experiments.movie_reviews import Review
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import init_params
from ppo_jax.models.pretrained import Model

GOOD = ("great", "lovely", "brilliant", "funny", "superb", "moving")
BAD = ("awful", "boring", "terrible", "dull", "stupid", "bad")
OTHER = ("the", "film", "plot", "cast", "is", "was", "and", "a", "very", "script", "really", "quite")
END = "<end>"


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


def model(seed: int = 0) -> Model:
    """Four random layers over the toy vocabulary."""
    words = [END, *GOOD, *BAD, *OTHER]
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    config = ModelConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    params = jax.tree.map(lambda x: 4 * x, init_params(jax.random.key(seed), config))
    name = f"random-{seed}"
    return Model(name, config, params, fast, hashlib.sha256(name.encode()).hexdigest())
