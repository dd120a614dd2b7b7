"""Hugging Face configs <-> `ModelConfig`: ONE table with a row for each family that says which flags it has.

A field that would change what the model computes is either understood or refused; it is never skipped.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import family_fields, layer_kinds, rope
from ppo_jax.models.files.fields import count, flag, number, require_neutral, token_ids

Dtype = Literal["float32", "bfloat16"]
NOTHING = family_fields.NOTHING
# The flags that distinguish families, and Llama's choice of them: the default.
FLAGS = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name
    in {
        *("norm", "norm_offset", "norm_place", "qk_norm", "activation", "gated", "parallel", "learned_positions"),
        *("rotary_width", "unrotated", "window", "windowed", "window_theta", "attention_scale", "attention_cap"),
        *("embedding_scale", "residual_scale", "logit_divisor", "logit_cap"),
    }
}


class Family(NamedTuple):
    """A `model_type`: its class, what `transformers` assumes where config.json is silent, and its flags."""

    architecture: str  # class that transformers builds
    silent: Mapping[str, Any] = {}  # Llama's name of a field -> its value where it is absent
    flags: Mapping[str, Any] = {}  # fields of ModelConfig that all models of the family share
    biases: tuple[bool | None, bool | None, bool | None] = (None, None, None)  # q/k/v, o, MLP; None: config.json says
    renamed: Mapping[str, str] = {}  # Llama's name of a field -> the family's
    understood: frozenset[str] = frozenset()  # fields of NEUTRAL that the family gives a meaning
    kinds: layer_kinds.Kinds = layer_kinds.NONE  # which layers have a window, which no rotary positions
    theta: float = 10_000.0
    fraction: float = 1.0  # of a head that is rotated
    window_theta: float | None = None
    classifies: bool = True  # whether transformers has a ...ForSequenceClassification
    fused: bool = False  # whether q, k and v are one map of hidden_size to 3 hidden_size


_NO_BIAS = (False, False, False)
_GEMMA_FLAGS: dict[str, Any] = {"norm_offset": True, "norm_place": "both"}
_GEMMA_SILENT = {
    **{"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256},
    **{"num_key_value_heads": 4, "bos_token_id": 2, "eos_token_id": 1, "sliding_window": 4096},
}
_CAPS = frozenset({"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"})
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_LAYER_NORM: dict[str, Any] = {"norm": "layer", "gated": False}
_GPT2_NAMES = {
    **{"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"},
    **{"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
    **{"rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function"},
}
_NEOX_NAMES = {"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", _IDS | {"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        _IDS | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        biases=_NO_BIAS,
        kinds=layer_kinds.EVERY,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
        biases=(True, False, False),
        kinds=layer_kinds.QWEN,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
        {"qk_norm": "head"},
        (None, None, False),
        kinds=layer_kinds.QWEN,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA_SILENT
        | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _GEMMA_FLAGS,
        (None, None, False),
        {"hidden_act": "hidden_activation"},
        _CAPS,
        layer_kinds.GEMMA2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA_SILENT | {"max_position_embeddings": 131072},
        _GEMMA_FLAGS | {"qk_norm": "head"},
        (None, None, False),
        {"hidden_act": "hidden_activation"},
        _CAPS,
        layer_kinds.GEMMA3,
        theta=1_000_000.0,
        window_theta=10_000.0,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "tie_word_embeddings": True}
        | {"bos_token_id": 50256, "eos_token_id": 50256},
        _LAYER_NORM | {"learned_positions": True},
        (True, True, True),
        _GPT2_NAMES,
        fused=True,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "gelu", "attention_bias": True}
        | {"use_parallel_residual": True, "bos_token_id": 0, "eos_token_id": 2},
        _LAYER_NORM,
        (None, None, True),
        _NEOX_NAMES,
        frozenset({"use_parallel_residual", "partial_rotary_factor"}),
        fraction=0.25,
        fused=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 32000},
        biases=_NO_BIAS,
        understood=frozenset({"partial_rotary_factor"}),
        kinds=layer_kinds.EVERY,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279},
        {"norm_place": "after", "qk_norm": "width"},
        (None, None, False),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True}
        | {"bos_token_id": 128000, "eos_token_id": 128001},
        understood=frozenset({"no_rope_layers"}),
        kinds=layer_kinds.SMOLLM3,
        theta=2_000_000.0,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _IDS | {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
        understood=frozenset({"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"}),
        classifies=False,
    ),
}


def config_from_hf(raw: Mapping[str, Any], dtype: Dtype = "float32") -> ModelConfig:
    """Reads the content of a Hugging Face config.json.

    Raises:
      ValueError: a needed field is missing or malformed, or the model computes something that we do not. The
        message names the field, its value and what is supported.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type={name!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    for field, neutral in family_fields.NEUTRAL.items():
        if field not in family.understood:
            require_neutral(raw, field, neutral)
    auto_map = raw.get("auto_map") or {}
    if not isinstance(auto_map, Mapping) or "AutoModelForCausalLM" in auto_map:
        raise ValueError("auto_map names a model class of its own; only models of transformers itself are supported")
    ours = {**family.silent, **{k: v for k, v in raw.items() if k not in family.renamed.values()}}
    ours |= {llama: raw[theirs] for llama, theirs in family.renamed.items() if theirs in raw}
    try:
        return _read(ours, name, family, dtype)
    except ValueError as error:  # it names Llama's field
        said = re.match(r"(\w+)(.*)", str(error), re.DOTALL)
        known = said is not None and said[1] in family.renamed
        raise ValueError(f"{family.renamed[said[1]]}{said[2]}" if said and known else str(error)) from error


def _read(raw: Mapping[str, Any], name: str, family: Family, dtype: Dtype) -> ModelConfig:
    """The configuration from fields under Llama's names."""
    heads, hidden = count(raw, "num_attention_heads"), count(raw, "hidden_size")
    if raw.get("head_dim") is None and hidden % heads:
        raise ValueError(f"head_dim is absent, and hidden_size={hidden} is not a multiple of {heads} heads")
    head_dim, layers = count(raw, "head_dim", hidden // heads), count(raw, "num_hidden_layers")
    longest = count(raw, "max_position_embeddings", 2048)
    biases = _biases(raw, name, family)
    said = rope.read(raw, longest, family.theta, family.fraction, family.window_theta)
    if said.fraction != 1 and "partial_rotary_factor" not in family.understood:
        raise ValueError(f"partial_rotary_factor={said.fraction} is not supported in {name} models")
    long = said.scaling is not None and said.scaling.kind == "longrope"
    rotated = int(head_dim * said.fraction)
    activation = raw.get("hidden_act") or family.silent.get("hidden_act", "silu")
    return ModelConfig(
        vocab_size=count(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=count(raw, "intermediate_size", 4 * hidden if name == "gpt2" else None),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=count(raw, "num_key_value_heads", heads, null=heads),
        head_dim=head_dim,
        rope_theta=said.theta,
        rope_scaling=said.scaling,
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings"),
        attention_bias=biases[0],
        output_bias=biases[1],
        mlp_bias=biases[2],
        max_positions=said.scaling.original_max_positions if long and said.scaling else longest,
        activation=family_fields.activation(activation),
        rotary_width=rotated if rotated != head_dim else None,
        window_theta=said.window_theta,
        family=name,
        dtype=dtype,
        bos_token_id=(token_ids(raw, "bos_token_id") or (None,))[0],
        eos_token_ids=token_ids(raw, "eos_token_id"),
        **family.flags,
        **layer_kinds.read(raw, family.kinds, layers, longest),
        **family_fields.EXTRAS.get(name, NOTHING).read(raw, hidden),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json, readable by transformers 4 and 5.

    Raises:
      ValueError: the family cannot express the configuration; the message names what.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family={config.family!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    _check_flags(config, family)
    longrope = config.rope_scaling is not None and config.rope_scaling.kind == "longrope"
    stretch = config.rope_scaling.factor if longrope and config.rope_scaling else 1
    raw: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": family_fields.name_of(config.activation, family.silent.get("hidden_act", "silu")),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope.write(config.rope_scaling),
        "max_position_embeddings": round(config.max_positions * stretch),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_field(config),
        "pad_token_id": None,  # of the tokenizer, where there is one
        "dtype": config.dtype,
        "torch_dtype": config.dtype,  # the name of `dtype` in transformers 4
    }
    if family.biases[0] is None:
        raw["attention_bias"] = config.attention_bias
    if family.biases[2] is None:
        raw["mlp_bias"] = config.mlp_bias
    if "partial_rotary_factor" in family.understood:
        raw["partial_rotary_factor"] = config.rotated / config.head_dim
    if family.window_theta is not None:
        raw["rope_local_base_freq"] = config.window_theta
    if longrope and config.rope_scaling:
        raw["original_max_position_embeddings"] = config.rope_scaling.original_max_positions
    if config.learned_positions:
        del raw["rope_theta"], raw["rope_scaling"]
    raw |= layer_kinds.write(config, family.kinds) | family_fields.EXTRAS.get(config.family, NOTHING).write(config)
    named = {"architectures": [family.architecture], "model_type": config.family}
    return named | {family.renamed.get(field, field): value for field, value in raw.items()}


def _check_flags(config: ModelConfig, family: Family) -> None:
    """Raises ValueError where the family's files cannot say what the configuration does."""
    biases = (config.attention_bias, config.output_bias, config.mlp_bias)
    if family.biases[:2] == (None, None) and config.attention_bias != config.output_bias:
        raise ValueError(f"a {config.family} model has biases on q, k, v and o together; attention_bias differs")
    if any(has is not None and has != bias for has, bias in zip(family.biases, biases, strict=True)):
        raise ValueError(f"a {config.family} model cannot have (attention, output, mlp) biases {biases}")
    free = {"activation", "window", "windowed", "unrotated", *family_fields.FREE.get(config.family, ())}
    free |= {"rotary_width"} if "partial_rotary_factor" in family.understood else set()
    free |= {"window_theta"} if family.window_theta is not None else set()
    for name, default in FLAGS.items():
        wanted, found = family.flags.get(name, default), getattr(config, name)
        if name not in free and found != wanted:
            raise ValueError(f"a {config.family} model cannot have {name}={found!r}; it has {wanted!r}")
    if family.fused and (
        config.num_kv_heads != config.num_heads or config.head_dim * config.num_heads != config.hidden_size
    ):
        raise ValueError(
            f"a {config.family} model has as many key/value heads as heads, of hidden_size / num_heads entries; "
            f"num_kv_heads={config.num_kv_heads} and head_dim={config.head_dim} differ"
        )


def eos_field(config: ModelConfig) -> int | list[int] | None:
    """`eos_token_id` as Hugging Face files write it: one id, a list of several, or null."""
    ids = config.eos_token_ids
    return ids[0] if len(ids) == 1 else (list(ids) or None)


def _biases(raw: Mapping[str, Any], name: str, family: Family) -> tuple[bool, bool, bool]:
    """(q/k/v, o, MLP) biases."""
    attention, mlp = flag(raw, "attention_bias"), flag(raw, "mlp_bias")
    own = family.biases
    if own[0] is not None and raw.get("attention_bias") is not None and attention != own[0]:
        raise ValueError(f"attention_bias={attention} contradicts model_type={name!r}")
    if own[2] is not None and raw.get("mlp_bias") is not None and mlp != own[2]:
        raise ValueError(f"mlp_bias={mlp} contradicts model_type={name!r}")
    said = (attention, attention, mlp)
    return tuple(one if fixed is None else fixed for one, fixed in zip(said, own, strict=True))  # type: ignore[return-value]
