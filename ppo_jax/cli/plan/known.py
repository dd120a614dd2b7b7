"""Well-known models by name, from their published config.json: shapes for planning, no weights.

Sources: config.json of the repositories that the keys name, on the Hugging Face hub.
"""

import difflib
from typing import Any

from ppo_jax.models.config import ModelConfig, RopeScaling


def _llama(
    layers: int, width: int, inner: int, heads: int, head: int, scaling: float = 0.0, tied: bool = False
) -> ModelConfig:
    """Llama 3 (no scaling), 3.1 (8) and 3.2 (32)."""
    return ModelConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling("llama3", scaling, 1.0, 4.0, 8192) if scaling else None,
        tie_embeddings=tied,
        max_positions=131072 if scaling else 8192,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


def _qwen(layers: int, width: int, inner: int, heads: int, kv: int, **others: Any) -> ModelConfig:
    """Qwen2.5, base models; `others` are fields of ModelConfig in which the sizes differ."""
    return ModelConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=width // heads,
        rope_theta=1_000_000.0,
        attention_bias=True,
        family="qwen2",
        eos_token_ids=(151643,),
        **others,
    )


def _smol(layers: int, width: int, inner: int, heads: int, kv: int, theta: float) -> ModelConfig:
    """SmolLM2, base models."""
    return ModelConfig(
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=64,
        rope_theta=theta,
        tie_embeddings=True,
        max_positions=8192,
        bos_token_id=0,
        eos_token_ids=(0,),
    )


def _small_qwen(layers: int, width: int, inner: int, heads: int, positions: int = 32768) -> ModelConfig:
    return _qwen(layers, width, inner, heads, 2, vocab_size=151936, norm_eps=1e-6, max_positions=positions)


def _large_qwen(layers: int, width: int, inner: int, heads: int, kv: int = 8, eps: float = 1e-5) -> ModelConfig:
    untied = {"vocab_size": 152064, "tie_embeddings": False}
    return _qwen(layers, width, inner, heads, kv, norm_eps=eps, max_positions=131072, **untied)


KNOWN: dict[str, ModelConfig] = {
    "meta-llama/Meta-Llama-3-8B": _llama(32, 4096, 14336, 32, 128),
    "meta-llama/Meta-Llama-3-70B": _llama(80, 8192, 28672, 64, 128),
    "meta-llama/Llama-3.1-8B": _llama(32, 4096, 14336, 32, 128, 8.0),
    "meta-llama/Llama-3.1-70B": _llama(80, 8192, 28672, 64, 128, 8.0),
    "meta-llama/Llama-3.2-1B": _llama(16, 2048, 8192, 32, 64, 32.0, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(28, 3072, 8192, 24, 128, 32.0, tied=True),
    "Qwen/Qwen2.5-0.5B": _small_qwen(24, 896, 4864, 14),
    "Qwen/Qwen2.5-1.5B": _small_qwen(28, 1536, 8960, 12, positions=131072),
    "Qwen/Qwen2.5-3B": _small_qwen(36, 2048, 11008, 16),
    "Qwen/Qwen2.5-7B": _large_qwen(28, 3584, 18944, 28, kv=4, eps=1e-6),
    "Qwen/Qwen2.5-14B": _large_qwen(48, 5120, 13824, 40),
    "Qwen/Qwen2.5-32B": _large_qwen(64, 5120, 27648, 40),
    "Qwen/Qwen2.5-72B": _large_qwen(80, 8192, 29568, 64),
    "HuggingFaceTB/SmolLM2-135M": _smol(30, 576, 1536, 9, 3, 100_000.0),
    "HuggingFaceTB/SmolLM2-360M": _smol(32, 960, 2560, 15, 5, 100_000.0),
    "HuggingFaceTB/SmolLM2-1.7B": _smol(24, 2048, 8192, 32, 32, 130_000.0),
}


def short_name(name: str) -> str:
    """Shorten `meta-llama/Meta-Llama-3-8B` to `llama-3-8b`."""
    return name.split("/")[-1].lower().removeprefix("meta-")


def known_config(name: str) -> ModelConfig:
    """Find the configuration of a well-known model, by its name on the hub or the last part of it, in any case.

    Raises ValueError with the nearest name, or all of them, for any other.
    """
    configs = {short_name(key): config for key, config in KNOWN.items()}
    if short_name(name) in configs:
        return configs[short_name(name)]
    near = difflib.get_close_matches(short_name(name), configs, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known by name: {', '.join(configs)}"
    raise ValueError(f"model {name!r} is neither a directory with a config.json nor a known size; {hint}")
