"""Which layers of a model attend within a window, and which have no rotary positions, in Hugging Face configs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files.fields import count, flag

FULL, SLIDING = "full_attention", "sliding_attention"  # values of `layer_types`


class Kinds(NamedTuple):
    """How the configs of a family say it."""

    default: Callable[[Mapping[str, Any], int], Sequence[int]] | None  # layers with a window without `layer_types`
    listed: bool = True  # whether `layer_types` may say otherwise
    switch: bool = False  # whether `use_sliding_window` turns windows on
    rotary: bool = False  # whether `no_rope_layers` names layers without rotary positions


def _from_max_window_layers(raw: Mapping[str, Any], layers: int) -> Sequence[int]:
    value = raw.get("max_window_layers")
    first = value if value == 0 and not isinstance(value, bool) else count(raw, "max_window_layers", 28)
    return range(first, layers)


def _but_every(period: int) -> Callable[[Mapping[str, Any], int], Sequence[int]]:
    """All layers but each `period`-th, or as `sliding_window_pattern` says."""

    def windowed(raw: Mapping[str, Any], layers: int) -> Sequence[int]:
        every = count(raw, "sliding_window_pattern", count(raw, "_sliding_window_pattern", period))
        return [i for i in range(layers) if (i + 1) % every]

    return windowed


NONE = Kinds(None)
EVERY = Kinds(lambda raw, layers: range(layers), listed=False)
QWEN = Kinds(_from_max_window_layers, switch=True)
GEMMA2 = Kinds(lambda raw, layers: range(0, layers, 2))
GEMMA3 = Kinds(_but_every(6))
SMOLLM3 = Kinds(lambda raw, layers: _unrotated(raw, layers), switch=True, rotary=True)


def read(raw: Mapping[str, Any], kinds: Kinds, layers: int, max_positions: int) -> dict[str, Any]:
    """The fields `window`, `windowed` and `unrotated` of a ModelConfig. ValueError names what is not supported."""
    window = None if raw.get("sliding_window") is None else count(raw, "sliding_window")
    if kinds.switch and not flag(raw, "use_sliding_window"):
        window = None
    types = raw.get("layer_types") or []
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise ValueError(f"layer_types={types!r} is not a list of names")
    said = sorted(set(types))
    if kinds.default is None and window is not None and window < max_positions:
        raise ValueError(
            f"sliding_window={window} is shorter than max_position_embeddings={max_positions}: sliding-window "
            f"attention is not supported in {raw.get('model_type')} models. If no sequence will be longer than the "
            f"window, set max_position_embeddings to {window} in config.json"
        )
    if set(types) - {FULL, SLIDING} or (SLIDING in types and (window is None or kinds.default is None)):
        allowed = FULL if window is None or kinds.default is None else f"{FULL}, {SLIDING}"
        raise ValueError(f"layer_types={said} is not supported; supported: {allowed}")
    if types and kinds.default is not None and len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers={layers}")
    if window is not None and types and not kinds.listed and said != [SLIDING]:
        raise ValueError(f"layer_types={said} contradicts sliding_window={window}, which holds for all layers here")
    windowed: Sequence[int] = ()
    if window is not None and kinds.default is not None:
        listed = [i for i, kind in enumerate(types) if kind == SLIDING]
        windowed = listed if types else kinds.default(raw, layers)
    found: dict[str, Any] = {"window": window if windowed else None, "windowed": tuple(windowed)}
    return found | ({"unrotated": tuple(_unrotated(raw, layers))} if kinds.rotary else {})


def _unrotated(raw: Mapping[str, Any], layers: int) -> list[int]:
    """`no_rope_layers` has a 1 for a layer with rotary positions, and a 0 for one without."""
    flags = raw.get("no_rope_layers")
    if flags is None:
        every = count(raw, "no_rope_layer_interval", 4)
        return [i for i in range(layers) if not (i + 1) % every]
    if not isinstance(flags, list) or len(flags) < layers or not all(one in (0, 1) for one in flags):
        raise ValueError(f"no_rope_layers={flags!r} is not a list of a 0 or 1 for each of {layers} layers")
    return [i for i in range(layers) if not flags[i]]


def write(config: ModelConfig, kinds: Kinds) -> dict[str, Any]:
    """The fields that `read` reads. ValueError: the family cannot say it."""
    layers = range(config.num_layers)
    windowed = [i for i in layers if i in config.windowed] if config.window is not None else []
    unrotated = [i for i in layers if i in config.unrotated]
    partly = 0 < len(windowed) < config.num_layers
    if (unrotated and not kinds.rotary) or (windowed and kinds.default is None) or (partly and not kinds.listed):
        raise ValueError(
            f"a {config.family} model cannot have windows in the layers {windowed} of {config.num_layers} and no "
            f"rotary positions in {unrotated}"
        )
    if kinds.default is None:
        return {}
    raw: dict[str, Any] = {"sliding_window": config.window if windowed else None}
    if kinds.switch:
        raw["use_sliding_window"] = bool(windowed)
    if kinds.listed:
        raw["layer_types"] = [SLIDING if i in windowed else FULL for i in layers]
    if kinds is QWEN:
        raw["max_window_layers"] = min(windowed, default=config.num_layers)  # for readers that know no layer_types
    if kinds.rotary:
        raw["no_rope_layers"] = [int(i not in unrotated) for i in layers]
    return raw
