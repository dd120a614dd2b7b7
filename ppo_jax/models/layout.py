"""What arrays a model has: names, shapes, logical axes, initial values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ppo_jax.models.config import ModelConfig
from ppo_jax.parallel.mesh import MeshConfig
from ppo_jax.types import PyTree


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


# Name of a parameter -> logical axes of its dimensions (layout: `models.config.ModelConfig`).
PARAMETERS: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "embed"),
    "unembedding": ("vocab", "embed"),
    "final_norm": ("norm",),
    "attention_norm": ("layers", "norm"),
    "mlp_norm": ("layers", "norm"),
    "q": ("layers", "embed", "heads"),
    "k": ("layers", "embed", "kv_heads"),
    "v": ("layers", "embed", "kv_heads"),
    "o": ("layers", "heads", "embed"),
    "gate": ("layers", "embed", "mlp"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "q_bias": ("layers", "heads"),
    "k_bias": ("layers", "kv_heads"),
    "v_bias": ("layers", "kv_heads"),
    "o_bias": ("layers", "norm"),
    "gate_bias": ("layers", "mlp"),
    "up_bias": ("layers", "mlp"),
    "down_bias": ("layers", "norm"),
}


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear map of one layer."""
    d, f = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"q": (d, query), "k": (d, kv), "v": (d, kv), "o": (query, d), "gate": (d, f), "up": (d, f), "down": (f, d)}


def init_params(key: Array, config: ModelConfig) -> PyTree:
    """Random parameters: N(0, 0.02) matrices, unit norms, zero biases. `key` is consumed."""
    sizes, count, dtype = linear_shapes(config), config.num_layers, config.dtype
    embed_key, unembed_key, layer_key = jax.random.split(key, 3)
    layers = {
        name: 0.02 * jax.random.normal(k, (count, *sizes[name]), dtype)
        for name, k in zip(sizes, jax.random.split(layer_key, len(sizes)), strict=True)
    }
    layers |= {name: jnp.ones((count, config.hidden_size), dtype) for name in ("attention_norm", "mlp_norm")}
    layers |= {f"{name}_bias": jnp.zeros((count, sizes[name][1]), dtype) for name in biased_linears(config)}
    table = (config.vocab_size, config.hidden_size)
    params = {
        "embedding": 0.02 * jax.random.normal(embed_key, table, dtype),
        "layers": layers,
        "final_norm": jnp.ones((config.hidden_size,), dtype),
    }
    if not config.tie_embeddings:
        params["unembedding"] = 0.02 * jax.random.normal(unembed_key, table, dtype)
    return params


def biased_linears(config: ModelConfig) -> tuple[str, ...]:
    """The linear maps that carry a bias under this configuration."""
    groups = ((config.attention_bias, "qkv"), (config.output_bias, "o"))
    names = [name for biased, group in groups if biased for name in group]
    return (*names, *(("gate", "up", "down") if config.mlp_bias else ()))


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


def check_model(config: ModelConfig, mesh: MeshConfig) -> None:
    """Raises ValueError when an axis of the mesh does not divide what it cuts; the message names both."""
    cuts = {"fsdp": ("hidden_size",), "tensor": ("num_kv_heads", "num_heads", "intermediate_size", "vocab_size")}
    for axis, fields in cuts.items():
        for field in fields:
            parts, size = getattr(mesh, axis), getattr(config, field)
            if size % parts:
                fits = [n for n in range(1, parts) if all(getattr(config, f) % n == 0 for f in fields)]
                raise ValueError(
                    f"--mesh.{axis} {parts} does not divide {field}={size} of the model; use {fits[-1]}, and give the "
                    f"other devices to --mesh.{'data' if axis == 'fsdp' else 'fsdp'}"
                )
