"""Reads a GGUF file (llama.cpp): configuration, dequantised weights and tokenizer.

Quantised tensors are expanded to float32; nothing is claimed about the weights from before the quantisation.
"""

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ppo_jax.models.config import ModelConfig, RopeScaling
from ppo_jax.models.files import gguf_container, weights
from ppo_jax.models.files.families import Dtype
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
}
# Metadata of the architecture that `_config` understands, after "llama."; another field is refused.
FIELDS = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear"),
    *("expert_count", "expert_used_count"),
}
ROPE_FACTORS = "rope_freqs.weight"  # llama3 scaling, expanded into one divisor per frequency
LARGEST_ROPE = 2**16  # of these; a head has some 64
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def load(path: Path, dtype: Dtype = "float32", mesh: Mesh | None = None) -> tuple[ModelConfig, PyTree]:
    """Reads configuration and weights of a GGUF file of architecture `llama`.

    llama.cpp rotates the neighbours (2j, 2j+1) of a head where Hugging Face and we rotate (j, j + H/2), so its
    converter permutes the rows of the q and k projections; that is undone here. On a mesh a stacked array is expanded
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
        config = read_config(metadata, found, factors, dtype)

        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

        def read(name: str) -> np.ndarray:
            array = gguf_container.dequantize(name, found[name])
            module = name.split(".")[-2]
            return unpermute(array, heads[module]) if module in heads else array

        shapes = {name: tensor.shape for name, tensor in found.items()}
        params = weights.gather(config, shapes, read, _stored(config), mesh)
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
    """The metadata of a `llama` GGUF file as a `ModelConfig`. ValueError names a field that is not supported."""
    if (name := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"general.architecture={name!r} is not supported; supported: llama")
    unknown = sorted(k for k in metadata if k.startswith("llama.") and k.removeprefix("llama.") not in FIELDS)
    if unknown:
        raise ValueError(f"metadata {unknown[0]}={reprlib.repr(metadata[unknown[0]])} is not supported")
    if metadata.get("llama.expert_count"):
        raise ValueError(f"llama.expert_count={metadata['llama.expert_count']}: mixtures of experts are not supported")
    heads, width = _count(metadata, "attention.head_count"), _count(metadata, "embedding_length")
    head_dim = _count(metadata, "attention.key_length", width // heads)
    for field in ("attention.value_length", "rope.dimension_count"):
        if (value := _count(metadata, field, head_dim)) != head_dim:
            raise ValueError(f"llama.{field}={value} differs from the head width {head_dim}, which is not supported")
    theta = _number(metadata, "rope.freq_base", 10_000.0)
    embedding = tensors.get("token_embd.weight")
    bos, eos, eot = (token_ids(metadata, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "eot"))
    return ModelConfig(
        vocab_size=_count(metadata, "vocab_size", None if embedding is None else embedding.shape[0]),
        hidden_size=width,
        intermediate_size=_count(metadata, "feed_forward_length"),
        num_layers=_count(metadata, "block_count"),
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
    )


def load_tokenizer(path: Path) -> Any:
    """The byte-level BPE tokenizer in the file's metadata, as a transformers tokenizer with its chat template.

    Raises:
      ValueError: the file is damaged, or its tokenizer is of another kind.
    """
    try:
        metadata, _ = gguf_container.read(path)
        return _tokenizer(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in ("smollm", "gpt-2"):
        raise ValueError(
            f"tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={split!r} is not supported (supported: gpt2 with "
            "smollm or gpt-2); take the tokenizer from the model's Hugging Face directory"
        )
    tokens, merges = (_texts(metadata, f"tokenizer.ggml.{field}") for field in ("tokens", "merges"))
    if bad := [merge for merge in merges if merge.count(" ") != 1]:
        raise ValueError(f"tokenizer.ggml.merges: {bad[0]!r} is not a pair of tokens")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    except MemoryError:
        raise
    except Exception as error:  # the Rust side has no class of its own
        raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error})") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # SmolLM splits numbers into single digits first, then into words as GPT-2 does.
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"tokenizer.chat_template={template!r} is not text")
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type is not a list with one number for each of {len(tokens)} tokens")
    for token, token_kind in zip(tokens, kinds, strict=False):
        if token_kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_kind == CONTROL, normalized=False)])
    special = {}
    for role, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        for token_id in token_ids(metadata, f"tokenizer.ggml.{field}_token_id"):
            if token_id >= len(tokens):
                raise ValueError(f"tokenizer.ggml.{field}_token_id={token_id} is beyond the {len(tokens)} tokens")
            special[f"{role}_token"] = tokens[token_id]
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        model_max_length=_count(metadata, "context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _stored(config: ModelConfig) -> list[Stored]:
    """The tensors of the file."""
    return [
        Stored(f"{NAMES[one.name.removesuffix('_bias')]}.{one.hf_name.rpartition('.')[2]}", (one,), one.transposed)
        for one in tensors(config)
    ]


def _rope_scaling(
    metadata: Mapping[str, Any], theta: float, head_dim: int, divisors: np.ndarray | None
) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = _number(metadata, "rope.scaling.factor", _number(metadata, "rope.scale_linear", 1.0))
    if divisors is None:
        if kind == "linear" or (kind == "none" and factor == 1.0) or "llama.rope.scale_linear" in metadata:
            return None if factor == 1.0 else RopeScaling("linear", factor)
        raise ValueError(f"llama.rope.scaling.type={kind!r} is not supported; supported: none, linear")
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


def _texts(metadata: Mapping[str, Any], field: str) -> list[str]:
    value = metadata.get(field)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{field} is not a list of strings")
    return value


def _count(metadata: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = metadata.get(f"llama.{field}", default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ValueError(f"llama.{field}={reprlib.repr(value)} is not a positive integer of 32 bits")
    return value


def _number(metadata: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = metadata.get(f"llama.{field}", default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-37 < value < 1e38:
        raise ValueError(f"llama.{field}={reprlib.repr(value)} is not a positive number of single precision")
    return float(str(np.float32(value)))  # stored as float32: the shortest decimal that means the same
