"""Reward models as LLaMA-Factory saves them: a value head beside a PEFT adapter, or beside a whole language model.

value_head.safetensors     v_head.summary.weight [1, D], v_head.summary.bias [1]
score = weight . h + bias, h: the last hidden state, behind the final norm
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ppo_jax.models.adapters import Lora
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import peft
from ppo_jax.models.layout import linear_shapes, tensors
from ppo_jax.types import PyTree

FILE, PICKLE = "value_head.safetensors", "value_head.bin"
_NAMES = ("v_head.summary.weight", "v_head.summary.bias")
# What an adapter may say, beside its rank and scale, and still be plain LoRA on every layer.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
}


def has_value_head(where: Path) -> bool:
    """Tell whether a directory is a reward model of LLaMA-Factory."""
    return (where / FILE).is_file() or (where / PICKLE).is_file()


def is_adapter(where: Path) -> bool:
    """Tell whether what is below the head is an adapter alone."""
    return (where / peft.CONFIG).is_file() and not (where / "config.json").is_file()


def load_head(where: Path, width: int) -> PyTree:
    """Read the parameters of a RewardHead on hidden states of this width.

    Raises ValueError where the file is a pickle, damaged, or of another width.
    """
    file = where / FILE
    if not file.is_file():
        raise ValueError(
            f"{where / PICKLE} is a pickle, which is not read: train with save_safetensors: true, or write what "
            f"torch.load gives with safetensors.torch.save_file as {FILE}"
        )
    found = {name: array for name, array in _read(file).items() if name in _NAMES}
    if missing := [name for name in _NAMES if name not in found]:
        raise ValueError(f"{file}: tensor {missing[0]} is missing")
    weight, bias = (found[name].astype(np.float32) for name in _NAMES)
    if weight.shape != (1, width) or bias.shape != (1,):
        raise ValueError(f"{file}: {_NAMES[0]} has shape {weight.shape}; on this model it is (1, {width})")
    return {"reward": {"kernel": jnp.asarray(weight.T)}, "gain": jnp.ones(()), "bias": jnp.asarray(bias[0])}


def load_adapter(where: Path, config: ModelConfig) -> PyTree:
    """Read the LoRA adapter of such a reward model, on this base.

    Raises ValueError where it is of another kind or does not fit the base.
    """
    file = where / peft.CONFIG
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    for name, allowed in _PLAIN.items():
        if said.get(name) not in allowed and name in said:
            raise ValueError(f"{file}: {name}={said[name]!r} is not supported: plain LoRA on every layer is")
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ValueError(f"{file}: r={rank!r} and lora_alpha={alpha!r} must be numbers")
    scale = float(alpha / (rank**0.5 if said.get("use_rslora") else rank))
    found, adapter = _read(where / peft.ARRAYS), dict[str, Lora]()
    for name, (inputs, outputs) in linear_shapes(config).items():
        sides = []
        for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            keys = [_key(name, layer, side, config) for layer in range(config.num_layers)]
            present = [key for key in keys if key in found]
            if not present:
                break
            if len(present) < len(keys):
                raise ValueError(f"{where / peft.ARRAYS}: {keys[0]} is in some layers only; it must be in all")
            for key in keys:
                if found[key].shape != shape:
                    raise ValueError(
                        f"{where / peft.ARRAYS}: {key} has shape {found[key].shape}, the base wants {shape}"
                    )
            sides.append(jnp.asarray(np.stack([found.pop(key).astype(np.float32).T for key in keys])))
        if sides:
            adapter[name] = Lora(a=sides[0], b=sides[-1], scale=scale)
    if left := sorted(name for name in found if "lora_" in name):
        raise ValueError(f"{where / peft.ARRAYS}: {left[0]} has no place in the base")
    if not adapter:
        raise ValueError(f"{where / peft.ARRAYS}: there is no LoRA matrix of a linear map of the base")
    return {"lora": adapter}


def _key(name: str, layer: int, side: str, config: ModelConfig) -> str:
    module = next(tensor.hf_name for tensor in tensors(config) if tensor.name == name).removesuffix(".weight")
    return f"base_model.model.{module.format(layer)}.lora_{side}.weight"


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="flax") as handle:  # numpy has no bfloat16
            return {name: np.asarray(handle.get_tensor(name), np.float32) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); copy it again") from error
