"""An adapter of the `peft` library: merged into its base, the model that somebody's LoRA makes, or beside it."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ppo_jax.data.disk import is_out_of_memory
from ppo_jax.models.adapters import Lora, gain, merge
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files.fields import count, flag, number
from ppo_jax.models.files.hub import read_json
from ppo_jax.models.files.names import Stored, module, stored_tensors
from ppo_jax.models.files.peft import ARRAYS, CONFIG, PREFIX
from ppo_jax.types import PyTree

NEW = "Give it as --model: merged into its base, with a new LoRA on it"
MERGE = "Merge it, in Python by `merge_and_unload()` of the loaded PeftModel, save that, and give its directory"
# Fields that change what the adapter computes, and the values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "megatron_config": (),
    "use_qalora": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}


class _Maps(NamedTuple):
    """The updates of one map in its layers: {layer: array}."""

    a: dict[int, np.ndarray]  # [in, r]
    b: dict[int, np.ndarray]  # [r, out]
    scale: dict[int, float]
    magnitude: dict[int, np.ndarray]  # [out]: DoRA


class _Module(NamedTuple):
    """The update of one module of the file."""

    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]
    scale: float
    magnitude: np.ndarray | None


def is_adapter(where: Path) -> bool:
    """Whether a directory holds a peft adapter and no model beside it."""
    return (where / CONFIG).is_file() and not (where / "config.json").is_file()


def base_of(where: Path) -> str:
    """What adapter_config.json calls the base: a path or a name on the hub. Raises ValueError where it says nothing."""
    name = read_json(where / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where / CONFIG}: base_model_name_or_path={name!r} does not name the base; write it there")
    beside = where.parent / name
    return str(beside) if not Path(name).exists() and beside.is_dir() else name


def merge_into(config: ModelConfig, params: PyTree, where: Path) -> PyTree:
    """The parameters of the base with the adapter of the directory `where` in them.

        W + s B A,  s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023)
        m * (W + s B A) / |W + s B A|, norms of each output's inputs, with `use_dora` (Liu et al. 2024)

    Ranks and alphas may differ by module (`rank_pattern`, `alpha_pattern`). What else changes the model is refused.

    Raises:
      ValueError: a file is damaged, does not fit the base, or says what is not supported; file and field are named.
    """
    maps = _read(config, where)
    lowest = min(layer for one in maps.values() for layer in one.a)
    lora = {name: _stack(one._replace(magnitude={}), config, lowest) for name, one in maps.items()}
    merged = merge(params, {"lora": lora}, config)
    for name, one in maps.items():
        if one.magnitude:
            merged["layers"][name] = _with_magnitudes(merged["layers"][name], one.magnitude)
    return merged


def read_lora(config: ModelConfig, where: Path) -> PyTree:
    """The adapter of the directory `where` beside its base, as in `merge_into`, s in B: of all layers, DoRA of its own.

    Raises ValueError as `merge_into`, and for DoRA that leaves out layers which its other maps have.
    """
    maps = _read(config, where)
    lowest = _lowest_of_dora(maps, config, where, MERGE)
    return {"lora": {name: _stack(one, config, lowest or 0) for name, one in maps.items()}}


def read_trained(config: ModelConfig, where: Path) -> PyTree:
    """The adapter of the directory `where` as it is gone on with: its own A, B, ranks and scales, in the layers it has.

    A layer between them that it leaves out gets A = B = 0, whose gradients are 0: it stays as it is. DoRA leaves none
    out: magnitudes there would be trained.

    Raises ValueError as `merge_into`, and for what is no stack of updates of our maps.
    """
    maps = _read(config, where)
    lowest, lora = _lowest_of_dora(maps, config, where, NEW), {}
    if lowest is None:
        lowest = min(layer for one in maps.values() for layer in one.a)
    for name, one in maps.items():
        stored = next(s for s in stored_tensors(config) if any(part.name == name for part in s.parts))
        fused = ", ".join(part.name for part in stored.parts)
        ranks = {a.shape[1] for a in one.a.values()}
        if len(stored.parts) > 1:
            raise ValueError(f"{where}: {module(config, stored.parts[0])} holds {fused}, an update each here. {NEW}")
        if len(ranks) > 1 or len(set(one.scale.values())) > 1:
            raise ValueError(f"{where}: rank or scale of {name} differs by layer; one is had for all. {NEW}")
        scale = next(iter(one.scale.values()))
        whole = _stack(one._replace(scale=dict.fromkeys(one.scale, 1.0)), config, lowest)
        lora[name] = dataclasses.replace(whole, scale=scale)
    return {"lora": lora}


def _lowest_of_dora(maps: dict[str, _Maps], config: ModelConfig, where: Path, advice: str) -> int | None:
    """The first layer of a DoRA adapter, whose maps all have all layers from there up; None for plain LoRA."""
    if not any(one.magnitude for one in maps.values()):
        return None
    lowest = min(layer for one in maps.values() for layer in one.a)
    for name, one in maps.items():
        if absent := sorted(set(range(lowest, config.num_layers)) - set(one.a)):
            raise ValueError(
                f"{where}: use_dora=True, and {name} has no update in layers {absent}: DoRA is had of one range of "
                f"layers up to the last one, the same for all maps. {advice}"
            )
    return lowest


def _read(config: ModelConfig, where: Path) -> dict[str, _Maps]:
    """Read and check both files of a directory: {our map: its updates}."""
    try:
        settings = read_json(where / CONFIG)
        for field, neutral in NEUTRAL.items():
            if settings.get(field) is not None and settings[field] not in neutral:
                raise ValueError(f"{field}={settings[field]!r} is not supported. {MERGE}")
        return _read_maps(config, settings, _read_arrays(where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_arrays(where: Path) -> dict[str, np.ndarray]:
    file = where / ARRAYS
    if not file.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which is not read)" if (where / "adapter_model.bin").exists() else ""
        )
        raise ValueError(f"{ARRAYS} is missing{pickled}. {MERGE}")
    try:
        with safe_open(file, framework="numpy") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{ARRAYS} is not a readable safetensors file ({error}); copy it again") from error


def _read_maps(config: ModelConfig, settings: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, _Maps]:
    """{our map: its updates}; every tensor of the file has its place."""
    maps, left = dict[str, _Maps](), set(arrays)
    for one in stored_tensors(config):
        for layer in range(config.num_layers) if one.parts[0].linear else ():
            path = module(config, one.parts[0]).format(layer)
            names = [f"{PREFIX}{path}.{kind}" for kind in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]
            if names[0] not in arrays or names[1] not in arrays:
                continue
            left -= {*names, f"{names[2]}.weight"}
            a, b = (arrays[name].astype(np.float32) for name in names[:2])
            magnitude = arrays.get(names[2], arrays.get(f"{names[2]}.weight"))
            _check_shapes(config, one, path, a, b, magnitude)
            _add(maps, config, one, layer, _Module(a, b, _scale(settings, path, a.shape[0]), magnitude))
    if left:
        some = ", ".join(sorted(left)[:3]) + (", ..." if len(left) > 3 else "")
        raise ValueError(f"{len(left)} tensors have no place in a {config.family} model: {some}. {MERGE}")
    if not maps:
        raise ValueError(f"{ARRAYS} holds no update of a {config.family} model")
    dora = flag(settings, "use_dora")
    if any(one.magnitude.keys() != (one.a.keys() if dora else set()) for one in maps.values()):
        raise ValueError(f"use_dora={settings.get('use_dora')!r} contradicts the magnitudes in {ARRAYS}")
    return maps


def _check_shapes(
    config: ModelConfig, one: Stored, path: str, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray | None
) -> None:
    inputs, outputs = one.parts[0].shape(config)[1], sum(one.widths(config))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
        needed = f"the base needs (r, {inputs}) and ({outputs}, r)"
        raise ValueError(f"{path} has A {a.shape} and B {b.shape}; {needed}. Is this its base?")
    if magnitude is not None and magnitude.size != outputs:
        raise ValueError(f"{path} has magnitudes {magnitude.shape}; the base needs ({outputs},). Is this its base?")


def _scale(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """By what B A of a module is multiplied."""
    said, alpha = count(settings, "r", 8), number(settings, "lora_alpha", 8.0)
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(field) or {}
        if not isinstance(pattern, Mapping):
            raise ValueError(f"{field}={pattern!r} is not an object")
        try:
            key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", path)), None)
        except re.error as error:
            raise ValueError(f"{field} has a key that is no regular expression: {error}") from error
        if key is not None and field == "rank_pattern":
            said = count(pattern, key)
        elif key is not None:
            alpha = number(pattern, key)
    if said != rank:
        raise ValueError(f"{path} has rank {rank}, but {CONFIG} says {said}")
    return alpha / (math.sqrt(rank) if flag(settings, "use_rslora") else rank)


def _add(maps: dict[str, _Maps], config: ModelConfig, one: Stored, layer: int, found: _Module) -> None:
    """The updates of our maps that this module of the file holds."""
    for part in one.parts:
        at = one.outputs(config, part)
        mine = maps.setdefault(part.name, _Maps({}, {}, {}, {}))
        mine.a[layer], mine.b[layer], mine.scale[layer] = found.a.T, found.b.T[:, at], found.scale
        if found.magnitude is not None:
            mine.magnitude[layer] = found.magnitude.reshape(-1).astype(np.float32)[at]


def _stack(one: _Maps, config: ModelConfig, lowest: int) -> Lora:
    """The updates of the layers from `lowest` up, scales in b; where there is none, zeros, which also fill up ranks."""
    rank = max(a.shape[1] for a in one.a.values())
    (inputs, _), (_, outputs) = next(iter(one.a.values())).shape, next(iter(one.b.values())).shape
    a = np.zeros((config.num_layers - lowest, inputs, rank), np.float32)
    b = np.zeros((config.num_layers - lowest, rank, outputs), np.float32)
    for layer, own in one.a.items():
        a[layer - lowest, :, : own.shape[1]] = own
        b[layer - lowest, : own.shape[1]] = one.b[layer] * one.scale[layer]
    if not one.magnitude:
        return Lora(jnp.asarray(a), jnp.asarray(b), scale=1.0)
    magnitude = np.stack([one.magnitude[layer] for layer in range(lowest, config.num_layers)])
    return Lora(jnp.asarray(a), jnp.asarray(b), scale=1.0, magnitude=jnp.asarray(magnitude))


def _with_magnitudes(stack: Any, magnitudes: dict[int, np.ndarray]) -> Any:
    """Each output's weights as long as its magnitude."""
    for layer, magnitude in magnitudes.items():
        whole = stack[layer].astype(jnp.float32)
        whole *= gain(jnp.asarray(magnitude), jnp.linalg.norm(whole, axis=0))
        stack = stack.at[layer].set(whole.astype(stack.dtype))
    return stack
