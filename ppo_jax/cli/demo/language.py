"""A language of 24 words, and a random model that speaks it: what `ppo-jax demo` and the smoke runs train."""

import hashlib
from typing import Any

import jax

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import init_params
from ppo_jax.models.pretrained import Model

GOOD = ("great", "lovely", "brilliant", "funny", "superb", "moving")
BAD = ("awful", "boring", "terrible", "dull", "stupid", "bad")
OTHER = ("the", "film", "plot", "cast", "is", "was", "and", "a", "very", "script", "really", "quite")
END = "<end>"


def model(seed: int = 0) -> Model:
    """Four random layers over the toy vocabulary."""
    words = [END, *GOOD, *BAD, *OTHER]
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
    return Model(name, config, params, make_tokenizer(words), hashlib.sha256(name.encode()).hexdigest())


def make_tokenizer(words: list[str]) -> Any:
    """A token per word, the first of which ends a text; words stand between blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0])
