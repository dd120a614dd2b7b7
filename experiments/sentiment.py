"""RLHF of SmolLM2-135M on real human ratings: the sentiment task of Ziegler et al. 2019.

    python -m experiments.sentiment --preset demo            # about 6 minutes on 2 cores
    python -m experiments.sentiment --preset full            # further, without a time limit
    python -m experiments.sentiment --hyper.kl-coef 0.1      # any field can be set

People rated 10,605 sentences from film reviews. A reward model learns their preferences, and the policy learns to
continue the first words of unseen sentences so that this reward rises while the KL to the base stays small. VADER and
a second reward model, neither of which PPO ever sees, say whether the sentences really became more positive.

What it stands on (docs/algorithm.md has every formula):

    the reward of this demo      rewards/adapter.py  adapter_reward
    what a failed score becomes  rewards/scores.py   to_scores
    the sampler                  ops/sampling.py     sample
    the KL penalty               ops/kl.py           kl_penalty
    score and KL, token by token ops/rewards.py      shape_rewards
    GAE                          ops/advantages.py   gae
    the clipped policy loss      ops/losses.py       clipped_policy_loss
    one iteration of PPO         train/ppo.py        iterate
"""

import dataclasses
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from typing import Literal, cast

import jax
import numpy as np

from experiments import movie_reviews, rating_model, smoke
from experiments.judges import model_judge, vader_judge, vader_score
from experiments.movie_reviews import prompt_set
from experiments.phases import durations, plan_ppo
from experiments.rating_model import Wanted
from ppo_jax.cli.common import next_commands
from ppo_jax.cli.main import exit_code
from ppo_jax.cli.parse import Brief, parse
from ppo_jax.data import assets, gemma
from ppo_jax.data.disk import replace_file
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.files.artifacts import EXPORT
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.models.quantised import quantise_params
from ppo_jax.parallel.mesh import MeshConfig, use_mesh
from ppo_jax.report import page
from ppo_jax.rewards.addresses import named_sources, saved_sources
from ppo_jax.rewards.base import Reward
from ppo_jax.rewards.options import RewardOptions, choose_reward
from ppo_jax.rollout import Sampling
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.facts import environment, record_start
from ppo_jax.runs.output import config, rundir
from ppo_jax.runs.output.recording import run_writer
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.ppo import run_ppo
from ppo_jax.runs.prompts import PromptSet
from ppo_jax.runs.setup import Judge, Setup, with_stops
from ppo_jax.train.loop import LoopConfig
from ppo_jax.train.options import KLConfig, PPOConfig, check_hyper, check_micro_batches
from ppo_jax.train.reward import RewardConfig
from ppo_jax.train.state import key_stream
from ppo_jax.types import Hyper

TOY_TASK = (
    "A smoke run: random sentences of a toy grammar stand for the ratings, and a random model of four layers for the "
    "policy. It shows that everything runs, and nothing else."
)
TASK = (
    "People rated film-review sentences. A reward model learned their preferences, and PPO taught {base} to "
    "continue the first words of unseen sentences so that this reward rises while the KL to the base stays small. "
    "VADER and a second reward model, which PPO never saw, judge the result."
)
REFERENCES = {"one human rater": 0.886, "linear probe, frozen SmolLM2": 0.769, "bag-of-words ridge": 0.728}
LABELS = {"vader": "VADER", "judge": "the second reward model"}


