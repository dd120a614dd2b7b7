"""One PPO run in one directory: what the command line and the experiments have in common.

The algorithm knows no files and no screens; here it gets them: run directory, checkpoints, metrics, evaluations with
samples, the live display, and the policy saved at the end.
"""

import contextlib
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import artifacts, checkpoint, metrics, rundir
from ppo_jax.data import left_pad, prompt_batches
from ppo_jax.display import Screen
from ppo_jax.models import hf
from ppo_jax.models.config import ModelConfig, ModelOptions
from ppo_jax.rewards.base import DeviceReward, HostReward
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.rollout import Sampling
from ppo_jax.train.evaluate import Evaluation, make_evaluate
from ppo_jax.train.loop import LoopConfig, as_scores, evaluation_due, host_iteration, response_texts, train
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.ppo import PPOConfig, check_hyper, make_host_iteration, make_iteration
from ppo_jax.train.state import TrainState, init_state, key_stream
from ppo_jax.types import Frozen, Hyper, Policy, Prompts, PyTree, Rollout

SAMPLES = 16  # held-out prompts whose responses are kept in samples.jsonl


class Model(NamedTuple):
    """A base model with its tokenizer."""

    name: str  # the path or hub name the user gave
    config: ModelConfig
    params: PyTree
    tokenizer: Any
    fingerprint: str  # of the weight files: adapters only fit the base they were trained on

    @property
    def pad_id(self) -> int:
        """Fills empty slots; masks say which those are, so any id serves."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a response: the model's EOS ids and the tokenizer's."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*self.config.eos_token_ids, *(() if own is None else (int(own),))}))

    def decode(self, ids: np.ndarray) -> str:
        """Token ids -> text without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class PromptSet(NamedTuple):
    """Prompts as token rows and as text, with whatever else the user gave for each."""

    rows: Sequence[Sequence[int]]
    texts: Sequence[str]
    metadata: Sequence[dict[str, Any]]


# A judge scores the responses of an evaluation: (rollout, prompts, responses) -> one number per row.
Judge = Callable[[Rollout, Sequence[str], Sequence[str]], np.ndarray]


class Setup(NamedTuple):
    """What a run is about. Exactly one of the two rewards is given."""

    model: Model
    adapter: PyTree  # the policy's, at the start
    prompts: PromptSet
    held_out: PromptSet
    ppo: PPOConfig
    hyper: Hyper
    loop: LoopConfig
    seed: int
    device_reward: DeviceReward | None = None
    reward_params: PyTree = None  # `Frozen.reward`
    host_reward: HostReward | None = None
    judges: Mapping[str, Judge] = {}
    failures: FailureLog | None = None  # what the reward tells of rows that it could not score


class Result(NamedTuple):
    """The trained policy, and the evaluations before and after."""

    policy: Policy
    before: dict[str, float]
    after: dict[str, float]


def load_model(path: str | Path, options: ModelOptions | None = None) -> Model:
    """A base with its tokenizer from a Hugging Face directory, a .gguf file or a hub name, to be run as `options` say.

    Raises ValueError or FileNotFoundError that name the file and what is wrong with it.
    """
    where = hf.resolve(path)
    options = options or ModelOptions()
    config, params = hf.load(where, options.dtype)
    tokenizer = hf.load_tokenizer(where)
    hf.check_vocabulary(config, tokenizer)
    return Model(str(path), options.of(config), params, tokenizer, artifacts.fingerprint(where))


