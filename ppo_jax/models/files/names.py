"""Which tensor of a Hugging Face file holds which of our arrays, family by family.

Most families use the names in `models.layout`. Some have others, store maps as [in, out], or hold several of our maps
in one tensor, side by side along the output axis ("fused"), head by head where a family interleaves them.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import TENSORS, Tensor, tensors


class Names(NamedTuple):
    """How a family's files differ from `models.layout`."""

    modules: Mapping[str, str]  # name of our array, without "_bias" -> module in the file
    conv1d: bool = False  # maps are stored as [in, out]
    interleaved: bool = False  # the fused q, k and v alternate head by head


class Stored(NamedTuple):
    """One tensor of a file (one per layer, where stacked), and our arrays that it is made of."""

    name: str  # "{}" stands for the layer
    parts: tuple[Tensor, ...]
    transposed: bool  # stored as [out, in]
    interleaved: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is one in every layer."""
        return self.parts[0].stacked

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of one of them."""
        *inputs, _ = self.parts[0].shape(config)[self.stacked :]
        shape = (*inputs, sum(self.widths(config)))
        return shape[::-1] if self.transposed else shape

    def widths(self, config: ModelConfig) -> tuple[int, ...]:
        """The outputs of each part."""
        return tuple(part.shape(config)[-1] for part in self.parts)

    def outputs(self, config: ModelConfig, part: Tensor) -> np.ndarray:
        """Where along the output axis the outputs of a part lie, in their order."""
        widths, number = self.widths(config), self.parts.index(part)
        own = np.arange(widths[number])
        if self.interleaved and len(self.parts) > 1:
            head = config.head_dim
            return own // head * head * len(self.parts) + number * head + own % head
        return own + sum(widths[:number])

    def join(self, config: ModelConfig, arrays: list[Array]) -> Array:
        """The tensor from its parts, of one layer, as the file stores it."""
        whole = arrays[0]
        if len(arrays) > 1 and self.interleaved:
            apart = [array.reshape(*array.shape[:-1], -1, config.head_dim) for array in arrays]
            whole = jnp.stack(apart, axis=-2).reshape(*whole.shape[:-1], -1)
        elif len(arrays) > 1:
            whole = jnp.concatenate(arrays, axis=-1)
        return whole.T if self.transposed else whole

    def read(self, config: ModelConfig, part: Tensor, index: tuple[slice, ...], read: "Read") -> np.ndarray:
        """The slice `index` of a part, as [in, out]; `read` gives a slice of the tensor in the file."""
        *inputs, outputs = index
        at = self.outputs(config, part)[outputs]
        span = slice(int(at[0]), int(at[-1]) + 1)
        array = read(tuple((*inputs, span)[::-1] if self.transposed else (*inputs, span)))
        array = array.T if self.transposed else array
        return array if span.stop - span.start == len(at) else array[..., at - at[0]]


Read = Callable[[tuple[slice, ...]], np.ndarray]

_FUSED_QKV = "self_attn.qkv_proj"
_GEMMA = {
    "attention_post_norm": "model.layers.{}.post_attention_layernorm",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
}
_GPT2, _NEOX, _PHI3 = "transformer.h.{}.", "gpt_neox.layers.{}.", "model.layers.{}."
NAMES: dict[str, Names] = {
    "gemma2": Names(_GEMMA),
    "gemma3_text": Names(_GEMMA),
    "olmo2": Names({"attention_post_norm": "model.layers.{}.post_attention_layernorm"}),
    "phi3": Names(
        dict.fromkeys("qkv", _PHI3 + "self_attn.qkv_proj") | dict.fromkeys(("gate", "up"), _PHI3 + "mlp.gate_up_proj")
    ),
    "gpt2": Names(
        {
            **{"embedding": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f"},
            **{"attention_norm": _GPT2 + "ln_1", "mlp_norm": _GPT2 + "ln_2"},
            **dict.fromkeys("qkv", _GPT2 + "attn.c_attn"),
            **{"o": _GPT2 + "attn.c_proj", "up": _GPT2 + "mlp.c_fc", "down": _GPT2 + "mlp.c_proj"},
        },
        conv1d=True,
    ),
    "gpt_neox": Names(
        {
            **{"embedding": "gpt_neox.embed_in", "unembedding": "embed_out", "final_norm": "gpt_neox.final_layer_norm"},
            **{"attention_norm": _NEOX + "input_layernorm", "mlp_norm": _NEOX + "post_attention_layernorm"},
            **dict.fromkeys("qkv", _NEOX + "attention.query_key_value"),
            **{"o": _NEOX + "attention.dense", "up": _NEOX + "mlp.dense_h_to_4h", "down": _NEOX + "mlp.dense_4h_to_h"},
        },
        interleaved=True,
    ),
}
# Tables that old files carry and the configuration says too.
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def module(config: ModelConfig, tensor: Tensor) -> str:
    """The module in a Hugging Face model that holds this array: `model.layers.{}.self_attn.q_proj`."""
    names = NAMES.get(config.family, Names({}))
    return names.modules.get(tensor.name.removesuffix("_bias"), tensor.hf_name.rpartition(".")[0])


def stored_tensors(config: ModelConfig) -> tuple[Stored, ...]:
    """The tensors of a Hugging Face file of this configuration, in its order."""
    names, found = NAMES.get(config.family, Names({})), dict[str, list[Tensor]]()
    for tensor in tensors(config):
        found.setdefault(f"{module(config, tensor)}.{tensor.hf_name.rpartition('.')[2]}", []).append(tensor)
    return tuple(
        Stored(name, tuple(parts), parts[0].transposed and not names.conv1d, names.interleaved)
        for name, parts in found.items()
    )


def unembedding_name(config: ModelConfig) -> str:
    """What a file calls the unembedding, also where the model is tied and the file repeats the embedding."""
    tensor = next(tensor for tensor in TENSORS if tensor.name == "unembedding")
    return f"{module(config, tensor)}.weight"


def is_buffer(name: str) -> bool:
    """Whether a tensor of a file is a table that needs not be read."""
    return name.endswith(_BUFFERS)


def missing_prefix(config: ModelConfig, present: Collection[str]) -> str:
    """What the names of a file that was saved from the trunk alone (GPT-2's) leave out: `transformer.`, or nothing."""
    embedding = f"{module(config, TENSORS[0])}.weight"
    prefix, _, rest = embedding.partition(".")
    return f"{prefix}." if rest in present and embedding not in present else ""
