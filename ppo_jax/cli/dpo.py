"""`ppo-jax dpo`: preferences -> direct preference optimisation in a run directory."""

import dataclasses
from pathlib import Path

from ppo_jax.cli import common
from ppo_jax.cli.common import RunSettings
from ppo_jax.cli.parse import Brief
from ppo_jax.data import DatasetOptions
from ppo_jax.models.adapters import AdapterConfig
from ppo_jax.models.config import ModelOptions
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.dpo import encode, run_dpo
from ppo_jax.runs.output.rundir import LOG, run_directory
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.prompts import check_room, describe_unknown, make_mixture, read_split, too_few_rows
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.runs.sweep.task import Task
from ppo_jax.train.dpo import DPOConfig
from ppo_jax.train.loop import OfflineLoop


@dataclasses.dataclass(frozen=True)
class DPOSettings(RunSettings):
    """Train a policy on preferences without a reward model; the result is RUN_DIR/export/model."""

    model: str
    """Base and reference are this Hugging Face directory, name on the hub, or .gguf file."""
    pairs: Path
    """This file holds preferences: objects {"chosen", "rejected"}, optionally "prompt", or others' forms. Margins are
    not used."""
    run_dir: Path = Path("runs/dpo")
    """All results of the run go into this directory."""
    max_length: int = 512
    """A text (prompt, answer and EOS) may have at most this many tokens."""
    held_out: int = 200
    """This many pairs are kept apart to measure on, at most a fifth; if that is none, the training ones are used."""
    adapter: AdapterConfig = AdapterConfig()
    """These options say which parameters are trained."""
    dpo: DPOConfig = DPOConfig()
    """These options say how preferences are optimised, and for how long."""
    loop: OfflineLoop = OfflineLoop()
    """These options say when it is measured and saved."""
    resume: Resume = "no"
    """Go on with the run that is in run_dir; auto starts one where there is none. `--resume` alone means yes."""


BRIEF = Brief(
    (
        "ppo-jax dpo --model runs/sft/export/model --pairs preferences.jsonl",
        "ppo-jax dpo --model MODEL --pairs preferences.jsonl --run-dir runs/first --dpo.beta 0.05 --dpo.epochs 2",
    ),
    {
        DPOSettings: (
            *("model", "pairs", "run_dir", "max_length", "held_out", "seed", "too_long", "overwrite"),
            *("start", "chat_template", "dataset", "compute", "adapter", "dpo", "loop", "resume"),
        ),
        DatasetOptions: common.SHOWN_OF_DATASET,
        ModelOptions: ("dtype",),
        AdapterConfig: ("kind", "layers", "rank"),
        DPOConfig: ("epochs", "batch_size", "accumulate", "learning_rate", "beta"),
        OfflineLoop: ("eval_every", "checkpoint_every"),
    },
)


def dpo(settings: DPOSettings) -> None:
    """Run `ppo-jax dpo`."""
    rows, what = common.describe_micro_batch("dpo", settings.dpo)
    with common.use_run_mesh(settings, rows, what), common.use_run_date(settings) as dated:
        _dpo(dated)


def _dpo(settings: DPOSettings) -> None:
    model, encoder = common.load_base(*settings.base)
    split = read_split("preference pairs", settings.pairs, settings.dataset, settings.held_out, settings.seed, "pairs")
    train, held_out = (
        encode(part, encoder or model.tokenizer, settings.max_length, settings.too_long)
        for part in (split.training, split.measured)
    )
    sides = (train.encoded.chosen, train.encoded.rejected, held_out.encoded.chosen, held_out.encoded.rejected)
    check_room(model, [row for side in sides for row in side])
    if settings.dpo.batch_size > len(train.starts):
        raise ValueError(too_few_rows("--dpo.batch-size", settings.dpo.batch_size, len(train.starts), settings.pairs))
    start = common.load_start(settings, model, settings.adapter, "adapter", settings.dpo.reference)
    directory = run_directory(settings.run_dir, lambda: common.open_directory(settings))
    with progress("ppo-jax dpo", is_first(), log=directory / LOG) as screen:
        long = train.encoded.too_long + held_out.encoded.too_long
        common.report_long_texts(screen, long, settings.max_length, settings.too_long)
        common.tell_found(screen, split)
        common.tell(screen, describe_unknown(model, (row for side in sides for row in side)))
        task = f"{common.describe_roles(settings, settings.dpo.reference)} Preferences: {settings.pairs.name}."
        title, measured_on = "Direct preference optimisation", f"{split.kind} pairs"
        summary = common.describe_run(settings, title, task, measured_on=measured_on)
        common.begin_report(directory, summary)
        config = common.repeatable_yaml(settings)
        setup = OfflineSetup(
            model, train, held_out, settings.dpo, settings.seed, settings.adapter, settings.loop, config,
            mix=make_mixture(settings.dataset, split.training, train.encoded.kept), start=start,
        )  # fmt: skip
        result = run_dpo(directory, setup, screen, settings.resume)
        page = common.write_report(directory, summary, before=result.before, after=result.after)
        screen.message(
            f"{split.kind} pairs in the right order {100 * result.before['accuracy']:.1f} % -> "
            f"{100 * result.after['accuracy']:.1f} %; the model is at {result.path}; report: {page}"
        )
        screen.message(
            common.next_commands((f'ppo-jax generate --model {result.path} --prompt "..."', "what it writes now"))
        )


def sweep_task() -> Task:
    """Describe `ppo-jax dpo` to a sweep, which makes one run after another."""
    return Task("ppo-jax dpo", DPOSettings, lambda settings: 0, run=dpo)