@dataclasses.dataclass(frozen=True)
class SentimentConfig:
    """Teach a small model by PPO to continue film reviews positively; the fields repeat a run."""

    run_dir: Path = Path("runs/sentiment")
    """All results of the run go into this directory."""
    seed: int = 0
    """This number seeds data, sampling and initialisation."""
    data_seed: int | None = None
    """This number seeds data and reward models alone, so that runs differ in the rest; by default it is seed."""
    base: Literal["smollm2-135m", "gemma3-270m"] = "smollm2-135m"
    """This model is taught; the terms of use of Gemma are shown before its 253 MB are fetched."""
    smoke: bool = False
    """Take a toy grammar and a random model in place of the base and the ratings."""
    reward_texts: int = 2000
    """The reward model is trained on this many sentences; 0 means all 5,000."""
    judge_texts: int = 1200
    """The second reward model is trained on this many other sentences; 0 means all 2,500."""
    test_texts: int = 1500
    """The reward models are measured on this many held-out sentences."""
    eval_prompts: int = 64
    """The policy is evaluated on this many held-out prompts, from the test sentences."""
    max_prompt: int = 8
    """A prompt may have at most this many tokens; longer openings are left out."""
    reward: RewardConfig = RewardConfig(depth=18, lora_layers=4)
    """These options describe the reward model and its training."""
    scorer: tuple[str, ...] = ()
    """The reward comes from these instead, as by `--reward` of `ppo-jax ppo`: directories, URLs or functions."""
    scoring: RewardOptions = RewardOptions()
    """These options say how the scorer is called, and what a sum weighs."""
    judge: RewardConfig = RewardConfig(depth=18, lora_layers=0)
    """These options describe the second reward model and its training."""
    compute: ModelOptions = ModelOptions()
    """These options trade memory against speed when the model is run."""
    policy: AdapterConfig = AdapterConfig(layers=8)
    """These options say what of the policy is trained."""
    mesh: MeshConfig = MeshConfig()
    """These options say how many devices share the work; by default it is one."""
    ppo: PPOConfig = PPOConfig(sampling=Sampling(response_length=24), epochs=2, num_minibatches=4)
    """These choices of the algorithm are compiled in; without sampling.stop_ids, special tokens and line breaks end."""
    hyper: Hyper = Hyper(learning_rate=1.5e-3, kl_coef=0.02)
    """These numbers may change without compiling anew; the word off turns off what inf turns off."""
    loop: LoopConfig = LoopConfig(
        updates=16, batch_size=64, schedule="constant", warmup=2, eval_every=8, checkpoint_every=8
    )
    """These options say how long the run is, and what happens when."""
    resume: Resume = "no"
    """Go on with the run in run_dir; auto also starts one where there is none. `--resume` alone means yes."""
    overwrite: bool = False
    """Delete the run that is in run_dir and start anew."""

    def __post_init__(self) -> None:
        least = {"reward_texts": 0, "judge_texts": 0, "test_texts": 2, "eval_prompts": 2, "max_prompt": 1}
        for name, allowed in least.items():
            if getattr(self, name) < allowed:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {allowed}")
        self.ppo.check_batch(self.loop.batch_size)
        check_micro_batches(self.mesh, self.loop.batch_size, self.ppo)
        check_hyper(self.hyper)

    @property
    def drawn_by(self) -> int:
        """The seed of data and reward models."""
        return self.seed if self.data_seed is None else self.data_seed


DEMO = SentimentConfig()
FULL = dataclasses.replace(
    DEMO,
    run_dir=Path("runs/sentiment-full"),
    reward_texts=0,
    judge_texts=0,
    eval_prompts=256,
    reward=RewardConfig(depth=24, lora_layers=12, epochs=2),
    judge=RewardConfig(lora_layers=6, epochs=1),
    policy=AdapterConfig(layers=12),
    ppo=dataclasses.replace(DEMO.ppo, kl=KLConfig(control="adaptive")),
    hyper=Hyper(learning_rate=1e-3, kl_coef=0.05, kl_target=10.0, kl_horizon=500.0),
    loop=LoopConfig(updates=40, batch_size=128, warmup=2, eval_every=10, checkpoint_every=5),
)
SMOKE = dataclasses.replace(
    DEMO,
    run_dir=Path("runs/sentiment-smoke"),
    smoke=True,
    reward_texts=120,
    judge_texts=60,
    test_texts=40,
    eval_prompts=8,
    reward=RewardConfig(lora_layers=2, batch_size=20),
    judge=RewardConfig(lora_layers=0, batch_size=20),
    policy=AdapterConfig(layers=2),
    ppo=PPOConfig(sampling=Sampling(response_length=8), epochs=2, num_minibatches=2),
    loop=LoopConfig(updates=4, batch_size=16, eval_every=2, checkpoint_every=2),
)
PRESETS = {"demo": DEMO, "full": FULL, "smoke": SMOKE}
BRIEF = Brief(
    tuple(f"python -m experiments.sentiment {words}" for words in ("--preset demo", "--hyper.kl-coef 0.1 --seed 1")),
    {
        SentimentConfig: (
            *("run_dir", "seed", "reward_texts", "judge_texts", "eval_prompts", "max_prompt", "scorer", "resume"),
            *("overwrite", "compute", "policy", "ppo", "hyper", "loop"),
        ),
        ModelOptions: ("dtype",),
        AdapterConfig: ("kind", "layers", "rank"),
        PPOConfig: ("sampling", "epochs", "num_minibatches", "advantage", "group_size"),
        Sampling: ("response_length",),
        Hyper: ("learning_rate", "temperature", "kl_coef"),
        LoopConfig: ("updates", "batch_size", "eval_every"),
    },
)