def run_ppo(directory: Path, setup: Setup, screen: Screen, resume: bool = False) -> Result:
    """Trains by PPO in an opened run directory (`rundir.open_run`); with `resume` from its last checkpoint, if any.

    Writes metrics.jsonl, TensorBoard events, samples.jsonl, checkpoints/ and export/policy.
    """
    model, ppo, loop = setup.model, setup.ppo, setup.loop
    if (setup.device_reward is None) == (setup.host_reward is None):
        raise ValueError("a run needs exactly one reward: give device_reward or host_reward")
    ppo.check_batch(loop.batch_size)
    frozen = Frozen(model.params, setup.reward_params)
    optimizer = make_optimizer()
    check_hyper(setup.hyper)
    key = key_stream(setup.seed, "ppo")
    state = init_state(key, setup.adapter, model.config, optimizer, setup.hyper.kl_coef)
    checkpoints = directory / rundir.CHECKPOINTS
    if resume:
        state = _restored(directory, state, loop.updates, screen)
    if ppo.sampling.filtered:
        screen.message(
            "top-k or top-p is on: tokens are drawn from a filtered distribution, while ratios and KL are those of the "
            "whole one. Their mismatch is logged as behaviour_mismatch, and the KL estimate may turn negative."
        )
    failures = setup.failures or FailureLog()
    failures.notify = screen.message
    iteration = _iteration(setup, optimizer)
    batches = prompt_batches(setup.prompts.rows, loop.batch_size, setup.seed, model.pad_id)
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoint.open_manager(checkpoints, loop.keep))
        write = run_writer(directory, screen, loop.updates)
        evaluations: dict[int, dict[str, float]] = _earlier_evaluations(directory)
        evaluate = _evaluator(directory, setup, frozen, write, screen, evaluations)
        if (done := int(state.step)) and evaluation_due(done, loop) and done not in evaluations:
            evaluate(done, state)  # the run was stopped between saving and evaluating
        state = train(
            state,
            frozen,
            iteration,
            lambda step: jax.tree.map(jnp.asarray, batches[step]),
            setup.hyper,
            loop,
            write=lambda step, values: write(step, "ppo", values),
            evaluate=evaluate,
            save=lambda step, state: checkpoint.save(manager, step, state),
            causes=failures.summary,
        )
    if failures.counts:
        screen.message(f"rewards that failed, with evaluations: {failures.summary()}")
    after = evaluations[loop.updates]
    artifacts.save(
        directory / rundir.EXPORT / "policy",
        "policy",
        state.policy.adapter,
        state.policy.value_head,
        {"updates": loop.updates, "evaluation": after},
        config=model.config,
        base=model.name,
        base_fingerprint=model.fingerprint,
        overwrite=True,
    )
    return Result(state.policy, evaluations.get(0, {}), after)


def run_writer(directory: Path, screen: Screen, total: int | None = None) -> metrics.Writer:
    """Writes a step's values to metrics.jsonl, to TensorBoard and onto the screen."""
    files = metrics.combine(
        [
            metrics.jsonl_writer(directory / rundir.METRICS),
            metrics.tensorboard_writer(directory / rundir.TENSORBOARD, screen.message),
        ]
    )

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        files(step, phase, values)
        if phase in ("ppo", "eval"):  # the other phases know their own length
            screen.update(phase=phase, step=step, total=total, values=values)

    return write


def environment() -> dict[str, Any]:
    """Versions and machine, for the report."""
    names = ("ppo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: packages.version(name) for name in names},
        "machine": f"{jax.device_count()} x {device.device_kind} ({device.platform}), {platform.machine()}",
    }


def _iteration(setup: Setup, optimizer: Any) -> Any:
    if setup.device_reward is not None:
        return make_iteration(setup.model.config, setup.ppo, optimizer, setup.device_reward)
    assert setup.host_reward is not None
    collect, learn = make_host_iteration(setup.model.config, setup.ppo, optimizer)
    texts, table = tuple(setup.prompts.texts), tuple(setup.prompts.metadata)
    return host_iteration(collect, learn, setup.host_reward, setup.model.decode, setup.ppo.sampling, texts, table)


