"""Known models: their parameter counts are those that the hub shows for the weight files."""

import jax
import pytest

from ppo_jax.cli.plan.known import KNOWN, known_config, short_name
from ppo_jax.models.files.families import config_from_hf, config_to_hf
from ppo_jax.models.layout import init_params

# Elements in the safetensors files of each repository.
COUNTS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_known_model_has_the_published_number_of_parameters() -> None:
    def parameters(name: str) -> int:
        shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), known_config(name)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert {short_name(name): parameters(name) for name in KNOWN} == COUNTS


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_config_is_one_that_a_config_json_can_say(name: str) -> None:
    config = KNOWN[name]
    assert config_from_hf(config_to_hf(config)) == config


def test_names_are_found_in_any_case_and_without_their_owner() -> None:
    whole = known_config("meta-llama/Meta-Llama-3-8B")
    assert known_config("llama-3-8b") == known_config("Llama-3-8B") == known_config("Meta-Llama-3-8B") == whole
    assert whole != known_config("llama-3.1-8b")  # long contexts stretch the rotary frequencies


def test_an_unknown_name_brings_the_nearest_or_all() -> None:
    with pytest.raises(ValueError, match=r"model 'llama3-8b' is neither.*did you mean llama-3-8b\?"):
        known_config("llama3-8b")
    with pytest.raises(ValueError, match="known by name: llama-3-8b, llama-3-70b.*smollm2-1.7b"):
        known_config("gpt-2")
