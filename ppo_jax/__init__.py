"""PPO-based RLHF for language models as pure functions in JAX. The names below are the public ones."""

from ppo_jax.models import ModelConfig, apply, load, save
from ppo_jax.models.adapters import AdapterConfig, init_adapter, merge
from ppo_jax.models.heads import RewardHead, ValueHead
from ppo_jax.rewards.adapter import RewardRole, adapter_reward
from ppo_jax.rewards.base import Reward
from ppo_jax.rollout import Sampling, generate
from ppo_jax.train.experience import make_experience
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import PPOConfig
from ppo_jax.train.ppo import make_host_iteration, make_iteration
from ppo_jax.train.state import TrainState, init_state
from ppo_jax.types import Experience, Frozen, Hyper, Minibatch, Policy, Prompts, Rollout, Scores

__all__ = [
    "AdapterConfig",
    "Experience",
    "Frozen",
    "Hyper",
    "Minibatch",
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
    "load",
    "make_experience",
    "make_host_iteration",
    "make_iteration",
    "make_optimizer",
    "merge",
    "save",
]
