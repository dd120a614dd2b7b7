"""The host's loop of all stages: step, time, write, evaluate, save, stop. Files and screens are behind its hooks."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Protocol, TypeAlias, TypeVar, get_args

import jax.numpy as jnp
import numpy as np
import optax

from ppo_jax.ops.means import means
from ppo_jax.rewards.failures import GivenUp, next_streak, none_scored, too_many
from ppo_jax.types import FloatOrOff, Hyper, Metrics, Off

State = TypeVar("State", bound=Any)
Step: TypeAlias = Callable[[State, int], tuple[State, Metrics]]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def of_earlier_code(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a file written before there was `log` stands for: `wandb` named a project, or was off."""
    rest = {name: value for name, value in fields.items() if name != "wandb"}
    asked = fields.get("wandb") not in (None, "", "off")
    return rest | ({"log": ["tensorboard", "wandb"], "project": fields["wandb"]} if asked else {})


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run is and what happens when."""

    updates: int = 40
    """The run has this many PPO iterations."""
    batch_size: int = 64
    """An iteration has this many prompts, with ppo.group_size responses each."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """The learning rate falls in this way from hyper.learning_rate over the run; linear and cosine end at 0."""
    warmup: int = 0
    """The learning rate first rises linearly for this many iterations."""
    eval_every: int = 10
    """Evaluations on held-out prompts are so many iterations apart, with one before and one after; 0 leaves those
    two."""
    checkpoint_every: int = 10
    """Checkpoints are this many iterations apart; the last one is always saved. 0 leaves only that."""
    keep: int = 2
    """This many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this stay as well; 0 means none."""
    best_metric: Annotated[str, Off("")] = "reward"
    """The checkpoint of the evaluation with the highest value of this stays; -name: the lowest; "" is off."""
    max_nonfinite: int = 20
    """At most this many steps in a row are skipped because loss or gradient was not finite; then the run stops."""
    max_kl: FloatOrOff = math.inf
    """The run stops beyond this KL to the reference (nats per response, mean of a batch); inf is off."""
    max_failed: Annotated[float, Off(1.0)] = 0.2
    """This fraction of a batch's rewards may fail; the run stops when more did in several batches. 1 is off."""
    max_failed_batches: int = 3
    """The run stops after this many batches in a row with more failed rewards than max_failed."""
    log: tuple[Tracker, ...] = ("tensorboard",)
    """Metrics go to metrics.jsonl, and to each of these: tensorboard, wandb, mlflow, trackio."""
    project: str = "ppo_jax"
    """Trackers hold the run in this project, which MLflow calls an experiment."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule={self.schedule!r} must be one of constant, linear, cosine")
        least = dict(updates=1, batch_size=1, warmup=0, eval_every=0, checkpoint_every=0, keep=1, keep_every=0)
        for name, allowed in (least | dict(max_nonfinite=1, max_failed_batches=1)).items():
            if getattr(self, name) < allowed:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {allowed}")
        if not self.max_kl > 0:
            raise ValueError(f"max_kl={self.max_kl} must be positive (infinity: off)")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed={self.max_failed} must lie in [0, 1]")
        if self.warmup >= self.updates:
            raise ValueError(f"warmup={self.warmup} must be shorter than updates={self.updates}")
        if len(set(self.log)) < len(self.log) or set(self.log) - set(get_args(Tracker)):
            raise ValueError(f"log={', '.join(self.log)} must be of {', '.join(get_args(Tracker))}, each once")
        if not self.project:
            raise ValueError("project is empty; trackers need the name of one")

    of_earlier_code = staticmethod(of_earlier_code)


@dataclasses.dataclass(frozen=True)
class OfflineLoop:
    """What happens when while a stage trains on fixed data."""

    eval_every: int = 0
    """Measurements on held-out data are so many optimizer steps apart, with one before and one after; 0 leaves those
    two."""
    checkpoint_every: int = 100
    """Checkpoints are this many optimizer steps apart; the last one is always saved. 0 leaves only that."""
    keep: int = 2
    """This many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this stay as well; 0 means none."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """The learning rate falls in this way over the stage; linear and cosine end at 0."""
    warmup: float = 0.0
    """The learning rate first rises linearly for this many optimizer steps, or, below 1, for this share of all."""
    best_metric: Annotated[str, Off("")] = "-loss"
    """The checkpoint of the measurement with the highest value of this stays; -name: the lowest; "" is off."""
    max_nonfinite: int = 20
    """At most this many steps in a row are skipped because loss or gradient was not finite; then the run stops."""
    log: tuple[Tracker, ...] = ("tensorboard",)
    """Metrics go to metrics.jsonl, and to each of these: tensorboard, wandb, mlflow, trackio."""
    project: str = "ppo_jax"
    """Trackers hold the run in this project, which MLflow calls an experiment."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < math.inf or self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup={self.warmup} must be a number of steps, or a share of all below 1")
        self.of(int(self.warmup) + 1)

    of_earlier_code = staticmethod(of_earlier_code)

    def of(self, steps: int) -> LoopConfig:
        """Say the same of a run of `steps` updates; an update is one optimizer step."""
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        warmup = min(math.ceil(self.warmup * steps), steps - 1) if self.warmup < 1 else int(self.warmup)
        return LoopConfig(updates=steps, batch_size=1, **same | {"warmup": warmup})

    @staticmethod
    def rate(peak: float, loop: LoopConfig) -> Callable[[int], float]:
        """Make step -> learning rate of such a run."""
        if loop.schedule == "linear" and not loop.warmup:
            return lambda step: peak * (1 - step / loop.updates)  # in all its digits
        return learning_rate(peak, loop)


