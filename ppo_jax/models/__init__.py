"""The trunk, its adapters and heads, and the files they come from."""

from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files.hf import load, save
from ppo_jax.models.transformer import apply, logits

__all__ = ["ModelConfig", "apply", "load", "logits", "save"]
