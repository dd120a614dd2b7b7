"""Builds the parameter tree from the tensors of a file."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files.foreign import describe_names, describe_value_head
from ppo_jax.models.files.names import Stored, stored_tensors
from ppo_jax.models.layout import Tensor, check_model, nest
from ppo_jax.models.placement import parameter_sharding
from ppo_jax.models.quantised import Quantised, quantise_array
from ppo_jax.parallel import sharding
from ppo_jax.parallel.mesh import AXES, MeshConfig
from ppo_jax.types import PyTree

# name, part -> that part of a tensor, in the file's layout
ReadPart = Callable[[str, tuple[slice, ...]], np.ndarray]


def gather(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    stored: Sequence[Stored] | None = None,
    mesh: Mesh | None = None,
    read_part: ReadPart | None = None,
) -> PyTree:
    """Builds the parameter tree, one stacked array at a time; on a mesh, one device's shard of it at a time.

    Args:
      config: shapes and dtype of the result; what is to be quantised is so as soon as it is read.
      shapes: of every tensor in the file, by its name there; they are compared before anything is read.
      read: name in the file -> the tensor. Called once per tensor and array of ours in it, so that the host never
        holds more than one of our arrays and one of theirs.
      stored: what is in the file; None: what the family's Hugging Face files have.
      mesh: where the arrays go, as `models.placement` says; by default to the default device.
      read_part: reads part of a tensor, for a mesh: the host then holds one shard of one of our arrays at a time, and
        a process reads what its own devices need. Without it a tensor is read whole, and cut.

    Raises:
      ValueError: a tensor is missing, surplus or of the wrong shape; it is named.
    """
    if mesh is not None:
        check_model(config, MeshConfig(*(mesh.shape.get(axis, 1) for axis in AXES)))
    stored, surplus = stored_tensors(config) if stored is None else stored, set(shapes)
    for one in stored:
        shape = one.shape(config)
        for layer in range(config.num_layers if one.stacked else 1):
            name = one.name.format(layer)
            if name not in shapes:
                raise ValueError(f"tensor {name} {shape} is missing{describe_names(name, shapes)}")
            if shapes[name] != shape:
                raise ValueError(f"tensor {name} has shape {shapes[name]}, the configuration implies {shape}")
            surplus.discard(name)
    if surplus:
        some = ", ".join(sorted(surplus)[:5]) + (", ..." if len(surplus) > 5 else "")
        more = describe_value_head(surplus)
        raise ValueError(f"{len(surplus)} tensors have no place in the model: {some}{more}")
    pairs = [(one, tensor) for one in stored for tensor in one.parts]

    def array(one: Stored, tensor: Tensor) -> jax.Array | Quantised:
        return quantise_array(config, tensor, _read_array(config, one, tensor, read, mesh, read_part), mesh)

    return nest({tensor.key: array(one, tensor) for one, tensor in pairs})


def _read_array(
    config: ModelConfig,
    stored: Stored,
    tensor: Tensor,
    read: Callable[[str], np.ndarray],
    mesh: Mesh | None,
    read_part: ReadPart | None,
) -> jax.Array:
    """One of our arrays from its tensors."""
    shape = tensor.shape(config)

    def read_slice(index: tuple[slice, ...], cut: bool) -> np.ndarray:
        """Part `index` of our array; with `cut` no more of its tensors is read."""
        layers = range(config.num_layers)[index[0]] if tensor.stacked else range(1)
        inner = index[1:] if tensor.stacked else index
        stack = np.empty((len(layers), *(s.stop - s.start for s in inner)), jnp.dtype(config.dtype))
        for i, layer in enumerate(layers):
            name = stored.name.format(layer)
            from_file = partial(read_part, name) if cut and read_part is not None else read(name).__getitem__
            stack[i] = stored.read(config, tensor, inner, from_file)
        return stack if tensor.stacked else stack[0]

    everything = tuple(slice(0, n) for n in shape)
    if mesh is None:
        # A copy: on the CPU backend jax may otherwise share the numpy buffer.
        return jnp.array(read_slice(everything, cut=False), copy=True)
    to = parameter_sharding(tensor, config, mesh)
    if read_part is None:
        host = read_slice(everything, cut=False)
        return sharding.build(shape, to, lambda index: host[index])
    return sharding.build(shape, to, lambda index: read_slice(index, cut=True))
