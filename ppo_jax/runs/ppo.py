"""One PPO run in one directory: what the command line and the experiments have in common.

The algorithm knows no files and no screens; here it gets them: run directory, checkpoints, metrics, evaluations with
samples, the live display, and the policy saved at the end.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.disk import replace_file
from ppo_jax.models.placement import place_on_mesh
from ppo_jax.rewards.combine import SplitReward
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.runs import dump
from ppo_jax.runs.checkpoints import resuming, store
from ppo_jax.runs.checkpoints.saving import leave, saver
from ppo_jax.runs.evaluation import earlier_evaluations, make_evaluator
from ppo_jax.runs.exports import export_policies
from ppo_jax.runs.facts import run_facts
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.output.writers import resilient, run_files, with_screen
from ppo_jax.runs.setup import Result, Setup
from ppo_jax.runs.signals import stop_requests
from ppo_jax.runs.start import make_fresh_state, prompt_batches_of, start_or_resume
from ppo_jax.train.host import host_iteration
from ppo_jax.train.loop import Interrupted, Stopped, assess, evaluation_due, train
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import check_hyper, check_scalars_of
from ppo_jax.train.ppo import make_host_iteration, make_iteration
from ppo_jax.train.state import TrainState
from ppo_jax.types import Frozen

FILTERED = {
    "ignore": "Ratios and KL are those of the policy, so the KL estimate may turn negative; --ppo.behaviour filtered "
    "makes the filtered distribution the policy, --ppo.behaviour importance weighs the loss by policy / behaviour.",
    "importance": "The loss of a token is weighed by policy / behaviour, at most hyper.importance_cap. The KL in the "
    "log, in the reward and for an adaptive coefficient is not, so its estimate may turn negative.",
    "filtered": "Ratios and KL are those of the filtered distribution.",
}


def run_ppo(directory: Path, setup: Setup, screen: Screen, resume: bool | resuming.Resume = "no") -> Result:
    """Trains by PPO in an opened run directory (`rundir.open_run`); unless `resume` is "no", from its last checkpoint.

    Writes config.yaml (once the checkpoint has been read), metrics.jsonl, TensorBoard events, samples.jsonl,
    checkpoints/, export/policy and, where another update than the last evaluated best, export/best.

    Raises:
      Interrupted, Stopped, Exploded: as `train.loop.train`; the message says which update is saved. An Interrupted run
        is saved as of its last update; where that fails it is Stopped.
      CheckpointSaveError: the last state could not be saved.
    """
    setup = _checked(setup)
    loop = setup.loop
    frozen = place_on_mesh(Frozen(setup.model.params, setup.reward.params))
    optimizer = make_optimizer(setup.ppo.optimizer)
    state = place_on_mesh(make_fresh_state(setup, optimizer))
    facts = run_facts(setup, state.policy)
    state, last, best = start_or_resume(directory, resume, state, setup, facts, screen)
    failures = _introduce(directory, setup, screen)
    evaluations = earlier_evaluations(directory)
    given: list[tuple[int, TrainState]] = []  # the last state that was to be saved
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(stop_requests(screen.message))
        meta = {"config": setup.config, "facts": facts, "best": best}  # `best` is filled as evaluations come
        keep = stack.enter_context(saver(directory / rundir.CHECKPOINTS, loop, meta, screen.message, last))
        keep.best = best.get("step")
        files = run_files(directory, screen, loop.wandb, setup.config)
        put_samples = resilient(rundir.write_samples, screen.message, rundir.SAMPLES)
        write = with_screen(files, screen, loop.updates)
        stopping = lambda: asked() is not None  # noqa: E731
        measure = make_evaluator(directory, setup, frozen, write, put_samples, screen, evaluations, stopping)

        def evaluate(step: int, state: TrainState) -> dict[str, float] | None:
            values = measure(step, state)
            note_best(step, state, values)
            return values

        write_again = functools.partial(_write_again, directory, setup.config, (put_samples, *files))

        def save(step: int, state: TrainState, due: bool) -> None:
            given[:] = [(step, state)]
            if due:  # what the checkpoint takes for written is tried once more
                write_again()
            keep(step, state, due)

        def note_best(step: int, state: TrainState, values: Mapping[str, float] | None) -> None:
            known, better = assess(state, values, loop)
            if better:
                best.update({"step": step, "metric": loop.best_metric, "value": float(known.best)})
                keep.best = step

        if done := int(state.step):  # the run was stopped between saving and evaluating, or before it noted the result
            values = evaluations.get(done)
            if evaluation_due(done, loop) and values is None and (values := evaluate(done, state)) is None:
                leave(Interrupted(f"stopped by {asked()} at update {done}"), keep, given)
            note_best(done, state, values)
            state, _ = assess(state, values, loop)
        prompts = prompt_batches_of(setup)
        try:
            state = train(
                state,
                frozen,
                _iteration(setup, optimizer, stopping),
                prompts,
                setup.hyper,
                loop,
                write=lambda step, values: write(step, "ppo", values),
                evaluate=evaluate,
                save=save,
                stop=lambda step: asked() or store.preempted(step),
                dump=dump.dumper(directory, setup, frozen, prompts),
                causes=failures.summary,
            )
        except Stopped as error:
            leave(error, keep, given)
        if keep.settle() != loop.updates:
            keep.insist(loop.updates, state)
        _last_words(screen, write_again(), failures)  # the last save may have made a removed directory again
    return export_policies(directory, setup, state, evaluations, best, screen.message)


def _checked(setup: Setup) -> Setup:
    """Raises ValueError for what cannot be trained, before anything is written."""
    setup.ppo.check_batch(setup.loop.batch_size)
    setup = setup._replace(hyper=check_hyper(setup.hyper))
    check_scalars_of(setup.ppo, setup.hyper)
    if (setup.hyper.ptx_coef > 0) != bool(setup.pretrain):
        raise ValueError(
            f"hyper.ptx_coef={setup.hyper.ptx_coef} and {len(setup.pretrain)} pretraining texts: give both"
        )
    return setup


def _introduce(directory: Path, setup: Setup, screen: Screen) -> FailureLog:
    """Writes the configuration, says what the user should know from the start, and where failed rewards are told of."""
    if setup.config:
        replace_file(directory / rundir.CONFIG, setup.config.encode())
    if setup.ppo.sampling.filtered:
        screen.message(
            "A filter or a repetition penalty is on: tokens are drawn from another distribution than the policy's. The "
            "mismatch is logged as behaviour_mismatch. " + FILTERED[setup.ppo.behaviour]
        )
    screen.labels.update({name: setup.labels.get(name, name) for name in setup.judges})
    setup.reward.failures.notify = screen.message
    return setup.reward.failures


def _write_again(directory: Path, config: str, writers: Sequence[Callable[[], int]]) -> int:
    """Tries what could not be written once more, and config.yaml where it was removed; the records still unwritten."""
    if config and directory.is_dir() and not (directory / rundir.CONFIG).exists():
        with contextlib.suppress(OSError):
            replace_file(directory / rundir.CONFIG, config.encode())
    return sum(again() for again in writers)


def _last_words(screen: Screen, lost: int, failures: FailureLog) -> None:
    if lost:
        screen.message(f"{lost} lines that could not be written (the messages above say where) are lost")
    if failures.counts:
        screen.message(f"rewards that failed, with evaluations: {failures.summary()}")


def _iteration(setup: Setup, optimizer: Any, stopping: Any) -> Any:
    if setup.reward.host is None:
        assert setup.reward.device is not None
        return make_iteration(setup.model.config, setup.ppo, optimizer, setup.reward.device)
    collect, learn = make_host_iteration(setup.model.config, setup.ppo, optimizer, setup.reward.device)
    texts, table = tuple(setup.prompts.texts), tuple(setup.prompts.metadata)
    reward, sampling = SplitReward(setup.reward.host), setup.ppo.sampling
    decode = functools.partial(setup.model.decode, special=setup.reward.special_tokens == "keep")
    return host_iteration(collect, learn, reward, decode, sampling, texts, table, stopping)
