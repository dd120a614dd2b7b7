"""A frozen base in few bits: its stacks of linear maps as codes with scales, all else as it was (Dettmers et al. 2023).

    w ~ scale * code

`int8` has a scale for each output of each layer, `int4` one for each 32 inputs of it. The codes are what lies in
memory; a layer's are widened where the scan over layers multiplies by them. Nothing of it is trained: gradients reach
adapters through it.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ppo_jax.data.extras import install_line
from ppo_jax.models.config import ModelConfig, Quantise
from ppo_jax.models.layout import Tensor, leaf, nest, tensors
from ppo_jax.models.placement import create
from ppo_jax.types import PyTree

BLOCK = 32  # inputs that share a scale in int4


@flax.struct.dataclass
class Quantised:
    """A stack of linear maps [L, in, out], or one of them without L, in few bits."""

    codes: PyTree  # [L, in, out], int8 or int4; tree functions also put shapes and shardings here
    scales: PyTree  # [L, blocks, out], float32; block b is of the inputs from b * in / blocks

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array it stands for."""
        return tuple(self.codes.shape)


def quantise(weight: Float[Array, "L I O"], kind: Quantise) -> Quantised:
    """Round to the nearest code: each number moves by at most half a step, the scale of its output (and block).

    Raises ValueError where qwix is missing, or the inputs do not fall into blocks.
    """
    try:
        import qwix
    except ImportError:
        raise ValueError(f"--compute.quantise {kind} needs qwix: {install_line('quantise')}") from None
    inputs = weight.shape[1]
    if kind == "int4" and inputs % BLOCK:
        raise ValueError(
            f"--compute.quantise int4 takes inputs by {BLOCK}, and a map of this model has {inputs}; int8 takes any"
        )
    tiles = {1: BLOCK} if kind == "int4" else None
    found = qwix.quantize(weight.astype(jnp.float32), jnp.dtype(kind), channelwise_axes=(0, 2), tiled_axes=tiles)
    return Quantised(found.qvalue, found.scale)


def quantise_array(config: ModelConfig, tensor: Tensor, array: Array, mesh: Mesh | None) -> Array | Quantised:
    """An array of the base as the configuration keeps it: a stack of linear maps in few bits, others as they are."""
    if config.quantise == "none" or not tensor.linear:
        return array

    def make(weight: Array) -> PyTree:  # under the name that says where it lies on a mesh
        return {tensor.name: quantise(weight, config.quantise)}

    return (jax.jit(make)(array) if mesh is None else create(make, mesh, array))[tensor.name]


def quantise_params(config: ModelConfig, params: PyTree, mesh: Mesh | None = None) -> PyTree:
    """A whole base as the configuration keeps it."""
    keep = partial(quantise_array, config, mesh=mesh)
    return nest({tensor.key: keep(tensor, leaf(params, tensor.key)) for tensor in tensors(config)})


def dequantise(weight: Array | Quantised, dtype: DTypeLike) -> Array:
    """The numbers that the codes stand for, rounded to `dtype`; an array that is none of codes as it is."""
    if not isinstance(weight, Quantised):
        return weight
    *stack, inputs, outputs = weight.codes.shape
    blocks = weight.scales.shape[-2]
    codes = weight.codes.astype(jnp.float32).reshape(*stack, blocks, inputs // blocks, outputs)
    return (codes * weight.scales[..., None, :]).reshape(weight.codes.shape).astype(dtype)


def multiply(rows: Float[Array, "N I"], weight: Array | Quantised) -> Float[Array, "N O"]:
    """rows @ w in the dtype of `rows`.

    A scale that all inputs share multiplies the product: codes of 8 bits are exact in bfloat16, scaled ones are not.
    """
    if not isinstance(weight, Quantised):
        return rows @ weight.astype(rows.dtype)
    if weight.scales.shape[0] == 1:
        return ((rows @ weight.codes.astype(rows.dtype)) * weight.scales).astype(rows.dtype)
    return rows @ dequantise(weight, rows.dtype)
