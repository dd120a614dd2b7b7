"""The frontier of reward and KL on real ratings: SmolLM2-135M, several coefficients, and the coefficient that adapts.

    python -m experiments.papers.frontier

The task, reward models and judges are those of `experiments.sentiment`, whose demo leaves its reward models in the
cache; responses are shorter, and updates fewer and smaller, so that a run takes a minute or two on 2 cores. One seed
has all coefficients before the next begins.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import rating_model, sentiment
from experiments.judges import model_judge, vader_judge
from experiments.papers.records import Setting, Study, rounded, run_as_command
from ppo_jax.data import assets
from ppo_jax.data.batches import left_pad, prompt_batches
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.pretrained import Model
from ppo_jax.ops.means import means
from ppo_jax.rollout import Sampling
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.setup import Judge, Setup, decode_responses
from ppo_jax.train.evaluate import Evaluate, make_evaluate
from ppo_jax.train.optimizer import make_optimizer
from ppo_jax.train.options import Algorithm, KLConfig, PPOConfig
from ppo_jax.train.ppo import make_iteration
from ppo_jax.train.state import Iteration, TrainState, init_state, key_stream
from ppo_jax.types import Frozen, Hyper, Prompts

COEFFICIENTS, TARGETS, SEEDS = (1.0, 0.4, 0.2, 0.1, 0.02), (2.0, 5.0), (0, 1, 2)
RATE, WARMUP, START = 1.5e-3, 2, 0.2  # of the demo; and where a coefficient that adapts starts
# `adaptive` serves for fixed coefficients, too: a horizon of 1e12 episodes leaves them where they are.
PPO = PPOConfig(sampling=Sampling(response_length=16), epochs=2, num_minibatches=2, kl=KLConfig(control="adaptive"))
METRICS = ("reward", "kl", "kl_coef", "response_length")


class Task(NamedTuple):
    """Everything that runs share."""

    setup: Setup
    model: Model
    policy: AdapterConfig
    judges: dict[str, Judge]
    iterate: Iteration
    evaluate: Evaluate


def settings(toy: bool) -> list[Setting]:
    """For each seed the reference, the coefficients, and the targets of one that adapts."""
    size = {"updates": 2, "rows": 8} if toy else {"updates": 12, "rows": 32}
    kinds: list[Setting] = [{"kind": "reference"}]
    kinds += [{"kind": "fixed", "beta": beta} for beta in COEFFICIENTS[: 2 if toy else None]]
    kinds += [{"kind": "adaptive", "target": target} for target in TARGETS[: 1 if toy else None]]
    return [kind | {"seed": seed, **size} for seed in SEEDS[: 1 if toy else None] for kind in kinds]


def run(setting: Setting, toy: bool) -> dict[str, Any]:
    """Curves over the updates, and what held-out prompts say of the end: reward, KL, both judges, some texts."""
    task = prepare(toy)
    frozen = Frozen(task.model.params, task.setup.reward.params)
    state, curves = train(task, frozen, setting)
    found = {name: [values[name] for values in curves] for name in METRICS}
    return rounded(found | {"end": judge(task, state, frozen, setting)})


@functools.cache
def prepare(toy: bool) -> Task:
    """Model, reward models, and the two programs of all runs."""
    options = dataclasses.replace(sentiment.SMOKE if toy else sentiment.DEMO, ppo=PPO)
    model, splits = sentiment.world(options)
    data, stop_ids = sentiment.prompt_sets(options, model, splits), sentiment.sentence_ends(model, PPO.sampling)
    wanted, test = sentiment.wanted_models(options, splits), splits.test[: options.test_texts]
    with progress("reward models") as screen:
        cache = assets.cache_dir() / "reward-models"
        found, second = rating_model.obtain(wanted, model, test, options.drawn_by, cache, screen, lambda *_: None)
    reward = rating_model.lora_reward(found, stop_ids, True)
    judges = {"vader": vader_judge(), "judge": model_judge(model, second, stop_ids)}
    setup = sentiment.make_setup(options, model, data, reward, judges)
    algorithm = Algorithm(model.config, setup.ppo, make_optimizer(), reward.device)
    assert reward.device is not None
    iterate = make_iteration(model.config, setup.ppo, algorithm.optimizer, reward.device)
    return Task(setup, model, options.policy, judges, iterate, make_evaluate(algorithm))


def train(task: Task, frozen: Frozen, setting: Setting) -> tuple[TrainState, list[dict[str, float]]]:
    """The policy after its updates (none: the reference), and the metrics of each."""
    setup, model, seed = task.setup, task.model, setting["seed"]
    adapter = init_adapter(key_stream(seed, "adapter"), model.params, model.config, task.policy)
    beta = setting.get("beta", START)
    state = init_state(key_stream(seed, "state"), adapter, model.config, make_optimizer(), beta)
    rows = prompt_batches(setup.prompts.rows, setting["rows"], seed, model.pad_id, length=longest(setup))
    curves = []
    for update in range(0 if setting["kind"] == "reference" else setting["updates"]):
        hyper = Hyper(
            learning_rate=RATE * min((update + 1) / WARMUP, 1),
            kl_target=setting.get("target", 1.0),
            kl_horizon=1e12 if "beta" in setting else float(setting["rows"]),  # at most a fifth in an update
        )
        state, metrics = task.iterate(state, frozen, jax.tree.map(jnp.asarray, rows[update]), hyper)
        curves.append(means(metrics))
    return state, curves


def judge(task: Task, state: TrainState, frozen: Frozen, setting: Setting) -> dict[str, Any]:
    """Means over the held-out prompts, and what the policy says to the first four."""
    held_out: PromptSet = task.setup.held_out
    tokens, mask = left_pad(held_out.rows, longest(task.setup), task.model.pad_id)
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens)))
    found = task.evaluate(state.policy, frozen, prompts, key_stream(setting["seed"], "evaluation"), Hyper())
    said = decode_responses(task.model, task.setup.ppo.sampling, found.rollout)
    assert found.scores is not None
    values: dict[str, Any] = {"reward": found.scores.reward, "kl": found.kl}
    values |= {"length": found.rollout.response_mask.sum(axis=1)}
    values |= {name: score(found.rollout, held_out.texts, said) for name, score in task.judges.items()}
    texts = [before + after for before, after in zip(held_out.texts[:4], said[:4], strict=True)]
    return {name: float(np.mean(np.asarray(x))) for name, x in values.items()} | {"texts": texts}


def longest(setup: Setup) -> int:
    """Slots for a prompt, the same in training and in evaluations."""
    return max(len(row) for row in [*setup.held_out.rows, *setup.prompts.rows])


STUDY = Study("frontier", settings, run)

if __name__ == "__main__":
    run_as_command(STUDY)