class Stopped(RuntimeError):
    """Training ended before its last update, in good order: the state was given to `save` (unless `Exploded`)."""


class Interrupted(Stopped):
    """It ended because it was asked to; a run that goes on from here is the run that was not interrupted."""


class Exploded(Stopped):
    """The policy has left the reference too far behind. Its state is not saved: nobody wants to go on from it."""


def learning_rate(peak: float, loop: LoopConfig) -> Callable[[int], float]:
    """step -> learning rate; linear warm-up from peak / warmup, then the configured fall."""
    rest = loop.updates - loop.warmup
    falls = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }
    fall = falls[loop.schedule]
    return lambda step: peak * (step + 1) / loop.warmup if step < loop.warmup else float(fall(step - loop.warmup))


def schedule_hyper(hyper: Hyper, loop: LoopConfig) -> Callable[[int], Hyper]:
    """step -> the scalars of that step: `hyper` with the learning rate that the schedule gives it."""
    rate = learning_rate(hyper.learning_rate, loop)
    return lambda step: hyper._replace(learning_rate=rate(step))


class Hooks(Protocol):
    """What happens around the steps of `train`; files, screens and signals are behind it."""

    def write(self, done: int, values: Mapping[str, float]) -> None:
        """Records the metrics of the step by which `done` are done, now or at the next call of anything but `stop`."""

    def meanwhile(self) -> None:
        """Does what was put off: the device has the next step to work on."""

    def evaluate(self, done: int, state: Any) -> Mapping[str, float] | None:
        """Measures the state after `done` steps; None: it was given up, because the run is to stop."""

    def save(self, done: int, state: Any, due: bool) -> None:
        """Takes the state after `done` steps; with `due` it is to be on disk. The next step is donated its buffers."""

    def stop(self, done: int) -> str | None:
        """Why the run is to stop after `done` steps, or None; asked once after every step."""

    def dump(self, number: int, state: Any) -> str:
        """Writes down the batch of step `number`, which left `state`; returns where, for the message.

        Called only where every optimizer step of it was skipped, so that the parameters in `state` are those that the
        batch was made with.
        """

    def causes(self) -> str:
        """What made rewards fail so far, for the message."""


