"""The static choices of PPO and the ranges of its scalars: mistakes are found before anything compiles."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import optax
from jaxtyping import Array, Float

from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.config import ModelConfig
from ppo_jax.ops.kl import Kind
from ppo_jax.ops.losses import Aggregation
from ppo_jax.parallel import mesh
from ppo_jax.parallel.mesh import MeshConfig
from ppo_jax.rewards.base import DeviceReward
from ppo_jax.rollout import Sampling
from ppo_jax.train.optimizer import OptimizerConfig
from ppo_jax.types import Hyper, Metrics

# (policy, algorithm, frozen, minibatch, counts, hyper) -> loss, metrics: as `objective.ppo_loss`
Loss = Callable[..., tuple[Float[Array, ""], Metrics]]
# (algorithm, outcome, hyper) -> advantages, returns: as `experience.estimate_advantages`
Estimator = Callable[..., tuple[Float[Array, "B T"], Float[Array, "B T"]]]
Advantage = Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce", "reinforce++"]
GROUPED = ("rloo", "grpo", "dr_grpo")  # baselines from other responses to the same prompt


def check_choices(record: Any, **allowed: Any) -> None:
    """Raises ValueError where a field of `record` is not one of the values of its Literal type."""
    for name, kind in allowed.items():
        if getattr(record, name) not in get_args(kind):
            raise ValueError(f"{name}={getattr(record, name)!r} must be one of {', '.join(map(str, get_args(kind)))}")


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The KL penalty towards the reference."""

    estimator: Kind | Literal["full"] = "k1"
    """Per-token estimate (Schulman 2020): k1 is the log-ratio; full sums over the vocabulary, one more pass. In the
    reward only k1 has the gradient of the KL: full does not depend on the token drawn, so only later ones count."""
    place: Literal["reward", "loss"] = "reward"
    """Subtracted from the reward of each token (Ziegler et al. 2019), or a term of the loss (Shao et al. 2024)."""
    control: Literal["fixed", "adaptive", "linear"] = "fixed"
    """Of the coefficient hyper.kl_coef: steered to hyper.kl_target (Ziegler et al. 2019), or linear to kl_coef_end."""

    def __post_init__(self) -> None:
        check_choices(self, place=Literal["reward", "loss"], control=Literal["fixed", "adaptive", "linear"])
        if self.estimator not in (*get_args(Kind), "full"):
            raise ValueError(f"kl.estimator={self.estimator!r} must be one of {', '.join(get_args(Kind))}, full")
        if self.place == "loss" and self.estimator in ("k1", "abs"):
            raise ValueError(
                f"kl.estimator={self.estimator} cannot be a term of the loss: its gradient is not that of the KL (0 in "
                "expectation for k1). Choose k2 (the gradient of k1 in the reward), full, or k3 (biased)"
            )


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What happens to scores before they become rewards: normalised, clipped (hyper.score_clip), penalised."""

    normalise: Literal["off", "scale", "shift"] = "off"
    """By the running moments of all scores so far: divided by their std; shift also subtracts their mean."""
    missing_eos: Literal["off", "subtract", "replace"] = "off"
    """What hyper.missing_eos does to the score of a response that was cut by length."""
    whiten_rewards: Literal["off", "scale", "shift"] = "off"
    """Shaped rewards divided by their std over the batch (the mean stays); shift also subtracts their mean."""
    truncate_ids: tuple[int, ...] = ()
    """Token ids after whose first occurrence the rest of a response is dropped, before it is scored and trained."""

    def __post_init__(self) -> None:
        three = Literal["off", "scale", "shift"]
        check_choices(self, normalise=three, whiten_rewards=three, missing_eos=Literal["off", "subtract", "replace"])


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """Where values come from (advantage gae only)."""

    own: bool = False
    """An adapter of its own on the shared base, and a second pass; else the values are read from the policy's trunk."""
    adapter: AdapterConfig = AdapterConfig()
    """That adapter."""
    init: str = "zero"
    """Start from "zero", from "reward" (adapter and head of a LoRA reward model), or a run's export/critic (path)."""
    bootstrap_truncated: bool = False
    """A response cut by length goes on with the critic's value (one more pass); else it ends there like any other."""

    def __post_init__(self) -> None:
        if not self.own and self.adapter != AdapterConfig():
            raise ValueError("critic.adapter is that of a critic of its own; set critic.own, or leave it")
        if not self.own and self.init != "zero":
            raise ValueError(
                f"critic.init={self.init!r} brings a head that reads the states of its own adapter; set critic.own"
            )


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Static choices of the algorithm."""

    sampling: Sampling = Sampling()
    """How responses are generated."""
    epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 4
    """Optimizer steps per epoch; must divide the responses of a batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step; must divide the minibatch. Changes memory, not the result."""
    advantage: Advantage = "gae"
    """gae needs the critic; rloo, grpo, dr_grpo (grpo without the std), reinforce (running baseline) and reinforce++
    need none."""
    group_size: int = 1
    """Responses sampled for each prompt; rloo and both grpo need at least 2."""
    whiten_advantages: bool = True
    """Over all response tokens of the batch: gae, reinforce and reinforce++ (group-relative ones have a scale)."""
    aggregation: Aggregation = "token-mean"
    """How the tokens of responses of different lengths enter the loss."""
    behaviour: Literal["ignore", "importance", "filtered"] = "ignore"
    """When filters make the behaviour differ from the policy: ignore it (logged); weigh tokens by
    min(policy / behaviour, hyper.importance_cap); or treat the filtered distribution as the policy."""
    kl: KLConfig = KLConfig()
    """The penalty towards the reference."""
    score: ScoreConfig = ScoreConfig()
    """From scores to rewards."""
    critic: CriticConfig = CriticConfig()
    """Where values come from."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become steps."""
    ema_decay: float = 0.0
    """Of a running average of the policy's parameters over optimizer steps (in the state as `ema`); 0: off."""
    logprob_chunk: int = 0
    """Positions whose logits are held at once in the loss; 0: all of a micro-batch."""

    def __post_init__(self) -> None:
        for name in ("epochs", "num_minibatches", "accumulate", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_choices(
            self, advantage=Advantage, aggregation=Aggregation, behaviour=Literal["ignore", "importance", "filtered"]
        )
        if self.logprob_chunk < 0:
            raise ValueError(f"logprob_chunk={self.logprob_chunk} must be 0 (off) or positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1)")
        if self.advantage in GROUPED and self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: advantage={self.advantage} compares at least 2 responses")
        if self.advantage != "gae" and self.critic != CriticConfig():
            raise ValueError(f"critic options need advantage=gae; advantage={self.advantage} has no critic")
        if self.behaviour == "filtered" and self.kl.estimator == "full":
            raise ValueError(
                "kl.estimator=full is over the whole vocabulary; behaviour=filtered needs k1, k2, k3 or abs"
            )
        if self.behaviour == "filtered" and self.sampling.repetition_penalty != 1:
            raise ValueError("behaviour=filtered does not know a repetition penalty; choose importance, or ignore")

    @property
    def has_critic(self) -> bool:
        """Whether values are used at all."""
        return self.advantage == "gae"

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError unless the responses to `batch_size` prompts split into minibatches and micro-batches."""
        self.check_responses(
            batch_size * self.group_size, f"batch_size={batch_size} x group_size={self.group_size} does"
        )

    def check_responses(self, count: int, what: str = "") -> None:
        """Raises ValueError unless `count` responses split into minibatches and micro-batches."""
        pieces = self.num_minibatches * self.accumulate
        if count % pieces:
            raise ValueError(
                f"{what or f'{count} responses do'} not divide into num_minibatches={self.num_minibatches} x "
                f"accumulate={self.accumulate}; use a multiple of {pieces}"
            )


class Algorithm(NamedTuple):
    """What never changes in a run: compiled in, and the first argument of every step of the algorithm."""

    model: ModelConfig
    ppo: PPOConfig
    optimizer: optax.GradientTransformation
    reward: DeviceReward | None = None  # None: scores come from the host
    loss: Loss | None = None  # None: `objective.ppo_loss`
    advantage: Estimator | None = None  # None: `experience.estimate_advantages`


def check_scalars_of(ppo: PPOConfig, hyper: Hyper) -> None:
    """Raises ValueError for a scalar that is set and means nothing under these choices."""
    default = Hyper()
    for name in ("critic_lr_scale", "critic_max_grad_norm", "critic_warmup"):
        if not ppo.has_critic and getattr(hyper, name) != getattr(default, name):
            raise ValueError(f"hyper.{name} needs advantage=gae; advantage={ppo.advantage} has no critic")


def check_hyper(hyper: Hyper) -> Hyper:
    """The scalars as Python floats (an int would compile a second program).

    Raises ValueError for one outside its range, with the field's name and what is allowed.
    """
    values = Hyper(*(float(x) for x in hyper))
    for name, (allowed, fine) in _RANGES.items():
        if not fine(getattr(values, name)):
            raise ValueError(f"hyper.{name}={getattr(hyper, name)} must be {allowed}")
    return values


_POSITIVE = ("positive", lambda x: 0 < x < math.inf)
_POSITIVE_OR_OFF = ("positive (infinity: off)", lambda x: x > 0)
_AT_LEAST_0 = ("at least 0", lambda x: 0 <= x < math.inf)
_FINITE = ("finite", math.isfinite)
_SHARE = ("in [0, 1]", lambda x: 0 <= x <= 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": _POSITIVE,
    "temperature": _POSITIVE,
    "gamma": _SHARE,
    "lam": _SHARE,
    "max_grad_norm": _POSITIVE,
    "kl_coef": _AT_LEAST_0,
    "kl_target": _POSITIVE,
    "kl_horizon": _POSITIVE,
    "kl_coef_end": _AT_LEAST_0,
    "kl_steps": _POSITIVE,
    "score_clip": _POSITIVE_OR_OFF,
    "missing_eos": _FINITE,
    "length_penalty": _FINITE,
    "clip_low": ("in (0, 1]", lambda x: 0 < x <= 1),
    "clip_high": _POSITIVE,
    "dual_clip": ("greater than 1 (infinity: off)", lambda x: x > 1),
    "entropy_coef": _FINITE,
    "importance_cap": _POSITIVE_OR_OFF,
    "ptx_coef": _AT_LEAST_0,
    "target_kl": _POSITIVE_OR_OFF,
    "ratio_threshold": _POSITIVE_OR_OFF,
    "vf_coef": _AT_LEAST_0,
    "value_clip": _POSITIVE_OR_OFF,
    "huber_delta": _POSITIVE_OR_OFF,
    "critic_lr_scale": _POSITIVE,
    "critic_max_grad_norm": _AT_LEAST_0,
    "critic_warmup": _AT_LEAST_0,
}
assert set(_RANGES) == set(Hyper._fields)


def check_micro_batches(config: MeshConfig, batch_size: int, ppo: PPOConfig) -> None:
    """Raises ValueError when a micro-batch would not spread over the devices that cut the batch."""
    pieces = ppo.num_minibatches * ppo.accumulate
    group = f" x ppo.group_size={ppo.group_size}" if ppo.group_size > 1 else ""
    what = f"a micro-batch (loop.batch_size={batch_size}{group} / ({ppo.num_minibatches} x {ppo.accumulate}))"
    mesh.check_rows(batch_size * ppo.group_size // pieces, config, what)
