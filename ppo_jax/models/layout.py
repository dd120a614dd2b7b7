"""The arrays of a model: ONE table with a row for each, which whatever needs to know of them reads.

Random parameters, the checks of given ones, shardings, loading, saving, LoRA and the planner go through `tensors`. An
array that a new family brings is one row here, with its condition on `ModelConfig`; an axis of another length is one
row of LENGTHS, and its place on the mesh one row of `parallel.sharding.RULES`. A file that names or stores the same
arrays otherwise (permuted or quantised in a GGUF file, several fused into one) is translated in `models.files`; the
names here are those of Llama's files, and of its relatives' for what Llama does not have.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.nn.initializers import Initializer
from jaxtyping import Array

from ppo_jax.models.config import ModelConfig
from ppo_jax.parallel.mesh import AXES, MeshConfig
from ppo_jax.parallel.sharding import RULES
from ppo_jax.types import PyTree

# Logical axis -> numbers of ModelConfig whose product is its length; the mesh cuts the first of them.
LENGTHS: dict[str, tuple[str, ...]] = {
    "layers": ("num_layers",),
    "embed": ("hidden_size",),
    "norm": ("hidden_size",),
    "kv_heads": ("num_kv_heads", "head_dim"),
    "heads": ("num_heads", "head_dim"),
    "mlp": ("intermediate_size",),
    "vocab": ("vocab_size",),
    "q_norm": ("q_norm_width",),
    "k_norm": ("k_norm_width",),
    "positions": ("max_positions",),
}
NORMAL, ONES, ZEROS = jax.nn.initializers.normal(0.02), jax.nn.initializers.ones, jax.nn.initializers.zeros


def _always(config: ModelConfig) -> bool:
    return True


class Tensor(NamedTuple):
    """One array of a model, and the Hugging Face tensor (one per layer, where it is stacked) that it is made of."""

    key: str  # path in the parameter tree: "embedding", "layers.q"
    axes: tuple[str, ...]  # logical axes of its dimensions; stacked arrays begin with "layers"
    init: Initializer
    hf_name: str  # "{}" stands for the layer
    transposed: bool = False  # torch.nn.Linear stores [out, in], we keep [in, out]
    exists: Callable[[ModelConfig], bool] = _always  # whether a model of this configuration has it

    @property
    def name(self) -> str:
        """The last part of the key: what `params["layers"]` or `params` calls it."""
        return self.key.rpartition(".")[2]

    @property
    def stacked(self) -> bool:
        """Whether its first axis counts the layers."""
        return self.axes[0] == "layers"

    @property
    def linear(self) -> bool:
        """Whether it is a stack of linear maps [L, in, out], which can carry LoRA."""
        return self.stacked and len(self.axes) == 3

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Its shape, the layer axis included."""
        return tuple(math.prod(getattr(config, field) for field in LENGTHS[axis]) for axis in self.axes)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of one tensor in the Hugging Face file."""
        shape = self.shape(config)[self.stacked :]
        return shape[::-1] if self.transposed else shape


def _before(config: ModelConfig) -> bool:
    return config.norm_place != "after"


def _after(config: ModelConfig) -> bool:
    return config.norm_place != "before"


def _layer_norms(config: ModelConfig) -> bool:
    return config.norm == "layer"


def _head_norms(config: ModelConfig) -> bool:
    return config.qk_norm != "none"


_LAYER = "model.layers.{}."
_ATTN, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
_NORM, _Q, _K, _MLP_AXIS = ("layers", "norm"), ("layers", "heads"), ("layers", "kv_heads"), ("layers", "mlp")

# In the order of the file.
TENSORS = (
    Tensor("embedding", ("vocab", "embed"), NORMAL, "model.embed_tokens.weight"),
    Tensor("positions", ("positions", "embed"), NORMAL, "model.embed_positions.weight",
           exists=lambda c: c.learned_positions),
    Tensor("layers.attention_norm", _NORM, ONES, _LAYER + "input_layernorm.weight", exists=_before),
    Tensor("layers.attention_norm_bias", _NORM, ZEROS, _LAYER + "input_layernorm.bias",
           exists=lambda c: _before(c) and _layer_norms(c)),
    Tensor("layers.q", ("layers", "embed", "heads"), NORMAL, _ATTN + "q_proj.weight", transposed=True),
    Tensor("layers.q_bias", _Q, ZEROS, _ATTN + "q_proj.bias", exists=lambda c: c.attention_bias),
    Tensor("layers.k", ("layers", "embed", "kv_heads"), NORMAL, _ATTN + "k_proj.weight", transposed=True),
    Tensor("layers.k_bias", _K, ZEROS, _ATTN + "k_proj.bias", exists=lambda c: c.attention_bias),
    Tensor("layers.v", ("layers", "embed", "kv_heads"), NORMAL, _ATTN + "v_proj.weight", transposed=True),
    Tensor("layers.v_bias", _K, ZEROS, _ATTN + "v_proj.bias", exists=lambda c: c.attention_bias),
    Tensor("layers.q_norm", ("layers", "q_norm"), ONES, _ATTN + "q_norm.weight", exists=_head_norms),
    Tensor("layers.k_norm", ("layers", "k_norm"), ONES, _ATTN + "k_norm.weight", exists=_head_norms),
    Tensor("layers.o", ("layers", "heads", "embed"), NORMAL, _ATTN + "o_proj.weight", transposed=True),
    Tensor("layers.o_bias", _NORM, ZEROS, _ATTN + "o_proj.bias", exists=lambda c: c.output_bias),
    Tensor("layers.attention_post_norm", _NORM, ONES, _LAYER + "post_self_attn_layernorm.weight", exists=_after),
    Tensor("layers.gate", ("layers", "embed", "mlp"), NORMAL, _MLP + "gate_proj.weight", transposed=True,
           exists=lambda c: c.gated),
    Tensor("layers.gate_bias", _MLP_AXIS, ZEROS, _MLP + "gate_proj.bias", exists=lambda c: c.gated and c.mlp_bias),
    Tensor("layers.up", ("layers", "embed", "mlp"), NORMAL, _MLP + "up_proj.weight", transposed=True),
    Tensor("layers.up_bias", _MLP_AXIS, ZEROS, _MLP + "up_proj.bias", exists=lambda c: c.mlp_bias),
    Tensor("layers.down", ("layers", "mlp", "embed"), NORMAL, _MLP + "down_proj.weight", transposed=True),
    Tensor("layers.down_bias", _NORM, ZEROS, _MLP + "down_proj.bias", exists=lambda c: c.mlp_bias),
    Tensor("layers.mlp_norm", _NORM, ONES, _LAYER + "post_attention_layernorm.weight", exists=_before),
    Tensor("layers.mlp_norm_bias", _NORM, ZEROS, _LAYER + "post_attention_layernorm.bias",
           exists=lambda c: _before(c) and _layer_norms(c)),
    Tensor("layers.mlp_post_norm", _NORM, ONES, _LAYER + "post_feedforward_layernorm.weight", exists=_after),
    Tensor("final_norm", ("norm",), ONES, "model.norm.weight"),
    Tensor("final_norm_bias", ("norm",), ZEROS, "model.norm.bias", exists=_layer_norms),
    Tensor("unembedding", ("vocab", "embed"), NORMAL, "lm_head.weight", exists=lambda c: not c.tie_embeddings),
)  # fmt: skip


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """The arrays of a model of this configuration, in the order of the file."""
    return tuple(tensor for tensor in TENSORS if tensor.exists(config))


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear map of one layer."""
    shapes = {tensor.name: tensor.shape(config) for tensor in tensors(config) if tensor.linear}
    return {name: (inputs, outputs) for name, (_, inputs, outputs) in shapes.items()}


