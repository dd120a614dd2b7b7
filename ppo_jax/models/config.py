"""The static description of a decoder-only transformer; every family is a choice of its flags."""

import dataclasses
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
Quantise = Literal["none", "int8", "int4"]
Attention = Literal["auto", "xla", "cudnn", "splash"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Norm = Literal["rms", "layer"]
Place = Literal["before", "after", "both"]
HeadNorm = Literal["none", "head", "width"]
_OPTIONS = (("dtype", Dtype), ("remat", Remat), ("attention", Attention), ("quantise", Quantise))


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model is run, whatever its weights: memory against speed."""

    dtype: Dtype = "float32"
    """The base's parameters and activations have this type. What is trained is always float32, and cast where used."""
    remat: Remat = "none"
    """The backward pass computes again what costs little (none), attention too (dots), or whole layers (full)."""
    attention: Attention = "auto"
    """Attention runs in this implementation; auto is splash attention on TPUs, cuDNN on GPUs in bfloat16, else XLA."""
    quantise: Quantise = "none"
    """The frozen base's linear maps are kept as they are (none), or in 8 or 4 bits with scales (needs qwix)."""

    def __post_init__(self) -> None:
        for name, allowed in _OPTIONS:
            if getattr(self, name) not in allowed.__args__:  # type: ignore[attr-defined]
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed.__args__)}")  # type: ignore[attr-defined]

    def of(self, config: "ModelConfig") -> "ModelConfig":
        """The same model, run this way. Parameters must be given in `dtype` themselves."""
        return dataclasses.replace(config, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies (`rope_scaling` of a Hugging Face config).

    `linear` divides every frequency by `factor`. `llama3` leaves high frequencies alone, divides low ones by
    `factor` and interpolates between the two wavelength limits (Llama 3.1); so does `yarn`, between the pairs that turn
    `beta_fast` and `beta_slow` times (Peng et al. 2023). `dynamic` changes nothing up to `max_positions`, where this
    package stops. `longrope` divides each frequency by a number of its own (Ding et al. 2024); only `short` is used,
    since `max_positions` is the original context: with `long` the keys in a cache would change while a row grows.
    """

    kind: Literal["linear", "llama3", "dynamic", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    strength: float = 1.0  # multiplies cos and sin (yarn, longrope)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the limits are whole pairs
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


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
    norm: Norm = "rms"  # layer: LayerNorm, with biases
    norm_offset: bool = False  # norms multiply by 1 + weight
    norm_place: Place = "before"  # of attention and MLP: their input, their output, or both are normalised
    qk_norm: HeadNorm = "none"  # queries and keys are normalised, head by head or over all heads together
    activation: Activation = "silu"
    gated: bool = True  # down(activation(gate x) * up x); else down(activation(up x))
    parallel: bool = False  # attention and MLP read the same stream, and both are added to it
    learned_positions: bool = False  # a table of max_positions rows is added to the embedding; no rotary
    rotary_width: int | None = None  # the first entries of a head that are rotated; None: all of head_dim
    unrotated: tuple[int, ...] = ()  # layers without rotary positions
    window: int | None = None  # how many positions, its own included, a token sees in the layers `windowed`
    windowed: tuple[int, ...] = ()
    window_theta: float | None = None  # rope_theta of the layers `windowed`, without scaling; None: as in the others
    attention_scale: float | None = None  # of q k'; None: 1 / sqrt(head_dim)
    attention_cap: float | None = None  # scores become cap * tanh(scores / cap)
    embedding_scale: float = 1.0  # multiplies what enters the first layer
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the stream
    logit_divisor: float = 1.0  # divides the logits
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    family: str = "llama"  # the Hugging Face `model_type` that wrote it
    dtype: Dtype = "float32"  # of parameters and activations; norms and softmax stay float32
    quantise: Quantise = "none"  # how the linear maps of the base are kept, see `models.quantised`
    remat: Remat = "none"  # what the backward pass computes again, see ModelOptions
    attention: Attention = "auto"  # implementation, see ModelOptions
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tokenless: tuple[tuple[int, int], ...] = ()  # rows [start, stop) of the vocabulary that stand for no token

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if not self.learned_positions and self.rotated % 2:
            name = "head_dim" if self.rotary_width is None else "rotary_width"
            raise ValueError(f"{name}={self.rotated} is odd; rotary embeddings need an even one")

    @property
    def rotated(self) -> int:
        """How many entries of a head are rotated."""
        return self.head_dim if self.rotary_width is None else self.rotary_width

    @property
    def q_norm_width(self) -> int:
        """How many entries of the queries are normalised together."""
        return self.head_dim * (self.num_heads if self.qk_norm == "width" else 1)

    @property
    def k_norm_width(self) -> int:
        """How many entries of the keys are normalised together."""
        return self.head_dim * (self.num_kv_heads if self.qk_norm == "width" else 1)
