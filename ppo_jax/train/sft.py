"""Supervised fine-tuning: the policy learns to write the responses of demonstrations.

    loss = -1/N sum over response tokens of log pi(token | what stands before it),   N: those of the whole batch

(Ouyang et al. 2022, "Training language models to follow instructions with human feedback", step 1.) What counts as
response, its EOS included, is the batch's `loss_mask`; prompt tokens are read and never learnt. Any adapter may be
trained: LoRA, the last layers, or everything.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from ppo_jax.models.adapters import unembedding
from ppo_jax.models.config import ModelConfig
from ppo_jax.ops.logprobs import hidden_logprobs
from ppo_jax.rollout import role_hidden
from ppo_jax.types import Metrics, PyTree


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Static choices of supervised fine-tuning, and how long it goes on."""

    epochs: float = 1.0
    """Passes over the demonstrations, unless `steps` says otherwise."""
    steps: int = 0
    """Optimizer steps; 0: as many as `epochs` needs."""
    batch_size: int = 16
    """Demonstrations per optimizer step."""
    accumulate: int = 1
    """Micro-batches per optimizer step; must divide batch_size. Changes memory, not the result."""
    logprob_chunk: int = 256
    """Positions whose logits are held at once; 0: all of a micro-batch."""

    def __post_init__(self) -> None:
        for name, least in {"steps": 0, "batch_size": 1, "accumulate": 1, "logprob_chunk": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs={self.epochs} must be positive")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}")

    def num_steps(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` demonstrations."""
        return self.steps or math.ceil(self.epochs * rows / self.batch_size)


class Demonstrations(NamedTuple):
    """What the loss reads of a batch; `data.SFTBatch` has these fields."""

    tokens: Int[Shaped[Array, "..."], "B S"]
    mask: Bool[Array, "B S"]
    loss_mask: Bool[Array, "B S"]  # True on the tokens to be predicted from those before them


SFTStep = Callable[[PyTree, optax.OptState, PyTree, Any, Any, Any], tuple[PyTree, optax.OptState, Metrics]]
SFTLoss = Callable[[PyTree, PyTree, Any], Metrics]
