"""PPO-based RLHF for language models as pure functions in JAX. The names below are the public ones."""

from ppo_jax.models import ModelConfig, apply, load, logits, save
from ppo_jax.models.adapters import AdapterConfig, init_adapter, merge
from ppo_jax.models.heads import RewardHead, ValueHead
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rewards.base import Reward
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.experience import make_experience
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, PPOConfig
from ppo_jax.train.ppo import iterate, make_host_iteration, make_iteration
from ppo_jax.train.state import TrainState, init_state
from ppo_jax.types import Experience, Frozen, Hyper, Minibatch, Policy, Prompts, Rollout, Scores

__all__ = [
    "AdapterConfig",
    "Algorithm",
    "Experience",
    "Frozen",
    "Hyper",
    "Minibatch",
    "Model",
    "ModelConfig",
    "PPOConfig",
    "Policy",
    "Prompts",
    "Reward",
    "RewardHead",
    "RewardRole",
    "Rollout",
    "Sampling",
    "Scores",
    "TrainState",
    "ValueHead",
    "adapter_reward",
    "apply",
    "generate",
    "init_adapter",
    "init_state",
    "iterate",
    "load",
    "load_model",
    "logits",
    "make_experience",
    "make_host_iteration",
    "make_iteration",
    "make_optimizer",
    "merge",
    "save",
]
