"""The tiny model that training files of LLaMA-Factory are run on, with the tokenizer of its golden rows."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import hf
from tests.models.tiny import random_params
from tests.small import SMALL

FIXTURE = Path(__file__).parents[2] / "fixtures" / "llamafactory"
DATA = FIXTURE / "data"
REWARD = FIXTURE / "reward"


def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FIXTURE)


def base_config(tokenizer: Any) -> ModelConfig:
    ends = (int(tokenizer.eos_token_id),)
    return dataclasses.replace(SMALL, vocab_size=len(tokenizer), max_positions=512, eos_token_ids=ends)


def save_base(path: Path) -> None:
    """Write the model that the reward model of the fixture was trained on."""
    tokenizer = load_tokenizer()
    config = base_config(tokenizer)
    hf.save(path, config, random_params(config), tokenizer)
