"""A sweep small enough to be run many times: letters, a model of a few thousand numbers, a reward read off the tokens.

Also the worker of tests with real processes:  python -m tests.sweep_task DIRECTORY '{"trials": 4, ...}' [HOST:PORT N I]
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.models.adapters import init_lora
from ppo_jax.parallel import launch
from ppo_jax.parallel.mesh import MeshConfig, use_mesh
from ppo_jax.rewards.base import Reward
from ppo_jax.rollout import Sampling
from ppo_jax.runs.output.config import to_yaml
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.setup import Setup
from ppo_jax.runs.sweep.command import plan_sweep, run_sweep
from ppo_jax.runs.sweep.plan import SweepConfig
from ppo_jax.runs.sweep.task import Task
from ppo_jax.train.loop import LoopConfig
from ppo_jax.train.options import PPOConfig, check_hyper
from ppo_jax.train.state import key_stream
from ppo_jax.types import Hyper, Scores
from tests.small import small_model

RANGES = {"hyper.learning_rate": "log 1e-3..1e-1", "hyper.kl_coef": "0.01 0.05 0.2"}


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 0
    run_dir: Path = Path("runs/tiny")
    rank: int = 2
    pause: float = 0.0  # seconds that the host's reward takes; 0: the reward is on the device
    hyper: Hyper = Hyper(learning_rate=1e-2, kl_coef=0.05)
    ppo: PPOConfig = PPOConfig(sampling=Sampling(response_length=4, stop_ids=(2,)), epochs=1, num_minibatches=2)
    loop: LoopConfig = LoopConfig(updates=6, batch_size=8, eval_every=3, checkpoint_every=2, schedule="constant")
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")


def count_letters(frozen, rollout, prefix, prefix_layers):
    """A point for each token of the upper half of the vocabulary."""
    high = (rollout.tokens[:, -rollout.response_mask.shape[1] :] > 20) & rollout.response_mask
    score = jnp.sum(high, axis=1, dtype=jnp.float32)
    return Scores(score, jnp.ones(score.shape, bool), {})


def make_setup() -> "callable":
    """settings -> Setup; what runs share is made once."""
    model = small_model()
    rng = np.random.default_rng(0)

    def prompts(count: int) -> PromptSet:
        rows = [rng.integers(3, 40, rng.integers(1, 5)).tolist() for _ in range(count)]
        return PromptSet(rows, [" ".join(map(str, row)) for row in rows], [{} for _ in rows])

    train, held_out = prompts(24), prompts(8)
    device = Reward(count_letters)
    rewards: dict[float, Reward] = {0.0: device}

    def slow(pause: float) -> Reward:
        def score(prompts, responses, metadata):
            time.sleep(pause)
            values = np.array([len(response) for response in responses], np.float32)
            return Scores(values, np.ones(len(values), bool), {})

        return Reward(host=score)

    def setup(settings: Settings) -> Setup:
        if settings.pause not in rewards:
            rewards[settings.pause] = slow(settings.pause)
        key = key_stream(settings.seed, "adapter")
        adapter = init_lora(key, model.config, settings.rank, 4.0, ("q", "down"), first_layer=1)
        return Setup(
            model=model, adapter=adapter, prompts=train, held_out=held_out, ppo=settings.ppo, hyper=settings.hyper,
            loop=settings.loop, seed=settings.seed, reward=rewards[settings.pause],
            config=to_yaml(dataclasses.replace(settings, run_dir=Path("runs/tiny"))),
        )  # fmt: skip

    return setup


def make_task(**more) -> Task:
    def check(settings: Settings) -> None:
        settings.ppo.check_batch(settings.loop.batch_size)
        check_hyper(settings.hyper)

    return Task("tiny", Settings, lambda settings: settings.loop.updates, check, make_setup(), **more)


def sweep(directory: Path, base: Settings = Settings(), ranges=RANGES, task: Task | None = None, **config) -> None:
    """One slice, in this process."""
    task = task or make_task()
    config = {"trials": 4, "members": 2, "chunk": 2, "heartbeat": 0.2, "grace": 2.0, "search": "random"} | config
    plan = plan_sweep(task, base, ranges, SweepConfig(**config))
    with use_mesh(base.mesh):
        run_sweep(directory, base, plan, task, to_yaml(base))


def main() -> None:
    directory, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    if len(sys.argv) > 3:
        coordinator, count, number = sys.argv[3:6]
        launch.start(launch.DistributedConfig("on", coordinator, int(count), int(number), heartbeat=10))
    devices = len(jax.devices())
    base = Settings(mesh=MeshConfig(data=devices), pause=given.pop("pause", 0.0))
    if loop := given.pop("loop", None):
        base = dataclasses.replace(base, loop=dataclasses.replace(base.loop, **loop))
    ranges = given.pop("ranges", RANGES)
    print("ready", flush=True)
    sweep(directory, base, ranges, **given)
    print("done", flush=True)


if __name__ == "__main__":
    main()
