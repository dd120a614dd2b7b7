"""LoRA in the format of the `peft` library, in and out: adapter_config.json and adapter_model.safetensors.

peft computes W x + (lora_alpha / r) B A x with A [r, in] and B [out, r]; ours is W + scale * a @ b with a [in, r] and
b [r, out], so A = a', B = b' and lora_alpha = scale * r; DoRA's magnitudes [out] are the same in both. Where a family's
files hold several of our maps in one, their updates are one too: the a's side by side, and each b and magnitude at the
outputs of its map (the rank is the sum of the ranks).
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ppo_jax.models.adapters import Lora, first_layer
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import tensor_file
from ppo_jax.models.files.names import NAMES, Stored, module, stored_tensors
from ppo_jax.parallel.processes import pieces
from ppo_jax.types import PyTree

CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save(path: str | Path, adapter: PyTree, config: ModelConfig, base: str) -> None:
    """Writes the two files into the directory `path`, made if absent.

    Args:
      adapter: of LoRA alone; with magnitudes (DoRA) on all its maps or on none.
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
    _check(adapter, config)
    maps = {_module(one, config): _parts(one, adapter) for one in _adapted(adapter, config)}
    names = _short_names(maps)
    ranks = {names[m]: sum(int(lora.a.shape[-1]) for lora in parts.values()) for m, parts in maps.items()}
    scales = {names[m]: float(next(iter(parts.values())).scale) for m, parts in maps.items()}
    alphas = {name: scale * ranks[name] for name, scale in scales.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    first = first_layer(adapter, config)
    layers = next(iter(maps)).partition(".{}")[0].rpartition(".")[2]
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
        "layers_pattern": layers if first else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family in NAMES and NAMES[config.family].conv1d,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": _is_dora(adapter),
        "use_rslora": False,
    }


def _adapted(adapter: PyTree, config: ModelConfig) -> Iterator[Stored]:
    """The maps of the file that the adapter touches, in its order."""
    for name in adapter["lora"]:
        one = next(s for s in stored_tensors(config) if any(part.name == name for part in s.parts))
        if next(part.name for part in one.parts if part.name in adapter["lora"]) == name:
            yield one


def _parts(one: Stored, adapter: PyTree) -> dict[str, Lora]:
    return {part.name: adapter["lora"][part.name] for part in one.parts if part.name in adapter["lora"]}


def _module(one: Stored, config: ModelConfig) -> str:
    """`model.layers.{}.self_attn.q_proj`"""
    return module(config, one.parts[0])


def _short_names(modules: Any) -> dict[str, str]:
    """What tells a module among those of a layer: its last name, or its last two (GPT-2 has two `c_proj`)."""
    last = Counter(name.rpartition(".")[2] for name in modules)
    return {name: ".".join(name.split(".")[-1 if last[name.rpartition(".")[2]] == 1 else -2 :]) for name in modules}


def _entries(adapter: PyTree, config: ModelConfig) -> list[tensor_file.Entry]:
    """What is in adapter_model.safetensors: one matrix of one layer at a time, float32."""
    _check(adapter, config)
    first, entries, float32 = first_layer(adapter, config), list[tensor_file.Entry](), np.dtype(np.float32)
    for one in _adapted(adapter, config):
        parts = _parts(one, adapter)
        rank = sum(lora.a.shape[-1] for lora in parts.values())
        count, inputs = next(iter(parts.values())).a.shape[:2]
        outputs = sum(one.widths(config))
        shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
        shapes |= {"lora_magnitude_vector": (outputs,)} if _is_dora(adapter) else {}
        for kind, shape in shapes.items():
            for i in range(count):
                name = f"{PREFIX}{_module(one, config).format(first + i)}.{kind}"
                read = functools.partial(_read_kind, config, one, parts, kind, i)
                entries.append(tensor_file.Entry(name, float32, shape, read))
    return tensor_file.in_order(entries)


def _read_kind(config: ModelConfig, one: Stored, parts: dict[str, Lora], kind: str, i: int) -> tensor_file.Pieces:
    """A, B or the magnitudes of one layer."""
    if kind == "lora_magnitude_vector":
        vector: Array = jnp.zeros(sum(one.widths(config)), jnp.float32)
        for part in one.parts:
            vector = vector.at[one.outputs(config, part)].set(parts[part.name].magnitude[i].astype(jnp.float32))
        return pieces(vector)
    if kind == "lora_A.weight":
        return pieces(jnp.concatenate([lora.a[i].astype(jnp.float32) for lora in parts.values()], axis=-1).T)
    if len(one.parts) == 1:
        return pieces(next(iter(parts.values())).b[i].astype(jnp.float32).T)
    scale, rows = next(iter(parts.values())).scale, []
    for name, lora in parts.items():
        at = one.outputs(config, next(part for part in one.parts if part.name == name))
        whole: Array = jnp.zeros((lora.b.shape[1], sum(one.widths(config))), jnp.float32)
        rows.append(whole.at[:, at].set(lora.b[i].astype(jnp.float32) * (lora.scale / scale)))
    return pieces(jnp.concatenate(rows).T)


def _is_dora(adapter: PyTree) -> bool:
    return any(lora.magnitude is not None for lora in adapter["lora"].values())


def _check(adapter: PyTree, config: ModelConfig) -> None:
    others = sorted(adapter.keys() - {"lora"})
    if others or not adapter.get("lora"):
        reason = f"replaces {', '.join(others)} as a whole" if others else "is empty"
        raise ValueError(f"the peft format holds LoRA alone, and this adapter {reason}; choose the merged format")
    if not _is_dora(adapter):
        return
    for part in (part for one in _adapted(adapter, config) for part in one.parts):
        if part.name not in adapter["lora"] or adapter["lora"][part.name].magnitude is None:
            raise ValueError(
                f"the peft format has use_dora of all maps and of whole modules, and {part.name} has no magnitudes; "
                "choose the merged format"
            )
