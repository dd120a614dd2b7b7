"""`ppo-jax sft`: demonstrations -> token rows -> supervised fine-tuning in a run directory."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ppo_jax.cli.common import (
    SHOWN_OF_DATASET,
    RunSettings,
    begin_report,
    describe_micro_batch,
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
    use_run_mesh,
    write_report,
)
from ppo_jax.cli.parse import Brief
from ppo_jax.data import DatasetOptions, encode_sft
from ppo_jax.data.encode import expand_turns
from ppo_jax.data.llamafactory.rows import encode_demonstrations
from ppo_jax.data.records import identities
from ppo_jax.data.turns import encode_turns
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.config import ModelOptions
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.output.rundir import LOG, run_directory
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.prompts import Split, check_room, describe_unknown, make_mixture, read_split, too_few_rows
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.runs.sft import run_sft
from ppo_jax.runs.sweep.task import Task
from ppo_jax.train.loop import OfflineLoop
from ppo_jax.train.sft import SFTConfig


@dataclasses.dataclass(frozen=True)
class SFTSettings(RunSettings):
    """Teach a model to write the responses of demonstrations; the result is RUN_DIR/export/model."""

    data: Path
    """This file holds demonstrations: objects {"prompt", "response"}, {"messages"} or {"text"}, or others' forms;
    .txt: texts."""
    run_dir: Path = Path("runs/sft")
    """All results of the run go into this directory."""
    max_length: int = 512
    """A demonstration may have at most this many tokens."""
    held_out: int = 64
    """This many demonstrations are kept apart to measure on, at most a fifth; if none, the training ones are used."""
    turns: Literal["last", "all", "together"] = "last"
    """This answer of a conversation is learnt: the last one; or all are, each as a demonstration of its own; or all
    together in one row."""
    adapter: AdapterConfig = AdapterConfig()
    """These options say which parameters are trained."""
    sft: SFTConfig = SFTConfig()
    """These options say how the model is fine-tuned, and for how long."""
    loop: OfflineLoop = OfflineLoop()
    """These options say when it is measured and saved."""
    resume: Resume = "no"
    """Go on with the run that is in run_dir; auto starts one where there is none. `--resume` alone means yes."""


BRIEF = Brief(
    (
        "ppo-jax sft --model MODEL --data demonstrations.jsonl",
        "ppo-jax sft --model MODEL --data texts.txt --run-dir runs/first --sft.epochs 3 --sft.learning-rate 2e-4",
    ),
    {
        SFTSettings: (
            *("model", "data", "run_dir", "max_length", "held_out", "seed", "too_long", "overwrite"),
            *("start", "chat_template", "dataset", "compute", "adapter", "sft", "loop", "resume"),
        ),
        DatasetOptions: SHOWN_OF_DATASET,
        ModelOptions: ("dtype",),
        AdapterConfig: ("kind", "layers", "rank"),
        SFTConfig: ("epochs", "batch_size", "accumulate", "learning_rate"),
        OfflineLoop: ("eval_every", "checkpoint_every"),
    },
)


def sft(settings: SFTSettings) -> None:
    """Run `ppo-jax sft`."""
    with use_run_mesh(settings, *describe_micro_batch("sft", settings.sft)), use_run_date(settings) as dated:
        _sft(dated)


def split_demonstrations(settings: SFTSettings) -> Split:
    """What the file holds, for training and apart; with `turns` "all" every answer of it."""
    split = read_split(
        "demonstrations", settings.data, settings.dataset, settings.held_out, settings.seed, "demonstrations"
    )
    if settings.turns != "all":
        return split
    training, measured = expand_turns(split.training), expand_turns(split.measured)
    if split.kind == "held-out":  # two conversations may begin alike
        known = set().union(*map(identities, training))
        measured = [record for record in measured if not identities(record) & known]
    return split._replace(training=training, measured=measured)


def _sft(settings: SFTSettings) -> None:
    model, encoder = load_base(*settings.base)
    split = split_demonstrations(settings)
    encode: Callable[..., Any] = encode_turns if settings.turns == "together" else encode_sft
    if encoder is not None:
        encode = partial(encode_demonstrations, last=settings.turns != "together")
    train, held_out = (
        encode(part, encoder or model.tokenizer, settings.max_length, settings.too_long)
        for part in (split.training, split.measured)
    )
    check_room(model, [*train.rows, *held_out.rows])
    if settings.sft.batch_size > len(train.rows):
        raise ValueError(too_few_rows("--sft.batch-size", settings.sft.batch_size, len(train.rows), settings.data))
    start = load_start(settings, model, settings.adapter, "adapter")
    directory = run_directory(settings.run_dir, lambda: open_directory(settings))
    with progress("ppo-jax sft", is_first(), log=directory / LOG) as screen:
        report_long_texts(screen, train.too_long + held_out.too_long, settings.max_length, settings.too_long)
        tell_found(screen, split)
        tell(screen, describe_unknown(model, train.rows))
        task = f"Base: {settings.model}. Demonstrations: {settings.data.name}."
        measured_on = f"{split.kind} demonstrations"
        summary = describe_run(settings, "Supervised fine-tuning", task, measured_on=measured_on)
        begin_report(directory, summary)
        config = repeatable_yaml(settings)
        setup = OfflineSetup(
            model, train, held_out, settings.sft, settings.seed, settings.adapter, settings.loop, config,
            mix=make_mixture(settings.dataset, split.training, train.kept), start=start,
        )  # fmt: skip
        result = run_sft(directory, setup, screen, settings.resume)
        page = write_report(directory, summary, before=result.before, after=result.after)
        screen.message(
            f"{split.kind} perplexity {result.before['perplexity']:.2f} -> {result.after['perplexity']:.2f}; "
            f"the model is at {result.path}; report: {page}"
        )
        screen.message(
            next_commands(
                (f"ppo-jax reward --model {result.path} --pairs preferences.jsonl", "a reward model on it"),
                (f"ppo-jax ppo --model {result.path} --prompts prompts.jsonl --reward runs/reward", "then PPO"),
            )
        )


def sweep_task() -> Task:
    """Describe `ppo-jax sft` to a sweep, which makes one run after another."""
    return Task("ppo-jax sft", SFTSettings, lambda settings: 0, run=sft)
