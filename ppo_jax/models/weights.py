"""The table of our parameters and the Hugging Face tensors that they are made of.

The layout of the parameter tree is in `config.ModelConfig`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_jax import sharding
from ppo_jax.models.config import ModelConfig
from ppo_jax.types import PyTree

# name, part -> that part of a tensor, in the file's layout
ReadPart = Callable[[str, tuple[slice, ...]], np.ndarray]


class Tensor(NamedTuple):
    """One of our parameters and the Hugging Face tensors it is made of."""

    key: str  # "embedding", "layers.q": path in the parameter tree
    name: str  # Hugging Face name; "{}" stands for the layer
    shape: tuple[int, ...]  # ours, of one layer
    transpose: bool  # torch.nn.Linear stores [out, in], we keep [in, out]

    @property
    def stacked(self) -> bool:
        """Whether our array has a leading layer axis."""
        return "{}" in self.name

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape in the Hugging Face file."""
        return self.shape[::-1] if self.transpose else self.shape


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every parameter of a model of this configuration, in the order of the file."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * h, config.num_kv_heads * h
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    table = [
        Tensor("embedding", "model.embed_tokens.weight", (config.vocab_size, d), False),
        Tensor("layers.attention_norm", "model.layers.{}.input_layernorm.weight", (d,), False),
    ]
    linears = [
        ("q", attention + "q_proj", d, query, config.attention_bias),
        ("k", attention + "k_proj", d, key, config.attention_bias),
        ("v", attention + "v_proj", d, key, config.attention_bias),
        ("o", attention + "o_proj", query, d, config.output_bias),
        ("gate", mlp + "gate_proj", d, f, config.mlp_bias),
        ("up", mlp + "up_proj", d, f, config.mlp_bias),
        ("down", mlp + "down_proj", f, d, config.mlp_bias),
    ]
    for ours, theirs, fan_in, fan_out, bias in linears:
        table.append(Tensor(f"layers.{ours}", f"{theirs}.weight", (fan_in, fan_out), True))
        if bias:
            table.append(Tensor(f"layers.{ours}_bias", f"{theirs}.bias", (fan_out,), False))
    table.append(Tensor("layers.mlp_norm", "model.layers.{}.post_attention_layernorm.weight", (d,), False))
    table.append(Tensor("final_norm", "model.norm.weight", (d,), False))
    if not config.tie_embeddings:
        table.append(Tensor("unembedding", "lm_head.weight", (config.vocab_size, d), False))
    return tuple(table)


def gather(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    rename: Callable[[str], str] = str,
    mesh: Mesh | None = None,
    read_part: ReadPart | None = None,
) -> PyTree:
    """Builds the parameter tree, one stacked array at a time; on a mesh, one device's shard of it at a time.

    Args:
      config: shapes and dtype of the result.
      shapes: of every tensor in the file, by its name there; they are compared before anything is read.
      read: name in the file -> the tensor, in Hugging Face's layout. Called once per tensor, so that the host never
        holds more than one of our arrays and one of theirs.
      rename: Hugging Face name -> name in the file.
      mesh: where the arrays go, as `ppo_jax.sharding` says; by default to the default device.
      read_part: reads part of a tensor, for a mesh: the host then holds one shard of one of our arrays at a time, and
        a process reads what its own devices need. Without it a tensor is read whole, and cut.

    Raises:
      ValueError: a tensor is missing, surplus or of the wrong shape; it is named.
    """
    if mesh is not None:
        sharding.check_model(config, sharding.MeshConfig(*(mesh.shape.get(axis, 1) for axis in sharding.AXES)))
    surplus = set(shapes)
    for entry in tensors(config):
        for layer in range(config.num_layers if entry.stacked else 1):
            name = rename(entry.name.format(layer))
            if name not in shapes:
                raise ValueError(f"tensor {name} {entry.hf_shape} is missing")
            if shapes[name] != entry.hf_shape:
                raise ValueError(f"tensor {name} has shape {shapes[name]}, the configuration implies {entry.hf_shape}")
            surplus.discard(name)
    if surplus:
        some = ", ".join(sorted(surplus)[:5]) + (", ..." if len(surplus) > 5 else "")
        raise ValueError(f"{len(surplus)} tensors have no place in the model: {some}")

    params: dict[str, Any] = {"layers": {}}
    for entry in tensors(config):
        parent, _, key = entry.key.rpartition(".")
        (params[parent] if parent else params)[key] = _array(config, entry, read, rename, mesh, read_part)
    return params


def _array(
    config: ModelConfig,
    entry: Tensor,
    read: Callable[[str], np.ndarray],
    rename: Callable[[str], str],
    mesh: Mesh | None,
    read_part: ReadPart | None,
) -> jax.Array:
    """One of our arrays from its tensors."""
    shape = (config.num_layers, *entry.shape) if entry.stacked else entry.shape

    def host(index: tuple[slice, ...], whole: bool) -> np.ndarray:
        """Part `index` of our array."""
        numbers = range(config.num_layers)[index[0]] if entry.stacked else range(1)
        inner = index[1:] if entry.stacked else index
        stack = np.empty((len(numbers), *(s.stop - s.start for s in inner)), jnp.dtype(config.dtype))
        for i, layer in enumerate(numbers):
            name = rename(entry.name.format(layer))
            if whole or read_part is None:
                found = read(name)
            else:
                found = read_part(name, inner[::-1] if entry.transpose else inner)
            stack[i] = found.T if entry.transpose else found
        return stack if entry.stacked else stack[0]

    everything = tuple(slice(0, n) for n in shape)
    if mesh is None:
        # A copy: on the CPU backend jax may otherwise share the numpy buffer.
        return jnp.array(host(everything, whole=True), copy=True)
    to = sharding.parameter_sharding(entry.key, shape, mesh)
    if read_part is None:
        array = host(everything, whole=True)
        return sharding.build(shape, to, lambda index: array[index])
    return sharding.build(shape, to, lambda index: host(index, whole=False))


def leaf(params: PyTree, key: str) -> Any:
    """`leaf(params, "layers.q")` is `params["layers"]["q"]`."""
    for part in key.split("."):
        params = params[part]
    return params


def check_params(config: ModelConfig, params: PyTree) -> None:
    """Raises ValueError when a parameter is missing, surplus or of the wrong shape; it names the parameter."""
    found = {k: v for k, v in params.items() if k != "layers"}
    found |= {f"layers.{k}": v for k, v in params.get("layers", {}).items()}
    for entry in tensors(config):
        shape = (config.num_layers, *entry.shape) if entry.stacked else entry.shape
        if entry.key not in found:
            raise ValueError(f"parameter {entry.key} is missing; the configuration needs it with shape {shape}")
        if tuple(found[entry.key].shape) != shape:
            raise ValueError(f"parameter {entry.key} has shape {tuple(found[entry.key].shape)}, expected {shape}")
        del found[entry.key]
    if found:
        raise ValueError(f"parameters {sorted(found)} do not belong to this configuration")