def init_params(key: Array, config: ModelConfig) -> PyTree:
    """Random parameters: N(0, 0.02) matrices, norms that multiply by 1, zero biases. `key` is consumed."""
    keys = _split_key(key)

    def init(tensor: Tensor) -> Array:
        draw = ZEROS if tensor.init is ONES and config.norm_offset else tensor.init
        return draw(keys.get(tensor.key, key), tensor.shape(config), config.dtype)

    return nest({tensor.key: init(tensor) for tensor in tensors(config)})


def _split_key(key: Array) -> dict[str, Array]:
    """A key for every array that is drawn, by its path.

    They are numbered, so that a seed keeps its numbers: an array that is new to the table comes after those before it.
    """
    drawn = [tensor for tensor in TENSORS if tensor.init is NORMAL]
    outer = dict.fromkeys(["embedding", "unembedding", "layers", *(t.key for t in drawn if not t.stacked)])
    inner = [tensor.key for tensor in drawn if tensor.stacked]
    keys = dict(zip(outer, jax.random.split(key, len(outer)), strict=True))
    return keys | dict(zip(inner, jax.random.split(keys["layers"], len(inner)), strict=True))


def nest(arrays: Mapping[str, Any]) -> PyTree:
    """The parameter tree of arrays by their paths: `nest({"layers.q": x})` is `{"layers": {"q": x}}`."""
    params: dict[str, Any] = {}
    for key, array in arrays.items():
        *groups, name = key.split(".")
        node = params
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = array
    return params


def leaf(params: PyTree, key: str) -> Any:
    """`leaf(params, "layers.q")` is `params["layers"]["q"]`."""
    for part in key.split("."):
        params = params[part]
    return params


def check_params(config: ModelConfig, params: PyTree) -> None:
    """Raises ValueError when a parameter is missing, surplus or of the wrong shape; it names the parameter."""
    arrays = {name: array for name, array in params.items() if name != "layers"}
    arrays |= {f"layers.{name}": array for name, array in params.get("layers", {}).items()}
    for tensor in tensors(config):
        key, shape = tensor.key, tensor.shape(config)
        if key not in arrays:
            raise ValueError(f"parameter {key} is missing; the configuration needs it with shape {shape}")
        actual = tuple(arrays.pop(key).shape)
        if actual != shape:
            raise ValueError(f"parameter {key} has shape {actual}, expected {shape}")
    if arrays:
        raise ValueError(f"parameters {sorted(arrays)} do not belong to this configuration")


def check_model(config: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ValueError when an axis of the mesh does not divide what it cuts; the message names both."""
    for axis in AXES:
        fields = [lengths[0] for logical, lengths in LENGTHS.items() if axis in RULES[logical]]
        for field in fields:
            parts, size = getattr(mesh, axis), getattr(config, field)
            if size % parts:
                fits = [n for n in range(1, parts) if all(getattr(config, f) % n == 0 for f in fields)]
                raise ValueError(
                    f"--mesh.{axis} {parts} does not divide {field}={size} of the model; use {fits[-1]}, and give the "
                    f"other devices to --mesh.{'data' if axis == 'fsdp' else 'fsdp'}"
                )
