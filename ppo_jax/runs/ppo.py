"""One PPO run in one directory: what the command line and the experiments have in common.

The algorithm knows no files and no screens; here it gets them: run directory, checkpoints, metrics, evaluations with
samples, the live display, and the policy saved at the end.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.models.placement import place_on_mesh
from ppo_jax.rewards.combine import SplitReward
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.dump import dumper
from ppo_jax.runs.evaluation import make_evaluator
from ppo_jax.runs.exports import export_policies
from ppo_jax.runs.facts import reported_facts, run_facts
from ppo_jax.runs.health import watch_run
from ppo_jax.runs.hooks import Hooks, open_hooks
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.setup import Result, Setup, check_reference, missing_stop
from ppo_jax.runs.stage import Stage, start_or_resume
from ppo_jax.runs.start import Ahead, make_fresh_state, prompt_batches_of
from ppo_jax.train.host import host_iteration
from ppo_jax.train.loop import schedule_hyper, train
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import check_hyper, check_scalars_of
from ppo_jax.train.ppo import make_host_iteration, make_iteration
from ppo_jax.train.state import Iteration
from ppo_jax.types import Frozen, Metrics, Rollout

FILTERED = {
    "ignore": "Ratios and KL are those of the policy, so the KL estimate may turn negative; --ppo.behaviour filtered "
    "makes the filtered distribution the policy, --ppo.behaviour importance weighs the loss by policy / behaviour.",
    "importance": "The loss of a token is weighed by policy / behaviour, at most hyper.importance_cap. The KL in the "
    "log, in the reward and for an adaptive coefficient is not, so its estimate may turn negative.",
    "filtered": "Ratios and KL are those of the filtered distribution.",
}


def run_ppo(
    directory: Path, setup: Setup, screen: Screen, resume: bool | Resume = "no", iteration: Iteration | None = None
) -> Result:
    """Trains by PPO in an opened run directory (`rundir.open_run`); unless `resume` is "no", from its last checkpoint.

    `iteration` stands in for the compiled one where the run is a member of a population (`runs.sweep.crowd`).

    Writes config.yaml (once the checkpoint has been read), metrics.jsonl, TensorBoard events, samples.jsonl,
    evaluations.jsonl, run.json, checkpoints/, export/policy and, where another update than the last evaluated best,
    export/best.

    Raises:
      Interrupted, Stopped, Exploded: as `train.loop.train`; the message says which update is saved. An Interrupted run
        is saved as of its last update; where that fails it is Stopped.
      CheckpointSaveError: the last state could not be saved.
    """
    # -- check: what cannot be trained is refused before anything is written -------------------------------------------
    setup = check_setup(setup)
    loop = setup.loop

    # -- restore -------------------------------------------------------------------------------------------------------
    # Copied: what is trained is donated to every step.
    reference = jax.tree.map(jnp.copy, setup.adapter) if setup.ppo.kl.reference == "start" else {}
    frozen = place_on_mesh(Frozen(setup.model.params, setup.reward.params, reference))
    optimizer = make_optimizer(setup.ppo.optimizer)
    state = place_on_mesh(make_fresh_state(setup, optimizer))
    stage = Stage(directory, "ppo", loop, run_facts(setup, state.policy), setup.config, screen, resume)
    start = start_or_resume(stage, state)

    # -- open ----------------------------------------------------------------------------------------------------------
    with open_hooks(stage, start) as hooks:
        failures = introduce_run(setup, screen)
        prompts, hyper = Ahead(prompt_batches_of(setup)), schedule_hyper(setup.hyper, loop)
        dump = dumper(directory, setup, frozen, prompts)
        iterate = iteration or choose_iteration(setup, optimizer, hooks)
        hooks.measure = make_evaluator(
            directory, setup, frozen, hooks.record, hooks.put_evaluation, screen, hooks.evaluations, hooks.stopping
        )
        hooks.dump = lambda number, state: dump(number, state, hyper(number))
        hooks.causes = failures.summary
        hooks.watch = watch_run(directory, reported_facts(setup), screen)
        hooks.puts_off = iteration is None  # a member's step is over before anything could be done meanwhile

        def step(state: Any, number: int) -> tuple[Any, Metrics]:
            hooks.prepare = lambda: prompts.prepare(number + 1)
            return iterate(state, frozen, prompts(number), hyper(number))

        # -- evaluate what was left ------------------------------------------------------------------------------------
        state = hooks.evaluate_left(start.state)

        # -- train -----------------------------------------------------------------------------------------------------
        state = train(state, step, loop, hooks)

        # -- save ------------------------------------------------------------------------------------------------------
        hooks.finish(state)
        if failures.counts:
            screen.message(f"rewards that failed, with evaluations: {failures.summary()}")

    # -- export --------------------------------------------------------------------------------------------------------
    return export_policies(directory, setup, state, hooks.evaluations, hooks.best.record, screen.message)


def check_setup(setup: Setup) -> Setup:
    """Raises ValueError for what cannot be trained; scalars come back as Python numbers."""
    setup.ppo.check_batch(setup.loop.batch_size)
    setup = setup._replace(hyper=check_hyper(setup.hyper))
    check_scalars_of(setup.ppo, setup.hyper)
    check_reference(setup.ppo.kl.reference, "--ppo.kl.reference", setup.start)
    if (setup.hyper.ptx_coef > 0) != bool(setup.pretrain):
        raise ValueError(
            f"hyper.ptx_coef={setup.hyper.ptx_coef} and {len(setup.pretrain)} pretraining texts: give both"
        )
    return setup


def introduce_run(setup: Setup, screen: Screen) -> FailureLog:
    """Says what the user should know from the start; where failed rewards are told of."""
    if rows := sum(stop - start for start, stop in setup.model.config.tokenless):
        screen.message(
            f"{rows} of the {setup.model.config.vocab_size} rows of the vocabulary have no token: their probability is "
            "0, for the sampler as in every log-prob, entropy and KL"
        )
    if notice := missing_stop(setup.ppo.sampling, setup.model):
        screen.message(notice)
    if setup.ppo.sampling.filtered:
        screen.message(
            "A filter or a repetition penalty is on: tokens are drawn from another distribution than the policy's. The "
            "mismatch is logged as behaviour_mismatch. " + FILTERED[setup.ppo.behaviour]
        )
    screen.labels.update({name: setup.labels.get(name, name) for name in setup.judges})
    setup.reward.failures.notify = screen.message
    return setup.reward.failures


def choose_iteration(setup: Setup, optimizer: Any, hooks: Hooks) -> Iteration:
    """The compiled iteration for a reward on the device, or the one around a reward on the host."""
    if setup.reward.host is None:
        assert setup.reward.device is not None
        return make_iteration(setup.model.config, setup.ppo, optimizer, setup.reward.device)
    sample, learn = make_host_iteration(setup.model.config, setup.ppo, optimizer, setup.reward.device)

    def collect(*inputs: Any) -> Rollout:
        rollout = sample(*inputs)
        hooks.meanwhile()  # before anybody waits for it
        return rollout

    texts, table = tuple(setup.prompts.texts), tuple(setup.prompts.metadata)
    reward, sampling = SplitReward(setup.reward.host), setup.ppo.sampling
    decode = partial(setup.model.decode, special=setup.reward.special_tokens == "keep")
    return host_iteration(collect, learn, reward, decode, sampling, texts, table, hooks.stopping)
