"""Hugging Face configs of the Llama family <-> `ModelConfig`.

`llama`, `mistral` and `qwen2` are one architecture with different flags. A field that would change what the
model computes is either understood or refused; it is never skipped.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ppo_jax.models.config import ModelConfig, RopeScaling

Dtype = Literal["float32", "bfloat16"]
LARGEST = 2**31 - 1  # of counts and token ids, which become int32 on the device


class Family(NamedTuple):
    """What `transformers` assumes for a `model_type` where config.json is silent, and which biases it has."""

    architecture: str  # class that transformers builds
    kv_heads: int | None  # None: as many as query heads
    max_positions: int
    bos: int | None
    eos: int | None
    window: int | None = None  # sliding attention window
    qkv_bias: bool | None = None  # None: `attention_bias` decides, for q, k, v and o together


FAMILIES = {
    "llama": Family("LlamaForCausalLM", None, 2048, bos=1, eos=2),
    "mistral": Family("MistralForCausalLM", 8, 131072, bos=1, eos=2, window=4096, qkv_bias=False),
    "qwen2": Family("Qwen2ForCausalLM", 32, 32768, bos=None, eos=None, window=4096, qkv_bias=True),
}

# Fields that other checkpoints of these model types carry, and the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
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

ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
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
    for field, neutral in NEUTRAL.items():
        _require_neutral(raw, field, neutral)
    auto_map = raw.get("auto_map") or {}
    if not isinstance(auto_map, Mapping) or "AutoModelForCausalLM" in auto_map:
        raise ValueError("auto_map names a model class of its own; only models of transformers itself are supported")
    heads, hidden = _count(raw, "num_attention_heads"), _count(raw, "hidden_size")
    if raw.get("head_dim") is None and hidden % heads:
        raise ValueError(f"head_dim is absent, and hidden_size={hidden} is not a multiple of {heads} heads")
    max_positions = _count(raw, "max_position_embeddings", family.max_positions)
    _check_window(raw, family, max_positions)
    attention_bias, output_bias, mlp_bias = _biases(raw, name, family)
    theta, scaling = _rope(raw, max_positions)
    return ModelConfig(
        vocab_size=_count(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_count(raw, "intermediate_size"),
        num_layers=_count(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_count(raw, "num_key_value_heads", family.kv_heads or heads, null=heads),
        head_dim=_count(raw, "head_dim", hidden // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=_flag(raw, "tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        max_positions=max_positions,
        family=name,
        dtype=dtype,
        bos_token_id=(token_ids(raw, "bos_token_id", family.bos) or (None,))[0],
        eos_token_ids=token_ids(raw, "eos_token_id", family.eos),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json, readable by transformers 4 and 5.

    Raises:
      ValueError: the family cannot express the configuration (its biases).
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family={config.family!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    biases = (config.attention_bias, config.output_bias, config.mlp_bias)
    if family.qkv_bias is None and config.attention_bias != config.output_bias:
        raise ValueError(f"a {config.family} model has biases on q, k, v and o together; attention_bias differs")
    if family.qkv_bias is not None and biases != (family.qkv_bias, False, False):
        raise ValueError(f"a {config.family} model cannot have (attention, output, mlp) biases {biases}")
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_field(config),
        "dtype": config.dtype,
        "torch_dtype": config.dtype,  # the name of `dtype` in transformers 4
    }
    if family.qkv_bias is None:
        raw |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    if config.family == "mistral":
        raw["sliding_window"] = None
    if config.family == "qwen2":
        raw |= {"use_sliding_window": False, "sliding_window": None}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            raw["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    return raw


def eos_field(config: ModelConfig) -> int | list[int] | None:
    """`eos_token_id` as Hugging Face files write it: one id, a list of several, or null."""
    ids = config.eos_token_ids
    return ids[0] if len(ids) == 1 else (list(ids) or None)


def token_ids(raw: Mapping[str, Any], field: str, default: int | None = None) -> tuple[int, ...]:
    """A field that holds no id, one id or a list of ids."""
    value = raw.get(field, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= LARGEST for i in ids):
        raise ValueError(f"{field}={value!r} is not a token id or a list of token ids")
    return tuple(ids)


def _rope(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    merged: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(field) or {}, Mapping):
            raise ValueError(f"{field}={raw[field]!r} is not an object")
        for key, value in (raw.get(field) or {}).items():
            if isinstance(value, Mapping):
                raise ValueError(f"{field}.{key} is an object: rotary embeddings that differ by layer are unsupported")
            if key in merged and merged[key] != value:
                raise ValueError(f"rope_parameters.{key}={merged[key]!r} and rope_scaling.{key}={value!r} disagree")
            merged[key] = value
    for field, source in (("rope_theta", raw), ("original_max_position_embeddings", raw), ("rope_type", merged)):
        other = source.get("type" if field == "rope_type" else field)
        if other is None:
            continue
        if merged.get(field) not in (None, other):
            raise ValueError(f"{field} is given twice, as {merged[field]!r} and {other!r}")
        merged[field] = other
    theta = _number(merged, "rope_theta", 10_000.0)
    _require_neutral(merged, "partial_rotary_factor", (1.0,))
    kind = merged.get("rope_type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ValueError(f"rope_type={kind!r} is not supported; supported: {', '.join(ROPE_FIELDS)}")
    unknown = {k for k, v in merged.items() if v is not None} - ROPE_FIELDS[kind]
    unknown -= {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if kind == "default":
        unknown -= {"original_max_position_embeddings"}  # has no effect without scaling
        if not unknown:
            return theta, None
    if unknown:
        raise ValueError(f"rope_type={kind!r} with the fields {sorted(unknown)} is not supported")
    factor = _number(merged, "factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    low, high = _number(merged, "low_freq_factor"), _number(merged, "high_freq_factor")
    if high <= low:
        raise ValueError(f"high_freq_factor={high} is not above low_freq_factor={low}")
    original = _count(merged, "original_max_position_embeddings", max_positions)
    return theta, RopeScaling("llama3", factor, low, high, original)


def _biases(raw: Mapping[str, Any], name: str, family: Family) -> tuple[bool, bool, bool]:
    """(q/k/v, o, mlp) biases."""
    attention, mlp = _flag(raw, "attention_bias"), _flag(raw, "mlp_bias")
    if family.qkv_bias is None:
        return attention, attention, mlp
    if raw.get("attention_bias") is not None and attention != family.qkv_bias:
        raise ValueError(f"attention_bias={attention} contradicts model_type={name!r}")
    if mlp:
        raise ValueError(f"mlp_bias=True contradicts model_type={name!r}")
    return family.qkv_bias, False, False


def _check_window(raw: Mapping[str, Any], family: Family, max_positions: int) -> None:
    """Refuses attention that does not see the whole sequence."""
    window = raw.get("sliding_window", family.window)
    window = None if window is None else _count({"sliding_window": window}, "sliding_window")
    if raw["model_type"] == "qwen2" and not raw.get("use_sliding_window"):
        window = None
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"layer_types={kinds!r} is not a list of names")
    if window is not None and window < max_positions:
        raise ValueError(
            f"sliding_window={window} is shorter than max_position_embeddings={max_positions}: sliding-window "
            "attention is not supported. If no sequence will be longer than the window, set "
            f"max_position_embeddings to {window} in config.json"
        )
    if set(kinds) - {"full_attention", "sliding_attention"} or ("sliding_attention" in kinds and window is None):
        raise ValueError(f"layer_types={sorted(set(kinds))} is not supported; supported: full_attention")


def _require_neutral(raw: Mapping[str, Any], field: str, neutral: tuple[Any, ...]) -> None:
    value = raw.get(field)
    if value is not None and value not in neutral:
        allowed = ", ".join(repr(v) for v in neutral) or "absent or null"
        raise ValueError(f"{field}={value!r} is not supported; supported: {allowed}")


def _count(raw: Mapping[str, Any], field: str, default: int | None = None, null: int | None = None) -> int:
    """A positive integer; `null` (or else `default`) is what an explicit null means."""
    value = raw.get(field, default)
    if value is None:
        value = default if null is None else null
    if value is None:
        raise ValueError(f"{field} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ValueError(f"{field}={value!r} is not a positive integer of 32 bits")
    return value


def _number(raw: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = default if raw.get(field) is None else raw[field]
    if value is None:
        raise ValueError(f"{field} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e38:
        raise ValueError(f"{field}={value!r} is not a positive number of single precision")
    return float(value)


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field) or False
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r} is not true or false")
    return value