def main(args: list[str] | None = None) -> Path:
    """Runs the experiment; returns the path of the report."""
    settings = parse(SentimentConfig, args, presets=PRESETS, prog="experiments.sentiment", brief=BRIEF)
    with use_mesh(settings.mesh):
        return run(settings)


def run(settings: SentimentConfig) -> Path:
    """One run; returns the path of the report."""
    # -- data and base model: what can be wrong is found before the run directory is touched ---------------------
    clock = {"start": time.perf_counter()}
    model, splits = world(settings)
    prompts, held_out = prompt_sets(settings, model, splits)
    stop_ids = sentence_ends(model, settings.ppo.sampling)
    chosen = choose_reward(settings.scorer, settings.scoring, model, stop_ids) if settings.scorer else None
    directory = open_directory(settings)
    clock["load"] = time.perf_counter()

    with progress("ppo_jax · sentiment", log=directory / rundir.LOG) as screen:
        write = run_writer(directory, screen, settings.loop.updates)
        screen.plan = plan_ppo(settings, model.config)
        screen.message(f"{len(prompts.rows)} of {len(splits.prompts)} openings have 1 to {settings.max_prompt} tokens")

        # -- reward models ---------------------------------------------------------------------------------------
        test = splits.test[: settings.test_texts]
        cache = assets.cache_dir() / "reward-models"
        wanted = wanted_models(settings, splits)[0 if chosen is None else 1 :]
        models = rating_model.obtain(wanted, model, test, settings.drawn_by, cache, screen, write)
        reward, judge = models[0], models[-1]  # the same one where another reward was chosen
        for one, found in zip(wanted, models, strict=True):
            shutil.copytree(found.path, directory / EXPORT / one.name, dirs_exist_ok=True)
        clock["reward models"] = time.perf_counter()

        # -- PPO -------------------------------------------------------------------------------------------------
        scored = chosen or rating_model.lora_reward(reward, stop_ids, settings.reward.normalise)
        judges = {"vader": vader_judge(), "judge": model_judge(model, judge, stop_ids)}
        setup = make_setup(settings, model, (prompts, held_out), scored, judges)
        for notice in setup.reward.notices:
            screen.message(notice)
        summary = summarise(settings, len(held_out.rows), test, setup.reward.metadata.get("accuracy"), judge.accuracy)
        rundir.write_summary(directory, summary)  # for a report in the middle of the run
        result = run_ppo(directory, setup, screen, settings.resume)
        clock["PPO"] = time.perf_counter()

        # -- report ----------------------------------------------------------------------------------------------
        summary |= {"before": result.before, "after": result.after, "seconds": durations(clock)}
        path = page.write(directory, summary)
        asked, export = f'{directory} --prompt "Any film featuring"', f"{directory} --to my-model"
        after = (f"ppo-jax generate {asked}", "what it writes now"), (f"ppo-jax export {export}", "take it away")
        screen.message(f"report: {path}\n{next_commands(*after)}")
    return path


def make_setup(
    settings: SentimentConfig, model: Model, data: tuple[PromptSet, PromptSet], reward: Reward, judges: dict[str, Judge]
) -> Setup:
    """What PPO is about; `data` are the prompts of training and of evaluations."""
    stop_ids = sentence_ends(model, settings.ppo.sampling)
    sampling = dataclasses.replace(settings.ppo.sampling, stop_ids=stop_ids, model_stops=True, pad_id=model.pad_id)
    return Setup(
        model=model,
        adapter=init_adapter(key_stream(settings.seed, "adapter"), model.params, model.config, settings.policy),
        prompts=data[0],
        held_out=data[1],
        ppo=dataclasses.replace(settings.ppo, sampling=sampling),
        hyper=settings.hyper,
        loop=settings.loop,
        seed=settings.seed,
        reward=reward,
        judges=judges,
        labels=LABELS,
        config=repeatable_yaml(settings),
    )


