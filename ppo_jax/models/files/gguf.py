"""Reads a GGUF file (llama.cpp): configuration and dequantised weights.

Quantised tensors are expanded to float32; nothing is claimed about the weights from before the quantisation.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ppo_jax.models.config import ModelConfig, Quantise, RopeScaling
from ppo_jax.models.files import gguf_container, weights
from ppo_jax.models.files.families import FAMILIES, Dtype
from ppo_jax.models.files.fields import LARGEST, token_ids
from ppo_jax.models.files.names import Stored
from ppo_jax.models.layout import tensors
from ppo_jax.types import PyTree

# Our array, without "_bias" -> GGUF tensor, without ".weight" or ".bias".
NAMES = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "unembedding": "output",
    "attention_norm": "blk.{}.attn_norm",
    "mlp_norm": "blk.{}.ffn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "o": "blk.{}.attn_output",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "attention_post_norm": "blk.{}.post_attention_norm",
    "mlp_post_norm": "blk.{}.post_ffw_norm",
}
LLAMA, GEMMA3 = "llama", "gemma3"  # values of general.architecture
# Metadata of the architecture that `read_config` understands, after its name; another field is refused.
FIELDS = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear"),
    *("expert_count", "expert_used_count", "attention.sliding_window"),
}
ROPE_FACTORS = "rope_freqs.weight"  # llama3 scaling, expanded into one divisor per frequency
LARGEST_ROPE = 2**16  # of these; a head has some 64


def load(
    path: Path, dtype: Dtype = "float32", mesh: Mesh | None = None, quantise: Quantise = "none"
) -> tuple[ModelConfig, PyTree]:
    """Reads configuration and weights of a GGUF file of architecture `llama` or `gemma3`.

    llama.cpp rotates the neighbours (2j, 2j+1) of a head in `llama`, where Hugging Face and we rotate (j, j + H/2), so
    its converter permutes the rows of the q and k projections; and it stores the norms of `gemma3` with the 1 that
    they are less here. Both are undone. On a mesh a stacked array is expanded
    whole on the host, and each device receives its shard.

    Raises:
      ValueError: the file is damaged or is of another architecture; the message names the file and the field.
    """
    try:
        metadata, found = gguf_container.read(path)
        stored = found.pop(ROPE_FACTORS, None)
        if stored is not None and math.prod(stored.shape) > LARGEST_ROPE:
            raise ValueError(f"tensor {ROPE_FACTORS} has shape {stored.shape}; at most {LARGEST_ROPE} values are read")
        factors = None if stored is None else gguf_container.dequantize(ROPE_FACTORS, stored)
        config = dataclasses.replace(read_config(metadata, found, factors, dtype), quantise=quantise)

        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.family == "llama" else {}

        def read(name: str) -> np.ndarray:
            array = gguf_container.dequantize(name, found[name])
            module = name.split(".")[-2]
            if config.norm_offset and module.endswith("norm"):
                return array - 1
            return unpermute(array, heads[module]) if module in heads else array

        shapes = {name: tensor.shape for name, tensor in found.items()}
        params = weights.gather(config, shapes, read, gguf_tensors(config), mesh)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, params


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2j + s of each head becomes row s * H/2 + j: interleaved rotary pairs to halves.

    `weight` is [heads * H, in], or [heads * H] for a bias.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def read_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, gguf_container.Stored],
    rope_factors: np.ndarray | None,
    dtype: Dtype,
) -> ModelConfig:
    """The metadata of a GGUF file as a `ModelConfig`. ValueError names a field that is not supported."""
    if (name := metadata.get("general.architecture")) not in (LLAMA, GEMMA3):
        raise ValueError(f"general.architecture={name!r} is not supported; supported: {LLAMA}, {GEMMA3}")
    own = FIELDS - ({"attention.sliding_window"} if name == LLAMA else set())
    unknown = sorted(k for k in metadata if k.startswith(f"{name}.") and k.removeprefix(f"{name}.") not in own)
    if unknown:
        raise ValueError(f"metadata {unknown[0]}={reprlib.repr(metadata[unknown[0]])} is not supported")
    if experts := metadata.get(f"{name}.expert_count"):
        raise ValueError(f"{name}.expert_count={experts}: mixtures of experts are not supported")
    heads, width = _count(metadata, "attention.head_count"), _count(metadata, "embedding_length")
    head_dim = _count(metadata, "attention.key_length", width // heads)
    for field in ("attention.value_length", "rope.dimension_count"):
        if (value := _count(metadata, field, head_dim)) != head_dim:
            raise ValueError(f"{name}.{field}={value} differs from the head width {head_dim}, which is not supported")
    theta, layers = _number(metadata, "rope.freq_base", 10_000.0), _count(metadata, "block_count")
    embedding = tensors.get("token_embd.weight")
    bos, eos, eot = (token_ids(metadata, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "eot"))
    return ModelConfig(
        vocab_size=_count(metadata, "vocab_size", None if embedding is None else embedding.shape[0]),
        hidden_size=width,
        intermediate_size=_count(metadata, "feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_count(metadata, "attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_rope_scaling(metadata, theta, head_dim, rope_factors),
        norm_eps=_number(metadata, "attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        max_positions=_count(metadata, "context_length"),
        dtype=dtype,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(eos + eot)),
        **(_gemma3(metadata, layers, width, heads, head_dim) if name == GEMMA3 else {}),
    )


def _gemma3(metadata: Mapping[str, Any], layers: int, width: int, heads: int, head_dim: int) -> dict[str, Any]:
    """The flags of Gemma 3, and what llama.cpp knows of it without being told."""
    family = FAMILIES["gemma3_text"]
    scalar = width // heads if layers == 62 else head_dim  # 27B alone divides its scores otherwise
    return dict(family.flags) | {
        "family": "gemma3_text",
        "activation": "gelu_tanh",
        "embedding_scale": width**0.5,
        "attention_scale": scalar**-0.5,
        "window": _count(metadata, "attention.sliding_window"),
        "windowed": tuple(layer for layer in range(layers) if (layer + 1) % 6),
        "window_theta": family.window_theta,
    }


def gguf_tensors(config: ModelConfig) -> list[Stored]:
    """The tensors of the file."""
    return [
        Stored(f"{NAMES[one.name.removesuffix('_bias')]}.{one.hf_name.rpartition('.')[2]}", (one,), one.transposed)
        for one in tensors(config)
    ]


def _rope_scaling(
    metadata: Mapping[str, Any], theta: float, head_dim: int, divisors: np.ndarray | None
) -> RopeScaling | None:
    name = metadata["general.architecture"]
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    factor = _number(metadata, "rope.scaling.factor", _number(metadata, "rope.scale_linear", 1.0))
    if divisors is None:
        if kind == "linear" or (kind == "none" and factor == 1.0) or f"{name}.rope.scale_linear" in metadata:
            return None if factor == 1.0 else RopeScaling("linear", factor)
        raise ValueError(f"{name}.rope.scaling.type={kind!r} is not supported; supported: none, linear")
    # The converter has expanded the llama3 rule; recover its parameters and require that they explain every divisor.
    original = _count(metadata, "rope.scaling.original_context_length", 8192)
    if divisors.shape != (head_dim // 2,):  # before as many are computed
        there = f"tensor {ROPE_FACTORS} has shape {divisors.shape}"
        raise ValueError(f"{there}, heads of width {head_dim} imply {head_dim // 2}")
    scaling = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, original)
    expected = _llama3_divisors(theta, head_dim, scaling)
    if kind != "none" or not np.allclose(divisors, expected, rtol=1e-5):
        raise ValueError(f"{ROPE_FACTORS} is not llama3 scaling with factors (1, 4) of {original} positions")
    return scaling


def _llama3_divisors(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    """What each rotary frequency is divided by (Llama 3.1)."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_positions * frequency / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def _count(metadata: Mapping[str, Any], field: str, default: int | None = None) -> int:
    name = f"{metadata['general.architecture']}.{field}"
    value = metadata.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ValueError(f"{name}={reprlib.repr(value)} is not a positive integer of 32 bits")
    return value


def _number(metadata: Mapping[str, Any], field: str, default: float | None = None) -> float:
    name = f"{metadata['general.architecture']}.{field}"
    value = metadata.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-37 < value < 1e38:
        raise ValueError(f"{name}={reprlib.repr(value)} is not a positive number of single precision")
    return float(str(np.float32(value)))  # stored as float32: the shortest decimal that means the same
