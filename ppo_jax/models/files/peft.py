"""A LoRA adapter in the format of the `peft` library: adapter_config.json and adapter_model.safetensors.

peft computes W x + (lora_alpha / r) B A x with A [r, in] and B [out, r]; ours is W + scale * a @ b with a [in, r] and
b [r, out], so A = a', B = b' and lora_alpha = scale * r.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ppo_jax.models.adapters import first_layer
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import tensor_file
from ppo_jax.models.files.names import module
from ppo_jax.models.layout import tensors
from ppo_jax.parallel.processes import pieces
from ppo_jax.types import PyTree

CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"


def save(path: str | Path, adapter: PyTree, config: ModelConfig, base: str) -> None:
    """Writes the two files into the directory `path`, made if absent.

    Args:
      adapter: of LoRA alone.
      base: what `peft` shall call the base model: a path or a name on the hub.

    Raises:
      ValueError: the adapter replaces whole arrays, which the format cannot say.
    """
    where = Path(path)
    where.mkdir(parents=True, exist_ok=True)
    entries = _entries(adapter, config)
    tensor_file.write(where / ARRAYS, entries, tensor_file.pieces(entries), {"format": "pt"})
    text = json.dumps(settings(adapter, config, base), indent=2) + "\n"
    (where / CONFIG).write_text(text, encoding="utf-8")


def settings(adapter: PyTree, config: ModelConfig, base: str) -> dict[str, Any]:
    """The content of adapter_config.json."""
    _check(adapter)
    names = {name: _module(name, config).rpartition(".")[2] for name in adapter["lora"]}
    ranks = {names[name]: int(lora.a.shape[-1]) for name, lora in adapter["lora"].items()}
    alphas = {names[name]: float(lora.scale) * lora.a.shape[-1] for name, lora in adapter["lora"].items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    first = first_layer(adapter, config)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(names.values()),
        # Without this peft would look for (and make) adapters in every layer.
        "layers_to_transform": list(range(first, config.num_layers)) if first else None,
        "layers_pattern": "layers" if first else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _entries(adapter: PyTree, config: ModelConfig) -> list[tensor_file.Entry]:
    """What is in adapter_model.safetensors: one matrix of one layer at a time, float32."""
    _check(adapter)
    first, entries = first_layer(adapter, config), []
    for name, lora in adapter["lora"].items():
        for side, stack in (("A", lora.a), ("B", lora.b)):
            for i in range(stack.shape[0]):
                there = "base_model.model." + _module(name, config).format(first + i)
                read = functools.partial(lambda stack, i: pieces(stack[i].astype(jnp.float32).T), stack, i)
                shape = tuple(stack.shape[:0:-1])
                entries.append(tensor_file.Entry(f"{there}.lora_{side}.weight", np.dtype(np.float32), shape, read))
    return tensor_file.in_order(entries)


def _module(name: str, config: ModelConfig) -> str:
    """`q` -> `model.layers.{}.self_attn.q_proj`."""
    return module(config, next(tensor for tensor in tensors(config) if tensor.name == name))


def _check(adapter: PyTree) -> None:
    others = sorted(adapter.keys() - {"lora"})
    if others or not adapter.get("lora"):
        reason = f"replaces {', '.join(others)} as a whole" if others else "is empty"
        raise ValueError(f"the peft format holds LoRA alone, and this adapter {reason}; choose the merged format")
