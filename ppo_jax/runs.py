"""One PPO run in one directory: what the command line and the experiments have in common.

The algorithm knows no files and no screens; here it gets them: run directory, checkpoints, metrics, evaluations with
samples, the live display, and the policy saved at the end.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax import artifacts, checkpoint, faults, metrics, processes, resuming, rundir
from ppo_jax.artifacts import BEST, CRITIC, EMA, POLICY
from ppo_jax.data import prompt_batches, sft_batches
from ppo_jax.display import Screen
from ppo_jax.evaluation import earlier_evaluations, make_evaluator
from ppo_jax.facts import environment, run_facts
from ppo_jax.interrupt import stop_requests
from ppo_jax.models import hf
from ppo_jax.models.adapters import init_adapter
from ppo_jax.models.config import ModelOptions
from ppo_jax.rewards.adapter import RewardRole
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.saving import leave, saver
from ppo_jax.setup import Judge, Model, PromptSet, Result, Setup, decode_responses
from ppo_jax.train.loop import Interrupted, Stopped, assess, evaluation_due, host_iteration, train
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import check_hyper, check_scalars_of
from ppo_jax.train.ppo import make_host_iteration, make_iteration
from ppo_jax.train.state import TrainState, init_state, key_stream, value_head_of_reward
from ppo_jax.types import Frozen, Policy, Prompts, Texts

FILTERED = {
    "ignore": "Ratios and KL are those of the policy, so the KL estimate may turn negative; --ppo.behaviour filtered "
    "makes the filtered distribution the policy, --ppo.behaviour importance weighs the loss by policy / behaviour.",
    "importance": "The loss of a token is weighed by policy / behaviour, at most hyper.importance_cap. The KL in the "
    "log, in the reward and for an adaptive coefficient is not, so its estimate may turn negative.",
    "filtered": "Ratios and KL are those of the filtered distribution.",
}


def load_model(path: str | Path, options: ModelOptions | None = None) -> Model:
    """A base with its tokenizer from a Hugging Face directory, a .gguf file or a hub name, to be run as `options` say.

    Raises ValueError or FileNotFoundError that name the file and what is wrong with it.
    """
    where = hf.resolve(path)
    options = options or ModelOptions()
    config, params = hf.load(where, options.dtype, processes.current_mesh())
    tokenizer = hf.load_tokenizer(where)
    hf.check_vocabulary(config, tokenizer)
    return Model(str(path), options.of(config), params, tokenizer, artifacts.fingerprint(where))


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
    frozen = processes.laid_out(Frozen(setup.model.params, setup.reward_params))
    optimizer = make_optimizer(setup.ppo.optimizer)
    state = processes.laid_out(_fresh_state(setup, optimizer))
    facts = run_facts(setup, state.policy)
    state, last, best = _start(directory, resume, state, setup, facts, screen)
    failures = _introduce(directory, setup, screen)
    evaluations = earlier_evaluations(directory)
    given: list[tuple[int, TrainState]] = []  # the last state that was to be saved
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(stop_requests(screen.message))
        meta = {"config": setup.config, "facts": facts, "best": best}  # `best` is filled as evaluations come
        keep = stack.enter_context(saver(directory / rundir.CHECKPOINTS, loop, meta, screen.message, last))
        keep.best = best.get("step")
        files = _files(directory, screen, loop.wandb, setup.config)
        put_samples = metrics.resilient(rundir.write_samples, screen.message, rundir.SAMPLES)
        write = _shown(files, screen, loop.updates)
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
        prompts = _batches(setup)
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
                stop=lambda step: asked() or checkpoint.preempted(step),
                dump=faults.dumper(directory, setup, frozen, prompts),
                causes=failures.summary,
            )
        except Stopped as error:
            leave(error, keep, given)
        if keep.settle() != loop.updates:
            keep.insist(loop.updates, state)
        _last_words(screen, write_again(), failures)  # the last save may have made a removed directory again
    return _export(directory, setup, state, evaluations, best, screen.message)


def _checked(setup: Setup) -> Setup:
    """Raises ValueError for what cannot be trained, before anything is written."""
    if (setup.device_reward is None) == (setup.host_reward is None):
        raise ValueError("a run needs exactly one reward: give device_reward or host_reward")
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
        metrics.replace_file(directory / rundir.CONFIG, setup.config.encode())
    if setup.ppo.sampling.filtered:
        screen.message(
            "A filter or a repetition penalty is on: tokens are drawn from another distribution than the policy's. The "
            "mismatch is logged as behaviour_mismatch. " + FILTERED[setup.ppo.behaviour]
        )
    screen.labels.update({name: setup.labels.get(name, name) for name in setup.judges})
    failures = setup.failures or FailureLog()
    failures.notify = screen.message
    return failures


def _write_again(directory: Path, config: str, writers: Sequence[Callable[[], int]]) -> int:
    """Tries what could not be written once more, and config.yaml where it was removed; the records still unwritten."""
    if config and directory.is_dir() and not (directory / rundir.CONFIG).exists():
        with contextlib.suppress(OSError):
            metrics.replace_file(directory / rundir.CONFIG, config.encode())
    return sum(again() for again in writers)


def _last_words(screen: Screen, lost: int, failures: FailureLog) -> None:
    if lost:
        screen.message(f"{lost} lines that could not be written (the messages above say where) are lost")
    if failures.counts:
        screen.message(f"rewards that failed, with evaluations: {failures.summary()}")


def _batches(setup: Setup) -> Callable[[int], Prompts]:
    """step -> the prompts of that update, with its pretraining texts where there are some: a function of step alone."""
    rows, size, pad = setup.prompts.rows, setup.loop.batch_size, setup.model.pad_id
    prompts = prompt_batches(rows, size, setup.seed, pad)
    if not setup.pretrain:
        return lambda step: processes.feed(prompts[step])
    responses, seed = size * setup.ppo.group_size, setup.seed + 1  # an order of their own
    if len(setup.pretrain) < responses:
        raise ValueError(f"{len(setup.pretrain)} pretraining texts, but an update has {responses} responses: give more")
    texts = sft_batches(setup.pretrain, [0] * len(setup.pretrain), responses, seed, pad)
    return lambda step: processes.feed(prompts[step]._replace(pretrain=Texts(texts[step].tokens, texts[step].mask)))


def run_writer(directory: Path, screen: Screen, total: int | None = None) -> metrics.Writer:
    """Writes a step's values to metrics.jsonl, to TensorBoard and onto the screen.

    A file that cannot be written is reported and tried again; it does not end the run. Only the first process writes.
    """
    return _shown(_files(directory, screen), screen, total)


def _shown(
    writers: Sequence[metrics.Writer], screen: Screen, total: int | None
) -> Callable[[int, str, Mapping[str, float]], None]:
    files = metrics.combine(writers)

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        files(step, phase, values)
        if phase in ("ppo", "eval"):  # the other phases know their own length
            screen.update(phase=phase, step=step, total=total, values=values)

    return write


def _files(directory: Path, screen: Screen, wandb: str = "", config: str = "") -> list[Callable[..., int]]:
    """One writer for each place; called without arguments it tries again what it could not write."""
    if jax.process_index():
        return []
    say = screen.message
    tensorboard = metrics.tensorboard_writer(directory / rundir.TENSORBOARD, say)
    writers = [
        metrics.resilient(metrics.jsonl_writer(directory / rundir.METRICS), say, rundir.METRICS),
        metrics.resilient(tensorboard, say, f"{rundir.TENSORBOARD}/"),
    ]
    if wandb:
        online = metrics.wandb_writer(wandb, directory, {"yaml": config})
        writers.append(metrics.resilient(online, say, "Weights & Biases", (Exception,)))
    return writers


def _fresh_state(setup: Setup, optimizer: Any) -> TrainState:
    """The state before the first update, with the critic that the configuration asks for."""
    ppo, model = setup.ppo, setup.model
    critic, value_head = None, None
    if ppo.critic.own:
        key = key_stream(setup.seed, "critic")
        fresh = lambda k, base: init_adapter(k, base, model.config, ppo.critic.adapter)  # noqa: E731
        critic = processes.created(fresh, key, model.params)
    if ppo.critic.init == "reward":
        if not isinstance(setup.reward_params, RewardRole):
            raise ValueError('ppo.critic.init="reward" needs a LoRA reward model on the same base as the only reward')
        value_head = value_head_of_reward(setup.reward_params.head)
        critic = setup.reward_params.adapter if ppo.critic.own else None
    elif ppo.critic.init != "zero":
        found = artifacts.load(ppo.critic.init, "policy")
        artifacts.check_base(found, model.fingerprint, model.config)
        critic, value_head = found.adapter if ppo.critic.own else None, found.head
    key, ema = key_stream(setup.seed, "ppo"), ppo.ema_decay > 0
    return init_state(
        key, setup.adapter, model.config, optimizer, setup.hyper.kl_coef, critic=critic, value_head=value_head, ema=ema
    )


def _iteration(setup: Setup, optimizer: Any, stopping: Any) -> Any:
    if setup.device_reward is not None:
        return make_iteration(setup.model.config, setup.ppo, optimizer, setup.device_reward)
    assert setup.host_reward is not None
    collect, learn = make_host_iteration(setup.model.config, setup.ppo, optimizer)
    texts, table = tuple(setup.prompts.texts), tuple(setup.prompts.metadata)
    reward, sampling = processes.SplitReward(setup.host_reward), setup.ppo.sampling
    return host_iteration(collect, learn, reward, setup.model.decode, sampling, texts, table, stopping)


def _start(
    directory: Path,
    resume: bool | resuming.Resume,
    state: TrainState,
    setup: Setup,
    facts: Mapping[str, Any],
    screen: Screen,
) -> tuple[TrainState, int | None, dict[str, Any]]:
    """The state to go on from, the update of its checkpoint (None: `state` as given), the best evaluation so far."""
    found = None if resume in (False, "no") else _restored(directory, state, setup, facts, screen)
    if found is None:
        return state, None, {}
    state, best = found.state, dict(found.meta.get("best", {}))
    if best and best["metric"] != setup.loop.best_metric:
        screen.message(
            f"the best checkpoint was chosen by {best['metric']}, from here on by {setup.loop.best_metric or 'none'}; "
            "earlier evaluations do not count"
        )
        state, best = dataclasses.replace(state, best=jnp.full_like(state.best, -jnp.inf)), {}
    return state, found.step, best


def _restored(
    directory: Path, state: TrainState, setup: Setup, facts: Mapping[str, Any], screen: Screen
) -> resuming.Restored | None:
    """The newest whole checkpoint, if any; drops what the run wrote after it."""
    checkpoints = directory / rundir.CHECKPOINTS
    latest, updates = checkpoint.latest_step(checkpoints), setup.loop.updates
    if latest is not None and latest > updates:
        raise ValueError(
            f"{checkpoints} is at update {latest}, beyond --loop.updates {updates}: give at least {latest}, or another "
            "run directory"
        )
    found = resuming.restore(directory, state, facts, screen.message)
    if found is None:
        resuming.drop_later_records(directory, -1)  # stopped before its first checkpoint: all is done again
        return None
    # Update 0 is saved where the first evaluation was given up or not yet followed by an update: it is made again.
    resuming.drop_later_records(directory, found.step or -1)
    screen.message(f"resumed at update {found.step}")
    return found


def _export(
    directory: Path,
    setup: Setup,
    state: TrainState,
    evaluations: dict[int, dict[str, float]],
    best: Mapping[str, Any],
    notify: Callable[[str], None],
) -> Result:
    """Saves the last policy, and the best one where that is another; what the run returns."""
    updates = setup.loop.updates
    after = evaluations.get(updates, {})
    _save_policy(directory / rundir.EXPORT / POLICY, setup, state.policy, {"updates": updates, "evaluation": after})
    if state.policy.critic is not None:
        _save_policy(directory / rundir.EXPORT / CRITIC, setup, state.policy._replace(adapter=state.policy.critic), {})
    if state.ema is not None:
        _save_policy(directory / rundir.EXPORT / EMA, setup, state.ema, {"decay": setup.ppo.ema_decay})
    step = best.get("step", updates)
    if 0 < step < updates:
        try:
            part, _ = checkpoint.restore(directory / rundir.CHECKPOINTS, {"policy": state.policy}, step, part=True)
        except (checkpoint.CheckpointError, FileNotFoundError) as error:  # the run is finished all the same
            notify(f"the best policy, of update {step}, is not exported, since its checkpoint cannot be read: {error}")
            return Result(state.policy, evaluations.get(0, {}), after)
        facts = {"updates": step, "evaluation": evaluations.get(step, {}), "chosen_by": best.get("metric", "")}
        _save_policy(directory / rundir.EXPORT / BEST, setup, part["policy"], facts)
    return Result(state.policy, evaluations.get(0, {}), after)


def _save_policy(path: Path, setup: Setup, policy: Policy, facts: dict[str, Any]) -> None:
    model = setup.model
    artifacts.save(
        path,
        "policy",
        policy.adapter,
        policy.value_head,
        facts,
        config=model.config,
        base=model.name,
        base_fingerprint=model.fingerprint,
        overwrite=True,
    )
