"""Fields of Hugging Face configs that few families have: what they mean there, and where they have no effect."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ppo_jax.models.config import Activation, ModelConfig
from ppo_jax.models.files.fields import flag, number

# Fields that other checkpoints of these model types carry, and the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "clip_qkv": (),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "alibi": (False,),
    "no_rope_layers": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "dual_chunk_attention_config": (),
    "quantization_config": (),
    "compression_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
ACTIVATIONS: dict[str, Activation] = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},
}


class Extras(NamedTuple):
    """Fields that few families have: read (from the file, and the width) and written."""

    read: Callable[[Mapping[str, Any], int], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def activation(name: Any) -> Activation:
    """The activation that `hidden_act` names."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r} is not supported; supported: {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def name_of(wanted: Activation, usual: str) -> str:
    """What `hidden_act` calls an activation: the family's usual name for it, where there are several."""
    return usual if ACTIVATIONS[usual] == wanted else next(n for n, ours in ACTIVATIONS.items() if ours == wanted)


def _read_gemma(raw: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    caps = {name: raw.get(f"{name}_softcapping") for name in ("attn_logit", "final_logit")}
    given = {name: None if cap is None else number({name: cap}, name) for name, cap in caps.items()}
    return {
        "attention_scale": number(raw, "query_pre_attn_scalar") ** -0.5,
        "attention_cap": given["attn_logit"],
        "logit_cap": given["final_logit"],
        "embedding_scale": hidden**0.5,
    }


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention_scale or config.head_dim**-0.5
    if config.embedding_scale != config.hidden_size**0.5:
        raise ValueError(f"a {config.family} model scales its embedding by sqrt(hidden_size); embedding_scale differs")
    if (scalar := round(scale**-2)) ** -0.5 != scale:
        raise ValueError(f"attention_scale={scale} is not 1 / sqrt(n) of a whole query_pre_attn_scalar n")
    return {
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
    }


def _read_granite(raw: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    return {
        "attention_scale": number(raw, "attention_multiplier"),
        "embedding_scale": number(raw, "embedding_multiplier", 1.0),
        "residual_scale": number(raw, "residual_multiplier", 1.0),
        "logit_divisor": number(raw, "logits_scaling", 1.0),
    }


def _write_granite(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logit_divisor,
    }


NOTHING = Extras(lambda raw, hidden: {}, lambda config: {})
EXTRAS = dict.fromkeys(("gemma2", "gemma3_text"), Extras(_read_gemma, _write_gemma)) | {
    "granite": Extras(_read_granite, _write_granite),
    "gpt_neox": Extras(
        lambda raw, hidden: {"parallel": flag(raw, "use_parallel_residual")},
        lambda config: {"use_parallel_residual": config.parallel},
    ),
}
# Fields of a ModelConfig that the files of a family say, so that its models may differ in them.
_SCALES = ("attention_scale", "embedding_scale")
FREE: dict[str, tuple[str, ...]] = {
    "gemma2": (*_SCALES, "attention_cap", "logit_cap"),
    "gemma3_text": (*_SCALES, "attention_cap", "logit_cap"),
    "granite": (*_SCALES, "residual_scale", "logit_divisor"),
    "gpt_neox": ("parallel",),
}
