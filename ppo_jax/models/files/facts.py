"""What decides the function that a model's weights compute, as it stands in the files of what was trained on it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ppo_jax.models.config import ModelConfig, RopeScaling

# Fields of a ModelConfig that say how it is run or where it stops, not what its weights compute.
_CHOICES = ("dtype", "quantise", "remat", "attention", "max_positions", "bos_token_id", "eos_token_ids", "tokenless")


def model_facts(config: ModelConfig) -> dict[str, Any]:
    """What of a ModelConfig decides the function that its weights compute, as JSON values."""
    return {name: value for name, value in _as_json(dataclasses.asdict(config)).items() if name not in _CHOICES}


def complete_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a file of any version: flags that an older one did not know were off in its models."""
    whole = {name: value for name, value in _defaults(ModelConfig).items() if name not in _CHOICES} | dict(facts)
    if isinstance(whole.get("rope_scaling"), dict):
        whole["rope_scaling"] = _defaults(RopeScaling) | whole["rope_scaling"]
    return whole


def _defaults(record: type) -> dict[str, Any]:
    fields = dataclasses.fields(record)
    return {field.name: _as_json(field.default) for field in fields if field.default is not dataclasses.MISSING}


def _as_json(value: Any) -> Any:
    """The value as JSON gives it back."""
    if isinstance(value, dict):
        return {name: _as_json(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value
