"""`ppo-jax sft`: demonstrations -> token rows -> supervised fine-tuning in a run directory."""

import dataclasses
from pathlib import Path

from ppo_jax.cli.common import (
    RunSettings,
    describe_micro_batch,
    open_directory,
    report_long_texts,
    use_run_mesh,
    write_report,
)
from ppo_jax.cli.parse import Brief
from ppo_jax.data import encode_sft, read_sft
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.pretrained import load_model
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.output.rundir import LOG, run_directory
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.prompts import check_room, split_held_out, too_few_rows
from ppo_jax.runs.sft import run_sft
from ppo_jax.train.sft import SFTConfig


@dataclasses.dataclass(frozen=True)
class SFTSettings(RunSettings):
    """Teach a model to write the responses of demonstrations; the result is RUN_DIR/export/model."""

    data: Path
    """This file holds demonstrations, a JSON object per line: {"prompt", "response"}, {"messages"} or {"text"}; .txt:
    texts."""
    run_dir: Path = Path("runs/sft")
    """All results of the run go into this directory."""
    max_length: int = 512
    """A demonstration may have at most this many tokens."""
    held_out: int = 64
    """This many demonstrations are kept apart to measure on, at most a fifth; if none, the training ones are used."""
    adapter: AdapterConfig = AdapterConfig()
    """These options say which parameters are trained."""
    sft: SFTConfig = SFTConfig()
    """These options say how the model is fine-tuned, and for how long."""


BRIEF = Brief(
    (
        "ppo-jax sft --model MODEL --data demonstrations.jsonl",
        "ppo-jax sft --model MODEL --data texts.txt --run-dir runs/first --sft.epochs 3 --sft.learning-rate 2e-4",
    ),
    {
        SFTSettings: (
            *("model", "data", "run_dir", "max_length", "held_out", "seed", "too_long", "overwrite"),
            *("compute", "adapter", "sft"),
        ),
        ModelOptions: ("dtype",),
        AdapterConfig: ("kind", "layers", "rank"),
        SFTConfig: ("epochs", "batch_size", "accumulate", "learning_rate"),
    },
)


def sft(settings: SFTSettings) -> None:
    """Run `ppo-jax sft`."""
    with use_run_mesh(settings, *describe_micro_batch("sft", settings.sft)):
        _sft(settings)


def _sft(settings: SFTSettings) -> None:
    model = load_model(settings.model, settings.compute)
    records = split_held_out(read_sft(settings.data), settings.held_out, settings.seed)
    train, held_out = (encode_sft(part, model.tokenizer, settings.max_length, settings.too_long) for part in records)
    check_room(model, [*train.rows, *held_out.rows])
    if settings.sft.batch_size > len(train.rows):
        raise ValueError(too_few_rows("--sft.batch-size", settings.sft.batch_size, len(train.rows), settings.data))
    directory = run_directory(settings.run_dir, lambda: open_directory(settings))
    with progress("ppo-jax sft", is_first(), log=directory / LOG) as screen:
        report_long_texts(screen, train.too_long + held_out.too_long, settings.max_length, settings.too_long)
        result = run_sft(directory, model, settings.adapter, train, held_out, settings.sft, settings.seed, screen)
        screen.message(
            f"held-out perplexity {result.before['perplexity']:.2f} -> {result.after['perplexity']:.2f}; "
            f"the model is at {result.path}{write_report(directory, f'SFT on {settings.data.name}', settings)}"
        )
