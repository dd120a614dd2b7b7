"""The static choices of PPO and the ranges of its scalars: mistakes are found before anything compiles."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args

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
from ppo_jax.types import Hyper, Metrics, Off

# (policy, algorithm, frozen, minibatch, counts, hyper) -> loss, metrics: as `objective.ppo_loss`
Loss = Callable[..., tuple[Float[Array, ""], Metrics]]
# (algorithm, outcome, hyper) -> advantages, returns: as `experience.estimate_advantages`
Estimator = Callable[..., tuple[Float[Array, "B T"], Float[Array, "B T"]]]
PrefixDtype = Literal["compute", "bfloat16"]
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
    """The KL is estimated per token (Schulman 2020): k1 is the log-ratio; full sums over the vocabulary, one more pass.
    In the reward only k1 has the gradient of the KL: full does not depend on the token drawn, so only later ones
    count."""
    place: Literal["reward", "loss"] = "reward"
    """The penalty is subtracted from each token's reward (Ziegler et al. 2019), or a term of the loss (Shao et al.
    2024), where k2 and full have the gradient of the KL of the same token only: another optimum (`kl.per`)."""
    per: Literal["token", "response"] = "token"
    """With k2 in the loss this squares each token's log-ratio, or a response's sum of them, whose gradient is that of
    the KL of whole responses, as k1 has it in the reward (with a higher variance)."""
    reference: Literal["base", "start"] = "base"
    """The KL is to the base, or to the adapter that --start names, as it is before training."""
    control: Literal["fixed", "adaptive", "linear"] = "fixed"
    """The coefficient hyper.kl_coef stays, is steered to hyper.kl_target (Ziegler et al. 2019), or goes linearly to
    hyper.kl_coef_end."""

    def __post_init__(self) -> None:
        check_choices(self, place=Literal["reward", "loss"], control=Literal["fixed", "adaptive", "linear"])
        check_choices(self, per=Literal["token", "response"], reference=Literal["base", "start"])
        if self.per == "response" and (self.place, self.estimator) != ("loss", "k2"):
            raise ValueError("kl.per=response is for kl.place=loss with kl.estimator=k2; leave it at token")
        if self.estimator not in (*get_args(Kind), "full"):
            raise ValueError(f"kl.estimator={self.estimator!r} must be one of {', '.join(get_args(Kind))}, full")
        if self.place == "loss" and self.estimator in ("k1", "abs"):
            raise ValueError(
                f"kl.estimator={self.estimator} cannot be a term of the loss: its gradient is not that of the KL (0 in "
                "expectation for k1). Choose k2 (with kl.per=response the gradient of k1 in the reward), full, or k3 "
                "(biased)"
            )


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What happens to scores before they become rewards: normalised, clipped (hyper.score_clip), penalised."""

    normalise: Literal["auto", "off", "scale", "shift"] = "off"
    """Scores are divided by the running std of all scores so far (scale); shift also subtracts their mean. With auto
    `ppo-jax ppo` takes scale, unless one reward model gives them with std 1; elsewhere auto does nothing."""
    missing_eos: Literal["off", "subtract", "replace"] = "off"
    """The score of a response cut by length loses hyper.missing_eos (subtract), or becomes minus that (replace)."""
    whiten_rewards: Literal["off", "scale", "shift"] = "off"
    """Shaped rewards are divided by their std over the batch (the mean stays); shift also subtracts their mean."""
    truncate_ids: tuple[int, ...] = ()
    """A response is cut off after the first of these token ids, before it is scored and trained."""

    def __post_init__(self) -> None:
        three = Literal["off", "scale", "shift"]
        check_choices(self, normalise=Literal["auto", "off", "scale", "shift"], whiten_rewards=three)
        check_choices(self, missing_eos=Literal["off", "subtract", "replace"])


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """Where values come from (advantage gae only)."""

    own: bool = False
    """Give the critic an adapter of its own on the base, and a second pass; else values are read from the policy's
    trunk."""
    adapter: AdapterConfig = AdapterConfig()
    """These options describe the adapter of a critic of its own."""
    init: str = "zero"
    """The critic starts from "zero", "reward" (adapter and head of a LoRA reward model), or a run's export/critic
    (path)."""
    bootstrap_truncated: bool = False
    """Let a response cut by length go on with the critic's value (one more pass); else it ends there like any other."""

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
    """These options say how responses are generated."""
    epochs: int = 4
    """Each rollout is passed over this many times."""
    num_minibatches: int = 4
    """An epoch has this many optimizer steps, a divisor of the responses of a batch."""
    accumulate: int = 1
    """An optimizer step has this many micro-batches, a divisor of the minibatch. It changes memory, not the result."""
    length_buckets: Annotated[int, Off(1)] = 1
    """Micro-batches hold responses of similar length, cut to the first that fits of this many: T, T / 2, T / 4, ...
    1 is off. It changes seconds, not the result, and compiles the loss so many times."""
    prompt_buckets: Annotated[int, Off(1)] = 1
    """A batch has the first that holds all its prompts of this many widths: P, P / 2, P / 4, ..., P being the longest
    prompt of all. 1 is off. It changes seconds, not the result, and compiles the iteration so many times at most."""
    advantage: Advantage = "gae"
    """Advantages come from gae, which needs the critic, or from rloo, grpo, dr_grpo (grpo without the std), reinforce
    (running baseline) or reinforce++, which need none."""
    group_size: int = 1
    """Each prompt gets this many responses; rloo and both grpo need at least 2."""
    whiten_advantages: bool = True
    """Whiten over all response tokens of the batch, with gae, reinforce, reinforce++ (group-relative ones have a
    scale)."""
    aggregation: Aggregation = "token-mean"
    """The tokens of responses of different lengths enter the loss in this way."""
    behaviour: Literal["ignore", "importance", "filtered"] = "ignore"
    """Filters make the behaviour differ from the policy: ignore it (logged); weigh tokens by min(policy / behaviour,
    hyper.importance_cap); or treat the filtered distribution as the policy."""
    kl: KLConfig = KLConfig()
    """These options describe the penalty towards the reference."""
    score: ScoreConfig = ScoreConfig()
    """These options say how scores become rewards."""
    critic: CriticConfig = CriticConfig()
    """These options say where values come from."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """These options say how gradients become steps."""
    ema_decay: Annotated[float, Off(0.0)] = 0.0
    """A running average of the policy's parameters over optimizer steps (`ema` in the state) decays by this; 0 is
    off."""
    logprob_chunk: int = 0
    """The loss holds the logits of this many positions at once; 0 means all of a micro-batch."""
    prefix_dtype: PrefixDtype = "compute"
    """The activations below the layers of policy, critic, reference and rewards are kept as computed, or rounded to
    bfloat16: half the memory of float32, and log-probs move by the rounding."""

    def __post_init__(self) -> None:
        for name in ("epochs", "num_minibatches", "accumulate", "length_buckets", "prompt_buckets", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_choices(
            self,
            advantage=Advantage,
            aggregation=Aggregation,
            behaviour=Literal["ignore", "importance", "filtered"],
            prefix_dtype=PrefixDtype,
        )
        if self.length_buckets > 1 and self.aggregation == "constant":
            raise ValueError(
                f"length_buckets={self.length_buckets} cuts responses, and aggregation=constant counts their whole "
                "length; leave length_buckets at 1, or choose another aggregation"
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
    for name, reads in (("gamma", ("gae", "reinforce++")), ("lam", ("gae",))):
        if ppo.advantage not in reads and getattr(hyper, name) != getattr(default, name):
            raise ValueError(
                f"hyper.{name}={getattr(hyper, name)} has no effect under advantage={ppo.advantage}, which compares "
                f"whole responses; leave it at {getattr(default, name)}, or choose {' or '.join(reads)}"
            )
    read = {
        ("kl_target", "kl_horizon"): (ppo.kl.control == "adaptive", "ppo.kl.control=adaptive"),
        ("kl_coef_end", "kl_steps"): (ppo.kl.control == "linear", "ppo.kl.control=linear"),
        ("missing_eos",): (ppo.score.missing_eos != "off", "ppo.score.missing_eos"),
        ("importance_cap",): (ppo.behaviour == "importance", "ppo.behaviour=importance"),
        ("vf_coef", "value_clip", "huber_delta"): (ppo.has_critic, "advantage=gae"),
    }
    for names, (used, by) in read.items():
        for name in names:
            if not used and getattr(hyper, name) != getattr(default, name):
                raise ValueError(f"hyper.{name}={getattr(hyper, name)} has no effect without {by}; choose that too")
    if ppo.kl.control == "adaptive" and hyper.kl_coef == 0:
        raise ValueError("hyper.kl_coef=0 stays 0 under ppo.kl.control=adaptive, which multiplies it; start above 0")


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
