"""A sweep of the demo's task: what learning rate and KL coefficient do to RLHF of SmolLM2-135M on real human ratings.

    python -m experiments.sweep --preset demo --sweep.trials 24 --sweep.members 4 --run-dir runs/sweep-sentiment \\
        --ranges hyper.learning-rate "log 3e-4..6e-3" hyper.kl-coef "log 0.005..0.1"

The best again, with three seeds (put in what the first one found):

    python -m experiments.sweep --preset demo --sweep.search grid --run-dir runs/sweep-best \\
        --ranges hyper.learning-rate 0.0021 hyper.kl-coef 0.011 seed "0 1 2"

A toy grammar and a random model, in seconds:

    python -m experiments.sweep --preset smoke --sweep.search grid --ranges hyper.kl-coef "0.01 0.1"

All can be stopped and given again: they go on. All options of `experiments.sentiment` may be given and searched; data
and reward models are those of one seed (--data-seed), so that members share them.
"""

import dataclasses
import functools
import sys
import time
from datetime import date
from pathlib import Path
from typing import cast

from experiments import rating_model, sentiment
from experiments.judges import model_judge, vader_judge
from experiments.sentiment import BRIEF, LABELS, PRESETS, SentimentConfig
from ppo_jax.cli.main import exit_code
from ppo_jax.cli.parse import parse
from ppo_jax.cli.sweep import make_settings, sweep
from ppo_jax.data import assets
from ppo_jax.models.pretrained import Model
from ppo_jax.report import page
from ppo_jax.rewards.base import Reward
from ppo_jax.rewards.options import choose_reward
from ppo_jax.runs.facts import environment
from ppo_jax.runs.output.config import from_yaml, to_yaml
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.setup import Judge, Result, Setup
from ppo_jax.runs.sweep.task import Task

EXAMPLES = ('python -m experiments.sweep --preset demo --ranges hyper.kl-coef "log 0.005..0.1" --sweep.trials 24',)


def main(args: list[str] | None = None) -> None:
    """Runs one slice of the sweep."""
    made, brief = make_settings(SentimentConfig, BRIEF, "runs/sweep-sentiment", EXAMPLES)
    presets = {
        name: made(**vars(preset) | {"run_dir": Path("runs/sweep-sentiment")}) for name, preset in PRESETS.items()
    }
    sweep(parse(made, args, presets=presets, prog="experiments.sweep", brief=brief), sentiment_task)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all runs of a sweep have in common."""

    model: Model
    data: tuple[PromptSet, PromptSet]
    reward: Reward
    judges: dict[str, Judge]
    accuracies: tuple[float | None, float]  # of the reward model and of the second one


def sentiment_task() -> Task:
    """The demo as a sweep sees it: base, data and both reward models are made once."""

    @functools.lru_cache(maxsize=1)
    def share(text: str) -> Shared:
        return make_shared(from_yaml(SentimentConfig, text))

    def setup(settings: SentimentConfig) -> Setup:
        of_all = dataclasses.replace(settings, seed=0, data_seed=settings.data_seed or 0, hyper=SentimentConfig().hyper)
        shared = share(to_yaml(dataclasses.replace(of_all, run_dir=Path(), policy=SentimentConfig().policy)))
        named = dataclasses.replace(settings, data_seed=settings.data_seed or 0)  # the run alone has the same data
        return sentiment.make_setup(named, shared.model, shared.data, shared.reward, shared.judges)

    def finish(directory: Path, settings: SentimentConfig, setup: Setup, result: Result) -> None:
        summary = {
            "title": "PPO on film-review sentiment",
            "task": f"{sentiment.TOY_TASK if settings.smoke else sentiment.TASK} One run of a sweep.",
            "before": result.before,
            "after": result.after,
            "prompts": len(setup.held_out.rows),
            "judges": LABELS,
            "raters": "the toy ratings say" if settings.smoke else "people did",
            "seed": settings.seed,
            "date": date.today().isoformat(),
            **environment(),
        }
        page.write(directory, cast(page.Summary, summary))

    return Task(
        "python -m experiments.sentiment", SentimentConfig, lambda s: s.loop.updates, setup=setup, finish=finish
    )


def make_shared(settings: SentimentConfig) -> Shared:
    """Loads the base, cuts the data, and trains both reward models or takes them from the cache."""
    began = time.perf_counter()
    model, splits = sentiment.world(settings)
    data = sentiment.prompt_sets(settings, model, splits)
    stop_ids = sentiment.sentence_ends(model, settings.ppo.sampling)
    chosen = choose_reward(settings.scorer, settings.scoring, model, stop_ids) if settings.scorer else None
    wanted = sentiment.wanted_models(settings, splits)[0 if chosen is None else 1 :]
    print("reward models: trained, or taken from the cache ...", flush=True)
    with progress("reward models", main_process=False) as screen:
        test, cache = splits.test[: settings.test_texts], assets.cache_dir() / "reward-models"
        models = rating_model.obtain(wanted, model, test, settings.drawn_by, cache, screen, lambda *_: None)
    print(f"reward models: {time.perf_counter() - began:.0f} s", flush=True)
    judge = models[-1]
    judges = {"vader": vader_judge(), "judge": model_judge(model, judge, stop_ids)}
    reward = chosen or rating_model.lora_reward(models[0], stop_ids, settings.reward.normalise)
    return Shared(model, data, reward, judges, (None if chosen else models[0].accuracy, judge.accuracy))


if __name__ == "__main__":
    sys.exit(exit_code("experiments.sweep", main, resumable=True))