def _evaluator(
    directory: Path,
    setup: Setup,
    frozen: Frozen,
    write: metrics.Writer,
    screen: Screen,
    evaluations: dict[int, dict[str, float]],
) -> Callable[[int, TrainState], None]:
    """evaluate(step, state): scores the held-out prompts, writes phase "eval" and samples, fills `evaluations`."""
    run = make_evaluate(setup.model.config, setup.ppo.sampling, setup.device_reward)
    held_out = setup.held_out
    length = max(len(row) for row in [*held_out.rows, *setup.prompts.rows])
    tokens, mask = left_pad(held_out.rows, length, setup.model.pad_id)
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens)))
    key = key_stream(setup.seed, "evaluation")  # the same at every step: policies are compared on equal random numbers
    shown: dict[int, Any] = {}

    def evaluate(step: int, state: TrainState) -> None:
        result = run(state.policy, frozen, prompts, key, setup.hyper)
        responses = decode_responses(setup.model, setup.ppo.sampling, result.rollout)
        columns = _columns(setup, result, responses)
        values = _summary(columns, result.rollout)
        evaluations[step] = values
        write(step, "eval", values)
        scores = {name: column[:SAMPLES].tolist() for name, column in columns.items()}
        rundir.write_samples(directory, step, held_out.texts[:SAMPLES], responses[:SAMPLES], scores)
        shown[step] = (responses[:4], columns["reward"][:4].tolist())
        if step == setup.loop.updates and 0 in shown:
            (before, before_scores), (after, after_scores) = shown[0], shown[step]
            screen.sample(held_out.texts[:4], before, after, before_scores, after_scores)

    return evaluate


def decode_responses(model: Model, sampling: Sampling, rollout: Rollout) -> list[str]:
    """The text of every response."""
    return response_texts(
        np.asarray(rollout.tokens), np.asarray(rollout.response_mask), model.decode, sampling.stop_ids
    )


def _columns(setup: Setup, result: Evaluation, responses: Sequence[str]) -> dict[str, np.ndarray]:
    """One array per score, NaN where a reward failed; `reward/NAME` for the parts of a sum."""
    scores, held_out = result.scores, setup.held_out
    if scores is None:
        assert setup.host_reward is not None
        scores = as_scores(setup.host_reward(held_out.texts, responses, held_out.metadata), len(responses))
    valid = np.asarray(scores.valid)
    columns = {"reward": np.where(valid, np.asarray(scores.reward), np.nan)}
    columns |= {f"reward/{name}": np.where(valid, np.asarray(part), np.nan) for name, part in scores.parts.items()}
    columns |= {
        name: np.asarray(judge(result.rollout, held_out.texts, responses)) for name, judge in setup.judges.items()
    }
    return columns | {"kl": np.asarray(result.kl)}


def _summary(columns: Mapping[str, np.ndarray], rollout: Rollout) -> dict[str, float]:
    scored = {name: column[~np.isnan(column)] for name, column in columns.items()}
    values = {name: float(column.mean()) if column.size else math.nan for name, column in scored.items()}
    spread = {name: float(column.std(ddof=1)) if column.size > 1 else math.nan for name, column in scored.items()}
    values |= {f"{name}_std": value for name, value in spread.items()}
    values["invalid_scores"] = 1 - scored["reward"].size / columns["reward"].size
    tokens = np.asarray(rollout.response_mask).sum(axis=1)
    values["kl_per_token"] = float(columns["kl"].sum() / max(tokens.sum(), 1))
    values["response_length"] = float(tokens.mean())
    values["eos_rate"] = float(np.asarray(rollout.terminated).mean())
    return values


def _restored(directory: Path, state: TrainState, updates: int, screen: Screen) -> TrainState:
    """The state of the last checkpoint, or `state` where there is none; drops what the run wrote after it."""
    checkpoints = directory / rundir.CHECKPOINTS
    step = checkpoint.latest_step(checkpoints)
    if step is None:
        rundir.truncate_run(directory, -1)  # stopped before its first checkpoint: all is done again
        return state
    if step > updates:
        raise ValueError(
            f"{checkpoints} is at update {step}, beyond --loop.updates {updates}: give at least {step}, or another "
            "run directory"
        )
    state, step = checkpoint.restore(checkpoints, state)
    rundir.truncate_run(directory, step)
    screen.message(f"resumed at update {step}")
    return state


def _earlier_evaluations(directory: Path) -> dict[int, dict[str, float]]:
    """What an interrupted run had already evaluated."""
    return {
        record["step"]: {name: value for name, value in record.items() if name not in metrics.RESERVED}
        for record in metrics.read_jsonl(directory / rundir.METRICS)
        if record["phase"] == "eval"
    }