def train(state: State, step: Step[State], loop: LoopConfig, hooks: Hooks) -> State:
    """Runs steps state.step .. loop.updates - 1 and returns the last state.

    Args:
      state: has `step`, which is the data cursor, `nonfinite` and `best`; with rewards that may fail also `failing`.
      step: (state, its number) -> (state, metrics); a pure function but for what it is donated. For the record the
        metrics gain `seconds` and, where there are responses, `tokens_per_second` of these.

    Evaluations come before the checkpoint of their step, which so knows of them.

    Raises:
      Interrupted: `hooks.stop` gave a reason.
      Exploded: the KL passed `loop.max_kl`.
      Stopped: too many steps in a row were not finite, or too many rewards failed: several batches in a row, or all of
        the first evaluation.
    """
    start = int(state.step)
    if start == 0:
        measured = hooks.evaluate(0, state)
        if measured is None:  # it is due again where the run goes on from update 0
            hooks.save(0, state, True)
            raise Interrupted(f"stopped by {hooks.stop(0)} in the first evaluation")
        if measured.get("invalid_scores") == 1 and loop.max_failed < 1:
            hooks.save(0, state, True)
            raise Stopped(none_scored(hooks.causes()))
        state, _ = assess(state, measured, loop)
    for number in range(start, loop.updates):
        began = time.perf_counter()
        try:
            state, metrics = step(state, number)
        except GivenUp:
            hooks.save(number, state, True)
            raise Interrupted(f"stopped by {hooks.stop(number)} after update {number}") from None
        hooks.meanwhile()
        values, done = means(metrics), number + 1  # waits for the step
        hooks.write(done, values | _pace(metrics, time.perf_counter() - began))
        fault = _not_finite(done, int(state.nonfinite), loop)
        if not fault and values.get("kl", 0.0) > loop.max_kl:
            raise Exploded(_exploded(done, values["kl"], loop))
        state, failing = _count_failing(state, values, loop)
        if unscored := failing >= loop.max_failed_batches and not fault:
            fault = too_many(done, failing, values["invalid_scores"], loop.max_failed, hooks.causes())
        reason, best = hooks.stop(done), False
        if not fault and not reason and evaluation_due(done, loop):
            measured = hooks.evaluate(done, state)
            state, best = assess(state, measured, loop)
            reason = hooks.stop(done) if measured is None else None
        due = done == loop.updates or bool(loop.checkpoint_every and done % loop.checkpoint_every == 0)
        hooks.save(done, state, due or best or bool(fault) or bool(reason))
        if fault:
            if not unscored:
                same = values["nonfinite_updates"] == 1  # the parameters that the batch was made with
                fault += hooks.dump(number, state) if same else ". No batch is dumped: the policy has changed since"
            raise Stopped(fault)
        if reason:
            raise Interrupted(f"stopped by {reason} after update {done}")
    return state


def _pace(metrics: Metrics, seconds: float) -> dict[str, float]:
    if "response_length" not in metrics:
        return {"seconds": seconds}
    return {"seconds": seconds, "tokens_per_second": float(metrics["response_length"][0]) / seconds}


def _count_failing(state: State, values: Mapping[str, float], loop: LoopConfig) -> tuple[State, int]:
    """The state that knows how many batches in a row had too many rewards that failed, and that number."""
    if "invalid_scores" not in values:
        return state, 0
    before = int(state.failing)
    failing = next_streak(before, values["invalid_scores"], loop.max_failed)
    if failing != before:
        state = dataclasses.replace(state, failing=jnp.full_like(state.failing, failing))
    return state, failing


def assess(state: State, values: Mapping[str, float] | None, loop: LoopConfig) -> tuple[State, bool]:
    """The state that knows of an evaluation, and whether that was the best so far. Twice is the same as once."""
    name = loop.best_metric.removeprefix("-")
    value = (values or {}).get(name)
    if value is None or not math.isfinite(value):
        return state, False
    value = -value if loop.best_metric.startswith("-") else value
    best = np.float32(value) > np.asarray(state.best)
    return (dataclasses.replace(state, best=jnp.full_like(state.best, value)), True) if best else (state, False)


def evaluation_due(done: int, loop: LoopConfig) -> bool:
    """Whether the policy is evaluated after `done` iterations."""
    return done in (0, loop.updates) or bool(loop.eval_every and done % loop.eval_every == 0)


def _not_finite(done: int, skipped: int, loop: LoopConfig) -> str | None:
    """Why training must not go on after `done` iterations, and what to do; or None."""
    if skipped < loop.max_nonfinite:
        return None
    return (
        f"update {done}: the last {skipped} optimizer steps were skipped because the loss or a gradient was not "
        "finite (--loop.max-nonfinite). The parameters are those from before. Look at the batch, mend the model or "
        "the reward, or lower the learning rate, and go on with --resume"
    )


def _exploded(done: int, kl: float, loop: LoopConfig) -> str:
    """Update `done` sampled with the policy of update done - 1, so that one is already too far away."""
    return (
        f"update {done}: the KL of the policy after update {done - 1} to the reference is {kl:.4g} nats per response, "
        f"beyond --loop.max-kl {loop.max_kl:g}"
    )
