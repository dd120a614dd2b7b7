"""The table of our parameters and the Hugging Face tensors that they are made of.

The layout of the parameter tree is in `config.ModelConfig`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import Tensor, check_model, tensors
from ppo_jax.models.placement import parameter_sharding
from ppo_jax.parallel import sharding
from ppo_jax.parallel.mesh import AXES, MeshConfig
from ppo_jax.types import PyTree

# name, part -> that part of a tensor, in the file's layout
ReadPart = Callable[[str, tuple[slice, ...]], np.ndarray]


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
        check_model(config, MeshConfig(*(mesh.shape.get(axis, 1) for axis in AXES)))
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
    to = parameter_sharding(entry.key, shape, mesh)
    if read_part is None:
        array = host(everything, whole=True)
        return sharding.build(shape, to, lambda index: array[index])
    return sharding.build(shape, to, lambda index: host(index, whole=False))
