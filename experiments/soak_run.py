"""The run that `experiments.soak` torments: PPO with every part that has a state, on a model of a few thousand numbers.

    python -m experiments.soak_run --run-dir runs/tiny --resume auto --server http://127.0.0.1:8000/score

Several epochs and minibatches, an adaptive KL coefficient, running moments of the scores, an average of the weights,
prompts that are shuffled anew every few updates, a reward over HTTP. All of it has to survive any end of the process.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import jax

from experiments import smoke
from ppo_jax.cli.main import exit_code
from ppo_jax.cli.parse import parse
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.layout import init_params
from ppo_jax.models.pretrained import Model
from ppo_jax.rewards.api import APIConfig, api_reward
from ppo_jax.rewards.base import HostReward, Reward
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.rollout import Sampling
from ppo_jax.runs.output import config, rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.ppo import run_ppo
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.setup import Result, Setup
from ppo_jax.train.loop import LoopConfig
from ppo_jax.train.options import KLConfig, PPOConfig, ScoreConfig
from ppo_jax.types import Hyper

# A server that fails comes back within seconds; the calls wait for it longer than that, so no row is ever lost.
PATIENT = APIConfig(retries=40, backoff=0.02, connect_timeout=5.0, read_timeout=10.0, deadline=120.0)


@dataclasses.dataclass(frozen=True)
class SoakRun:
    """Train the tiny run that experiments.soak torments."""

    server: str
    """The reward comes from this address, see `experiments.soak`."""
    run_dir: Path = Path("runs/tiny")
    """All results of the run go into this directory."""
    seed: int = 0
    """This number seeds data, sampling and initialisation."""
    ppo: PPOConfig = PPOConfig(
        sampling=Sampling(response_length=6),
        epochs=4,
        num_minibatches=2,
        kl=KLConfig(control="adaptive"),
        score=ScoreConfig(normalise="shift"),
        ema_decay=0.9,
    )
    """These choices of the algorithm are compiled in."""
    hyper: Hyper = Hyper(learning_rate=1e-3, temperature=1.0, kl_coef=0.1, kl_target=2.0, kl_horizon=500.0)
    """These numbers may change without compiling anew; the word off turns off what inf turns off."""
    loop: LoopConfig = LoopConfig(
        updates=40, batch_size=8, schedule="constant", eval_every=10, checkpoint_every=2, keep_every=100
    )
    """These options say how long the run is, and what happens when."""
    resume: Literal["no", "yes", "auto"] = "no"
    """Go on with the run in run_dir; auto also starts one where there is none. `--resume` alone means yes."""


def tiny_model() -> Model:
    """Two random layers over the toy vocabulary."""
    toy = smoke.model(0)
    size = ModelConfig(
        vocab_size=toy.config.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    params = jax.tree.map(lambda x: 4 * x, init_params(jax.random.key(0), size))
    return toy._replace(name="tiny", config=size, params=params)


def prompt_set(model: Model, count: int, seed: int) -> PromptSet:
    """The first 2 to 4 words of random sentences."""
    texts = [" ".join(review.text.split()[: 2 + i % 3]) for i, review in enumerate(smoke.reviews(count, seed))]
    rows = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return PromptSet(rows, texts, [{} for _ in texts])


def make_setup(settings: SoakRun, reward: HostReward) -> Setup:
    """The run. 20 prompts and batches of 8: an epoch ends inside every third batch."""
    model = tiny_model()
    sampling = dataclasses.replace(settings.ppo.sampling, stop_ids=model.stop_ids, pad_id=model.pad_id)
    adapter = AdapterConfig(layers=1, rank=2)
    return Setup(
        model=model,
        adapter=init_adapter(jax.random.key(settings.seed), model.params, model.config, adapter),
        prompts=prompt_set(model, 20, seed=1),
        held_out=prompt_set(model, 12, seed=2),
        ppo=dataclasses.replace(settings.ppo, sampling=sampling),
        hyper=settings.hyper,
        loop=settings.loop,
        seed=settings.seed,
        reward=Reward(host=reward, name="good words less bad ones"),
        # The port changes with every start of the server, and is no part of what the run is.
        config=config.to_yaml(dataclasses.replace(settings, resume="no", server="")),
    )


def main(args: list[str] | None = None) -> Result:
    """Trains, or goes on training."""
    settings = parse(SoakRun, args, prog="experiments.soak_run")
    directory = rundir.open_run(settings.run_dir, settings.resume)
    with progress("soak", log=directory / rundir.LOG) as screen:
        reward = api_reward(settings.server, PATIENT, FailureLog(screen.message))
        return run_ppo(directory, make_setup(settings, reward), screen, settings.resume)


if __name__ == "__main__":
    sys.exit(exit_code("experiments.soak_run", main, resumable=True))
