"""`ppo-jax ppo`: prompts and a reward -> PPO in a run directory."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from ppo_jax.cli.common import (
    SHOWN_OF_DATASET,
    RunSettings,
    begin_report,
    describe_roles,
    describe_run,
    load_base,
    load_start,
    next_commands,
    open_directory,
    repeatable_yaml,
    report_long_texts,
    tell,
    tell_found,
    use_run_date,
    write_report,
)
from ppo_jax.cli.parse import Brief
from ppo_jax.data import DatasetOptions, encode_sft, read_sft
from ppo_jax.data.llamafactory.encoding import Encoder
from ppo_jax.models.adapters import AdapterConfig, init_adapter
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.files.artifacts import EXPORT, MODEL
from ppo_jax.models.placement import create_on_mesh, place_on_mesh
from ppo_jax.models.pretrained import Model
from ppo_jax.parallel import launch
from ppo_jax.parallel.mesh import use_mesh
from ppo_jax.parallel.processes import is_first
from ppo_jax.report import page
from ppo_jax.rewards.addresses import named_sources
from ppo_jax.rewards.base import Reward
from ppo_jax.rewards.options import RewardOptions, choose_reward
from ppo_jax.rollout import Sampling
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.choices import OPEN, fill_in
from ppo_jax.runs.exports import write_model
from ppo_jax.runs.output.config import from_yaml, to_yaml
from ppo_jax.runs.output.rundir import LOG, run_directory
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.ppo import run_ppo
from ppo_jax.runs.prompts import (
    Split,
    check_room,
    describe_unknown,
    encode_prompt_set,
    make_mixture,
    read_split,
    too_few_rows,
)
from ppo_jax.runs.setup import Result, Setup, with_stops
from ppo_jax.runs.sweep.task import Task
from ppo_jax.train.loop import LoopConfig
from ppo_jax.train.options import PPOConfig, ScoreConfig, check_hyper, check_micro_batches, check_scalars_of
from ppo_jax.train.state import key_stream
from ppo_jax.types import Hyper, PyTree


@dataclasses.dataclass(frozen=True)
class PPOSettings(RunSettings):
    """Train a policy by PPO against a reward; the result is RUN_DIR/export/model."""

    model: str
    """Base and reference are this Hugging Face directory, name on the hub, or .gguf file."""
    prompts: Path
    """This file holds prompts: objects {"prompt"} or {"messages"}, optionally "metadata", or others' forms; .txt: a
    prompt per line."""
    reward: tuple[str, ...]
    """The reward is a reward model's directory, http://HOST:PORT/PATH (or env:NAME, file:PATH: the URL is there),
    module:function or file.py:function; several are summed."""
    pretrain: Path | None = None
    """PPO-ptx mixes in the texts of this file, weighed by hyper.ptx_coef: {"text"} per line, or .txt."""
    run_dir: Path = Path("runs/ppo")
    """All results of the run go into this directory."""
    max_prompt: int = 256
    """A prompt may have at most this many tokens."""
    held_out: int = 64
    """This many prompts are kept apart to evaluate on, at most a fifth; if that is none, the training ones are used."""
    scoring: RewardOptions = RewardOptions()
    """These options say how the reward is called, and what a sum weighs."""
    policy: AdapterConfig = AdapterConfig()
    """These options say what of the policy is trained."""
    ppo: PPOConfig = PPOConfig(score=ScoreConfig(normalise="auto"))
    """These choices of the algorithm are compiled in. sampling.stop_ids add to those of model and tokenizer."""
    hyper: Hyper = Hyper(learning_rate=OPEN, value_clip=OPEN)
    """These numbers may change without compiling anew; the word off turns off what inf turns off."""
    loop: LoopConfig = LoopConfig()
    """These options say how long the run is, and what happens when."""
    resume: Resume = "no"
    """Go on with the run in run_dir; auto also starts one where there is none. `--resume` alone means yes."""


BRIEF = Brief(
    (
        "ppo-jax ppo --model runs/sft/export/model --prompts prompts.jsonl --reward runs/reward",
        "ppo-jax ppo --model MODEL --prompts prompts.txt --reward rewards.py:score --hyper.kl-coef 0.1",
        "ppo-jax ppo --config runs/ppo/config.yaml --resume",
    ),
    {
        PPOSettings: (
            *("model", "prompts", "reward", "run_dir", "max_prompt", "seed", "resume", "overwrite"),
            *("start", "chat_template", "dataset", "compute", "policy", "ppo", "hyper", "loop"),
        ),
        DatasetOptions: SHOWN_OF_DATASET,
        ModelOptions: ("dtype",),
        AdapterConfig: ("kind", "layers", "rank"),
        PPOConfig: ("sampling", "epochs", "num_minibatches", "accumulate", "advantage", "group_size"),
        Sampling: ("response_length",),
        Hyper: ("learning_rate", "temperature", "kl_coef"),
        LoopConfig: ("updates", "batch_size", "eval_every"),
    },
)


def ppo(settings: PPOSettings) -> None:
    """Run `ppo-jax ppo`."""
    launch.start(settings.distributed)
    settings.ppo.check_batch(settings.loop.batch_size)
    check_micro_batches(settings.mesh, settings.loop.batch_size, settings.ppo)
    with use_mesh(settings.mesh), use_run_date(settings) as dated:
        _ppo(dated)


def _ppo(settings: PPOSettings) -> None:
    model, encoder = load_base(*settings.base)
    sampling = with_stops(settings.ppo.sampling, model)
    chosen = choose_reward(settings.reward, settings.scoring, model, sampling.stop_ids)
    settings, told = fill_in(settings, model.config.hidden_size, chosen)
    setup, split, long = make_setup(settings, model, chosen, encoder)
    directory = run_directory(settings.run_dir, lambda: open_directory(settings))
    with progress("ppo-jax ppo", is_first(), log=directory / LOG) as screen:
        report_long_texts(screen, long, settings.max_prompt, settings.too_long)
        tell_found(screen, split)
        tell(screen, describe_unknown(model, setup.prompts.rows))
        for line in (told, *chosen.notices):
            tell(screen, line)
        summary = summarise(settings, setup)
        begin_report(directory, summary)
        result = run_ppo(directory, setup, screen, settings.resume)
        exported = directory / EXPORT / MODEL
        write_model(exported, model, result.policy.adapter)
        path = write_report(directory, summary, before=result.before, after=result.after)
        screen.message(f"the model is at {exported}; report: {path}")
        run = settings.run_dir
        screen.message(
            next_commands(
                (f'ppo-jax generate {run} --prompt "..."', "what it writes now"),
                (f"ppo-jax export {run} --to my-model", "a Hugging Face directory with a model card"),
            )
        )


def make_setup(
    settings: PPOSettings, model: Model, reward: Reward, encoder: Encoder | None = None
) -> tuple[Setup, Split, int]:
    """Read, cut and encode what a run is about; also return what was read, and how many were too long."""
    sampling = with_stops(settings.ppo.sampling, model)
    split = read_split("prompts", settings.prompts, settings.dataset, settings.held_out, settings.seed)
    (prompts, long), (held_out, long_too) = (
        encode_prompt_set(part, model, settings.max_prompt, settings.too_long, encoder)
        for part in (split.training, split.measured)
    )
    check_room(model, [*prompts.rows, *held_out.rows], sampling.response_length, "--ppo.sampling.response-length")
    if settings.loop.batch_size > len(prompts.rows):
        raise ValueError(
            too_few_rows("--loop.batch-size", settings.loop.batch_size, len(prompts.rows), settings.prompts)
        )
    setup = Setup(
        model=model,
        adapter=make_policy(settings, model),
        start=settings.start,
        prompts=prompts,
        held_out=held_out,
        measured_on=split.kind,
        ppo=dataclasses.replace(settings.ppo, sampling=sampling),
        hyper=settings.hyper,
        loop=settings.loop,
        seed=settings.seed,
        pretrain=_pretraining(settings, model),
        reward=reward,
        config=repeatable_yaml(settings),
        mix=make_mixture(settings.dataset, split.training, prompts.kept),
    )
    return setup, split, long + long_too


def make_policy(settings: PPOSettings, model: Model) -> PyTree:
    """Take the adapter that training goes on with, or make a fresh one."""
    start = load_start(settings, model, settings.policy, "policy", settings.ppo.kl.reference)
    if start is not None:
        return place_on_mesh(start)
    fresh = lambda key, base: init_adapter(key, base, model.config, settings.policy)  # noqa: E731
    return create_on_mesh(fresh, key_stream(settings.seed, "adapter"), model.params)


def summarise(settings: PPOSettings, setup: Setup) -> page.Summary:
    """Gather what the report is told before there are results."""
    task = f"{describe_roles(settings, settings.ppo.kl.reference)} Reward: {named_sources(settings.reward)}."
    more: dict[str, Any] = {"prompts": len(setup.held_out.rows), "measured_on": f"{setup.measured_on} prompts"}
    reward = setup.reward.metadata
    if "accuracy" in reward:
        more["reward_accuracy"] = reward["accuracy"]
        more["reward_accuracy_note"] = f"{reward.get('measured_on', 'held-out')} pairs"
    return describe_run(settings, f"PPO on {settings.prompts.name}", task, **more)


def check_settings(settings: PPOSettings) -> None:
    """Raise ValueError for choices that do not go together, before anything is loaded."""
    settings, _ = fill_in(settings)
    settings.ppo.check_batch(settings.loop.batch_size)
    check_micro_batches(settings.mesh, settings.loop.batch_size, settings.ppo)
    check_scalars_of(settings.ppo, check_hyper(settings.hyper))


def sweep_task() -> Task:
    """Describe `ppo-jax ppo` to a sweep: base and reward are loaded once for all runs that name the same."""

    load = functools.lru_cache(maxsize=2)(load_base)

    @functools.lru_cache(maxsize=2)
    def choose(reward: tuple[str, ...], scoring: str, load_from: tuple[Any, ...], sampling: Sampling) -> Reward:
        model, _ = load(*load_from)
        options = from_yaml(RewardOptions, scoring)
        return choose_reward(reward, options, model, with_stops(sampling, model).stop_ids)

    def setup(settings: PPOSettings) -> Setup:
        model, encoder = load(*settings.base)
        chosen = choose(settings.reward, to_yaml(settings.scoring), settings.base, settings.ppo.sampling)
        return make_setup(fill_in(settings, model.config.hidden_size, chosen)[0], model, chosen, encoder)[0]

    def finish(directory: Path, settings: PPOSettings, setup: Setup, result: Result) -> None:
        write_report(directory, summarise(settings, setup), before=result.before, after=result.after)

    return Task("ppo-jax ppo", PPOSettings, lambda settings: settings.loop.updates, check_settings, setup, finish)


def _pretraining(settings: PPOSettings, model: Model) -> list[list[int]]:
    """Read the token rows of PPO-ptx, no longer than prompt and response together."""
    if (settings.pretrain is None) != (settings.hyper.ptx_coef == 0):
        raise ValueError("PPO-ptx needs both --pretrain FILE and a positive --hyper.ptx-coef")
    if settings.pretrain is None:
        return []
    longest = settings.max_prompt + settings.ppo.sampling.response_length
    encoded = encode_sft(read_sft(settings.pretrain), model.tokenizer, longest, settings.too_long)
    return [list(row) for row in encoded.rows]
