"""The static description of a decoder-only transformer of the Llama family."""

import dataclasses
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Attention = Literal["auto", "xla", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model is run, whatever its weights: memory against speed."""

    dtype: Dtype = "float32"
    """The base's parameters and activations have this type. What is trained is always float32, and cast where used."""
    remat: Remat = "none"
    """The backward pass computes again what costs little (none), attention too (dots), or whole layers (full)."""
    attention: Attention = "auto"
    """Attention runs in this implementation; auto is splash attention on TPUs, cuDNN on GPUs in bfloat16, else XLA."""

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", Dtype), ("remat", Remat), ("attention", Attention)):
            if getattr(self, name) not in allowed.__args__:  # type: ignore[attr-defined]
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed.__args__)}")  # type: ignore[attr-defined]

    def of(self, config: "ModelConfig") -> "ModelConfig":
        """The same model, run this way. Parameters must be given in `dtype` themselves."""
        return dataclasses.replace(config, dtype=self.dtype, remat=self.remat, attention=self.attention)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies (`rope_scaling` of a Hugging Face config).

    `linear` divides every frequency by `factor`. `llama3` leaves high frequencies alone, divides low ones by
    `factor` and interpolates between the two wavelength limits (Llama 3.1).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and choices that are compiled into the program.

    Parameters are a nested dict, all layers stacked on axis 0, linear maps as [in, out]; `models.layout.TENSORS` has a
    row for each.
    """

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int
    num_kv_heads: int  # K; query head i reads key/value head i // (num_heads / K)
    head_dim: int  # H
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False  # bias on q, k, v
    output_bias: bool = False  # bias on o
    mlp_bias: bool = False
    max_positions: int = 2048
    family: str = "llama"  # the Hugging Face `model_type` that wrote it
    dtype: Dtype = "float32"  # of parameters and activations; norms and softmax stay float32
    remat: Remat = "none"  # what the backward pass computes again, see ModelOptions
    attention: Attention = "auto"  # implementation, see ModelOptions
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tokenless: tuple[tuple[int, int], ...] = ()  # rows [start, stop) of the vocabulary that stand for no token

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even one")
