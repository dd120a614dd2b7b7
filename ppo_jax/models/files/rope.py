"""Rotary positions in Hugging Face configs: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ppo_jax.models.config import RopeScaling
from ppo_jax.models.files.fields import count, flag, number, numbers, require_neutral

_YARN = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
KINDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"} | _YARN,
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"},
}
OLD_NAMES = {"su": "longrope"}
BY_LAYER = ("full_attention", "sliding_attention")  # Gemma 3 says them apart


class Rope(NamedTuple):
    """What a config says of rotary positions."""

    theta: float
    scaling: RopeScaling | None
    fraction: float  # of a head's entries that are rotated
    window_theta: float | None  # of layers with a window, where it differs


def read(raw: Mapping[str, Any], max_positions: int, theta: float, fraction: float, window_theta: float | None) -> Rope:
    """Read the fields; `theta`, `fraction` and `window_theta` are the family's where the config is silent.

    Raises ValueError that names the field, for what is malformed, contradictory or not supported.
    """
    nested = raw.get("rope_parameters")
    if window_theta is not None:
        local = number(raw, "rope_local_base_freq", window_theta)
        if isinstance(nested, Mapping) and nested.keys() & set(BY_LAYER):
            whole, windowed = (nested.get(kind) or {} for kind in BY_LAYER)
            if not isinstance(whole, Mapping) or not isinstance(windowed, Mapping):
                raise ValueError(f"rope_parameters={nested!r} does not hold an object for each kind of layer")
            local = number(windowed, "rope_theta", local)
            require_neutral(windowed, "rope_type", ("default",))
            raw = {name: value for name, value in raw.items() if name != "rope_theta"} | {"rope_parameters": whole}
        window_theta = local
    merged = _merge(raw)
    fraction = number(merged, "partial_rotary_factor", fraction)
    return Rope(number(merged, "rope_theta", theta), _scaling(merged, max_positions), fraction, window_theta)


def _merge(raw: Mapping[str, Any]) -> dict[str, Any]:
    """All fields, wherever they stand; they may be said twice, but not differently."""
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
    if "type" in merged:
        merged["type"] = OLD_NAMES.get(merged["type"], merged["type"])
    twice = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
    for field, source in (*((name, raw) for name in twice), ("rope_type", merged)):
        other = source.get("type" if field == "rope_type" else field)
        if other is None:
            continue
        if merged.get(field) not in (None, other):
            raise ValueError(f"{field} is given twice, as {merged[field]!r} and {other!r}")
        merged[field] = other
    return merged


def _scaling(merged: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    kind = merged.get("rope_type") or "default"
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rope_type={kind!r} is not supported; supported: {', '.join(KINDS)}")
    unknown = {k for k, v in merged.items() if v is not None} - KINDS[kind]
    unknown -= {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if kind in ("default", "linear"):
        unknown -= {"original_max_position_embeddings"}  # has no effect there
    if unknown:
        raise ValueError(f"rope_type={kind!r} with the fields {sorted(unknown)} is not supported")
    if kind == "default":
        return None
    original = count(merged, "original_max_position_embeddings", max_positions)
    factor = number(merged, "factor", max_positions / original if kind in ("yarn", "longrope") else None)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original_max_positions=original,
            strength=number(merged, "attention_factor", _yarn_strength(merged, factor)),
            beta_fast=number(merged, "beta_fast", 32.0),
            beta_slow=number(merged, "beta_slow", 1.0),
            truncate=merged.get("truncate") is None or flag(merged, "truncate"),
        )
    if kind == "longrope":
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        strength = number(merged, "attention_factor", default)
        short, long = numbers(merged, "short_factor"), numbers(merged, "long_factor")
        if len(short) != len(long):
            raise ValueError(f"short_factor has {len(short)} numbers and long_factor {len(long)}")
        whole = max_positions / original
        return RopeScaling(
            "longrope", whole, original_max_positions=original, strength=strength, short=short, long=long
        )
    if kind != "llama3":
        return RopeScaling(kind, factor)  # type: ignore[arg-type]
    low, high = number(merged, "low_freq_factor"), number(merged, "high_freq_factor")
    if high <= low:
        raise ValueError(f"high_freq_factor={high} is not above low_freq_factor={low}")
    return RopeScaling("llama3", factor, low, high, original)


def _yarn_strength(merged: Mapping[str, Any], factor: float) -> float:
    """By what YaRN multiplies cos and sin where the config does not say: Peng et al. 2023, section 3.4."""

    def scale(field: str) -> float:
        return 0.1 * (number(merged, field) if field else 1.0) * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = merged.get("mscale") and merged.get("mscale_all_dim")
    return scale("mscale") / scale("mscale_all_dim") if both else scale("")


def write(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The field `rope_scaling`."""
    if scaling is None:
        return None
    raw: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        raw |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    if scaling.kind == "yarn":
        raw |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.strength,
            "original_max_position_embeddings": scaling.original_max_positions,
            "truncate": scaling.truncate,
        }
    if scaling.kind == "longrope":
        raw |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        raw |= {"attention_factor": scaling.strength}
        raw |= {"original_max_position_embeddings": scaling.original_max_positions}
    return raw
