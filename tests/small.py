"""A tiny model that reads letters, as the tests of stages and commands train it."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import hf
from ppo_jax.models.layout import init_params
from ppo_jax.models.pretrained import Model
from tests.data.tokenizer import EOS, make_tokenizer
from tests.models.tiny import random_params

SMALL = ModelConfig(
    vocab_size=32,  # what the tokenizer has
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    eos_token_ids=(EOS,),
)
SAMPLED = dataclasses.replace(SMALL, intermediate_size=32)  # of the models that commands sample from


def small_model(config: ModelConfig = SMALL) -> Model:
    """Random parameters under an invented name and fingerprint."""
    return Model("random", config, random_params(config), make_tokenizer(), "f" * 64)


def save_sampled(path: Path, seed: int = 0) -> None:
    """A model directory whose next tokens are neither sure nor all alike."""
    params = jax.tree.map(lambda x: 4 * x, init_params(jax.random.key(seed), SAMPLED))
    hf.save(path, SAMPLED, params, make_tokenizer())


def write_stage_files(folder: Path, config: ModelConfig = SMALL) -> None:
    """`model`, and sft.jsonl, pairs.jsonl and ratings.jsonl for `ppo-jax sft`, `dpo` and `reward`."""
    model = small_model(config)
    hf.save(folder / "model", config, model.params, model.tokenizer)
    prompts = ["".join(word) for length in (1, 2, 3) for word in itertools.product("cdefg", repeat=length)][:40]
    records = {
        "sft": [{"prompt": prompt, "response": "ab" * (1 + i % 3)} for i, prompt in enumerate(prompts)],
        "pairs": [
            {"prompt": prompt, "chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + i % 2)}
            for i, prompt in enumerate(prompts)
        ],
        "ratings": [{"response": f"{prompt} {'ab'[i % 2]}", "rating": i % 2} for i, prompt in enumerate(prompts)],
    }
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