def prompt_sets(settings: SentimentConfig, model: Model, splits: movie_reviews.Splits) -> tuple[PromptSet, PromptSet]:
    """The prompts of training, and those of evaluations."""
    rng = np.random.default_rng(settings.drawn_by)
    prompts = prompt_set(model, splits.prompts, settings.max_prompt, rng)
    held_out = prompt_set(model, splits.test, settings.max_prompt, rng, settings.eval_prompts)
    if len(prompts.rows) < settings.loop.batch_size:
        raise ValueError(f"loop.batch_size={settings.loop.batch_size} but there are {len(prompts.rows)} prompts")
    return prompts, held_out


def open_directory(settings: SentimentConfig) -> Path:
    """Opens the run directory and writes the settings that repeat the run into it."""
    directory = rundir.open_run(settings.run_dir, settings.resume, settings.overwrite)
    if not (directory / rundir.CONFIG).exists():  # a resumed run's is replaced when its checkpoint has been read
        replace_file(directory / rundir.CONFIG, repeatable_yaml(settings).encode())
    record_start(directory)
    return directory


def repeatable_yaml(settings: SentimentConfig) -> str:
    """The settings as YAML. Passed back with --config it must neither delete nor continue anything by itself."""
    saved = dataclasses.replace(settings, resume="no", overwrite=False, scorer=saved_sources(settings.scorer))
    return config.to_yaml(saved)


def wanted_models(settings: SentimentConfig, splits: movie_reviews.Splits) -> list[Wanted]:
    """The reward model that PPO sees, and the one that only judges, trained on other sentences."""
    reward = splits.reward_train[: settings.reward_texts or None]
    judge = splits.judge_train[: settings.judge_texts or None]
    return [Wanted("reward", reward, settings.reward), Wanted("judge", judge, settings.judge)]


def summarise(
    settings: SentimentConfig,
    prompts: int,
    test: list[movie_reviews.Review],
    reward_accuracy: float | None,
    judge_accuracy: float,
) -> page.Summary:
    """What the report is told before there are results. Nothing of SmolLM2 or of people where neither took part."""
    toy = settings.smoke
    task = TOY_TASK if toy else TASK.format(base=settings.base)
    vader = movie_reviews.all_pairs_accuracy([vader_score(r.text) for r in test], [r.rating for r in test])
    summary = {
        "title": "Smoke run of PPO on film-review sentiment" if toy else "PPO on film-review sentiment",
        "task": f"{task} Here the reward was {named_sources(settings.scorer)} instead." if settings.scorer else task,
        "prompts": prompts,
        "kl_budget": 15.0,
        "reward_accuracy": reward_accuracy,
        "judge_accuracy": judge_accuracy,
        "judges": LABELS,
        "reference_accuracies": {"VADER": vader} if toy else {**REFERENCES, "VADER": vader},
        "raters": "the toy ratings say" if toy else "people did",
        "reward_accuracy_note": f"all pairs of {len(test)} held-out sentences whose mean ratings differ",
        "seed": settings.seed,
        "date": date.today().isoformat(),
        **environment(),
    }
    return cast(page.Summary, summary)


def world(settings: SentimentConfig) -> tuple[Model, movie_reviews.Splits]:
    """The base model, and the rated sentences in disjoint parts."""
    seed = settings.drawn_by
    if not settings.smoke:
        where = gemma.gemma3() if settings.base == "gemma3-270m" else assets.smollm2()
        return load_model(where, settings.compute), movie_reviews.splits(movie_reviews.load(), seed)
    toy = smoke.model(seed)
    config, splits = settings.compute.of(toy.config), movie_reviews.splits(smoke.reviews(seed=seed), seed, 40, 40, 40)
    params = quantise_params(config, jax.tree.map(lambda x: x.astype(config.dtype), toy.params))
    return toy._replace(config=config, params=params), splits


def sentence_ends(model: Model, sampling: Sampling | None = None) -> tuple[int, ...]:
    """Token ids that end a response: those given, with the model's; else special ones and all with a line break."""
    line_breaks = [index for token, index in model.tokenizer.get_vocab().items() if {"\u010a", "\n"} & {*token}]
    ends = tuple(sorted({*model.stop_ids, *model.tokenizer.all_special_ids, *line_breaks}))
    return with_stops(sampling, model).stop_ids if sampling and sampling.stop_ids else ends


if __name__ == "__main__":
    sys.exit(exit_code("experiments.sentiment", main, resumable=True))
