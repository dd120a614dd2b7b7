"""The host's loop around an iteration: schedule, time, evaluate, write, save. Files and screens come as functions."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppo_jax.rewards.base import HostReward
from ppo_jax.rewards.failures import next_streak, too_many
from ppo_jax.rollout import Sampling
from ppo_jax.train.ppo import Collect, Iteration, Learn
from ppo_jax.train.state import TrainState
from ppo_jax.types import Frozen, Hyper, Metrics, Prompts, Scores


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run is and what happens when."""

    updates: int = 40
    """PPO iterations."""
    batch_size: int = 64
    """Prompts per iteration, one response each."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls from hyper.learning_rate over the run; linear and cosine end at 0."""
    warmup: int = 0
    """Iterations in which the learning rate first rises linearly."""
    eval_every: int = 10
    """Iterations between evaluations on held-out prompts; always before the first and after the last. 0: only those."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; the last one is always saved. 0: only that."""
    keep: int = 2
    """Checkpoints kept."""
    max_failed: float = 0.2
    """Fraction of a batch's rewards that may fail; where more did in several batches in a row the run stops. 1: off."""
    max_failed_batches: int = 3
    """How many such batches in a row."""

    def __post_init__(self) -> None:
        for name, least in dict(
            updates=1, batch_size=1, warmup=0, eval_every=0, checkpoint_every=0, keep=1, max_failed_batches=1
        ).items():  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed={self.max_failed} must lie in [0, 1]")
        if self.warmup >= self.updates:
            raise ValueError(f"warmup={self.warmup} must be shorter than updates={self.updates}")


class Stopped(RuntimeError):
    """Training ended before its last update, in good order: the state was given to `save`."""


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


def train(
    state: TrainState,
    frozen: Frozen,
    iteration: Iteration,
    prompts: Callable[[int], Prompts],
    hyper: Hyper,
    loop: LoopConfig,
    *,
    write: Callable[[int, Mapping[str, float]], None],
    evaluate: Callable[[int, TrainState], None],
    save: Callable[[int, TrainState], None],
    causes: Callable[[], str] = lambda: "",
) -> TrainState:
    """Runs iterations state.step .. loop.updates - 1 and returns the last state.

    Args:
      prompts: step -> batch; a pure function of the step, so that `state.step` is the data cursor.
      write: called after every iteration with the number of iterations done and the metrics, which have gained
        `seconds` and `tokens_per_second` (of responses).
      causes: of the rewards that failed so far, for the message.
      evaluate, save: called when due; the state must not be kept, since the next iteration is donated its buffers.

    Raises:
      Stopped: too many rewards failed.
      FloatingPointError: a loss is no longer finite; what was saved before is untouched.
    """
    rate = learning_rate(hyper.learning_rate, loop)
    start, failing = int(state.step), 0
    if start == 0:
        evaluate(0, state)
    for step in range(start, loop.updates):
        began = time.perf_counter()
        state, metrics = iteration(state, frozen, prompts(step), hyper._replace(learning_rate=rate(step)))
        values = means(metrics)
        seconds = time.perf_counter() - began
        tokens = float(metrics["response_length"][0])
        write(step + 1, values | {"seconds": seconds, "tokens_per_second": tokens / seconds})
        _check_finite(step + 1, values)
        done = step + 1
        failing = next_streak(failing, values.get("invalid_scores", 0.0), loop.max_failed)
        if failing >= loop.max_failed_batches:
            save(done, state)
            raise Stopped(too_many(done, failing, values["invalid_scores"], loop.max_failed, causes()))
        if done == loop.updates or (loop.checkpoint_every and done % loop.checkpoint_every == 0):
            save(done, state)
        if evaluation_due(done, loop):
            evaluate(done, state)
    return state


def evaluation_due(done: int, loop: LoopConfig) -> bool:
    """Whether the policy is evaluated after `done` iterations."""
    return done in (0, loop.updates) or bool(loop.eval_every and done % loop.eval_every == 0)


def means(metrics: Metrics) -> dict[str, float]:
    """{name: total / count} on the host; NaN where nothing was counted."""
    host = jax.device_get(metrics)
    return {name: float(total / count) if count else math.nan for name, (total, count) in host.items()}


def _check_finite(step: int, values: Mapping[str, float]) -> None:
    smaller_steps = "lower --hyper.learning-rate, or --hyper.max-grad-norm"
    remedies = {
        "reward": "mend the reward (a score that failed must be marked invalid)",
        "policy_loss": smaller_steps,
        "value_loss": smaller_steps,
        "grad_norm": smaller_steps,
    }
    for name, remedy in remedies.items():
        # Where every reward failed the means are 0 / 0, and harmless; the gradient is a plain 0.
        measured = name == "grad_norm" or values.get("invalid_scores") != 1
        if measured and not math.isfinite(values[name]):
            raise FloatingPointError(
                f"update {step}: {name} is {values[name]}. The last checkpoint is from before; {remedy}, and resume"
            )


def host_iteration(
    collect: Collect,
    learn: Learn,
    reward: HostReward,
    decode: Callable[[np.ndarray], str],
    sampling: Sampling,
    texts: tuple[str, ...],
    metadata: tuple[dict, ...],
) -> Iteration:
    """An iteration whose reward is computed on the host between its two jitted halves.

    Args:
      decode: token ids -> text.
      texts, metadata: the prompts' table; `Prompts.index` is the row.
    """

    def iteration(state: TrainState, frozen: Frozen, prompts: Prompts, hyper: Hyper) -> tuple[TrainState, Metrics]:
        rollout = collect(state, frozen, prompts, hyper)
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.response_mask)
        responses = response_texts(tokens, mask, decode, sampling.stop_ids)
        rows = np.asarray(prompts.index)
        scores = as_scores(reward([texts[i] for i in rows], responses, [metadata[i] for i in rows]), len(rows))
        return learn(state, frozen, rollout, scores, hyper)

    return iteration


def as_scores(scores: Scores, rows: int) -> Scores:
    """A host reward's answer in the dtypes that the device expects; ValueError when it is not one number per row.

    A score that is not finite is invalid, whatever the reward said of it.
    """
    columns = {"reward": scores.reward, "valid": scores.valid, **scores.parts}
    for name, column in columns.items():
        if np.shape(column) != (rows,):
            raise ValueError(f"the reward returned {name} of shape {np.shape(column)} for {rows} responses")
    reward = np.asarray(scores.reward, np.float32)
    parts = {name: jnp.asarray(part, jnp.float32) for name, part in scores.parts.items()}
    return Scores(jnp.asarray(reward), jnp.asarray(np.asarray(scores.valid, bool) & np.isfinite(reward)), parts)


def response_texts(
    tokens: np.ndarray, response_mask: np.ndarray, decode: Callable[[np.ndarray], str], stop_ids: tuple[int, ...]
) -> list[str]:
    """The text of each response, [B,S] and [B,T] -> B strings, without the stop token that ended it."""
    length = response_mask.shape[1]
    keep = response_mask & ~np.isin(tokens[:, -length:], stop_ids)
    return [decode(row[-length:][on]) for row, on in zip(tokens, keep, strict=True)]
