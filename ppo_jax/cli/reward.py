"""`ppo-jax reward` and `ppo-jax export-reward`: the files of preferences -> a reward model -> its report."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.cli import common
from ppo_jax.cli.common import RunSettings
from ppo_jax.cli.parse import Brief
from ppo_jax.data import DatasetOptions, EncodedPairs, encode_pairs, read_sft
from ppo_jax.data.batches import Mixture
from ppo_jax.data.disk import make_directory
from ppo_jax.data.encode import encode_choices, encode_ratings
from ppo_jax.data.forms import Stage
from ppo_jax.data.llamafactory.encoding import Encoder
from ppo_jax.data.llamafactory.rows import encode_preferences
from ppo_jax.data.locks import hold_target
from ppo_jax.data.records import RatingRecord
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.pretrained import Model
from ppo_jax.parallel.processes import is_first
from ppo_jax.rewards import loading
from ppo_jax.runs.checkpoints.resuming import Resume
from ppo_jax.runs.output.rundir import LOG, run_directory
from ppo_jax.runs.output.screen import Screen, progress
from ppo_jax.runs.prompts import Split, check_room, describe_unknown, make_mixture, read_split
from ppo_jax.runs.reward import TRAINING, Data, RewardResult, check_batch, collect_comparisons, run_reward
from ppo_jax.runs.setup import OfflineSetup
from ppo_jax.runs.sweep.task import Task
from ppo_jax.train.calibration import format_table
from ppo_jax.train.loop import OfflineLoop
from ppo_jax.train.reward import RewardConfig


@dataclasses.dataclass(frozen=True)
class RewardSettings(RunSettings):
    """Train a reward model from preferences; the result is RUN_DIR/export/reward."""

    model: str
    """The base is this Hugging Face directory, name on the hub, or .gguf file. A LoRA reward model only fits PPO on the
    same base."""
    pairs: Path | None = None
    """This file holds preferences: objects {"chosen", "rejected"}, optionally "prompt" and "margin", or others'
    forms."""
    ratings: Path | None = None
    """This file holds {"response", "rating"} instead, optionally "prompt"; all responses of a batch are compared with
    one another."""
    choices: Path | None = None
    """This file holds {"responses": [text, ...], "best": place from 0} instead, optionally "prompt"."""
    reference: Path | None = None
    """Scores get mean 0, std 1 on the texts of this file, {"prompt", "response"} or {"text"}; else on the training
    texts."""
    run_dir: Path = Path("runs/reward")
    """All results of the run go into this directory."""
    max_length: int = 512
    """A text (prompt and answer) may have at most this many tokens."""
    held_out: int = 200
    """This many lines are kept apart to measure on, at most a fifth; if that is none, the training ones are used."""
    reward: RewardConfig = RewardConfig()
    """These options describe the reward model and its training."""
    loop: OfflineLoop = OfflineLoop(best_metric="accuracy")
    """These options say when it is measured and saved."""
    resume: Resume = "no"
    """Go on with the run that is in run_dir; auto starts one where there is none. `--resume` alone means yes."""


@dataclasses.dataclass(frozen=True)
class ExportRewardSettings:
    """Merge a LoRA reward model into its base: a Hugging Face sequence-classification directory."""

    reward: Path
    """The reward model is in this run directory of `ppo-jax reward`, or is this artifact of one."""
    output: Path
    """The model goes into this new directory. `transformers` reproduces its scores but for the constant ppo_jax_bias of
    config.json."""
    model: str | None = None
    """The base is here, where the one that the artifact names has moved."""
    overwrite: bool = False
    """Replace a sequence classifier that is there already."""


BRIEF = Brief(
    (
        "ppo-jax reward --model runs/sft/export/model --pairs preferences.jsonl",
        "ppo-jax reward --model MODEL --ratings ratings.jsonl --run-dir runs/ratings --reward.lora-layers 0",
    ),
    {
        RewardSettings: (
            *("model", "pairs", "ratings", "choices", "run_dir", "max_length", "held_out", "seed", "too_long"),
            *("overwrite", "start", "chat_template", "dataset", "compute", "reward", "loop", "resume"),
        ),
        DatasetOptions: common.SHOWN_OF_DATASET,
        ModelOptions: ("dtype",),
        RewardConfig: ("kind", "depth", "lora_layers", "rank", "batch_size", "epochs", "learning_rate"),
        OfflineLoop: ("eval_every", "checkpoint_every"),
    },
)
BRIEF_EXPORT = Brief(("ppo-jax export-reward --reward runs/reward --output classifier",))


def export_reward(settings: ExportRewardSettings) -> None:
    """Run `ppo-jax export-reward`."""
    make_directory(settings.output.parent)
    with hold_target(settings.output):
        path = loading.export_reward(settings.reward, settings.output, settings.model, settings.overwrite)
    print(f"the reward model is at {path}")


def reward(settings: RewardSettings) -> None:
    """Run `ppo-jax reward`."""
    given = {name: getattr(settings, name) for name in ("pairs", "ratings", "choices")}
    if sum(path is not None for path in given.values()) != 1:
        raise ValueError("give exactly one of --pairs, --ratings and --choices")
    size = settings.reward.batch_size
    what = f"a batch (--reward.batch-size {size})"
    with common.use_run_mesh(settings, size, what), common.use_run_date(settings) as dated:
        _reward(dated)


def _reward(settings: RewardSettings) -> None:
    model, encoder = common.load_base(*settings.base)
    settings.reward.trunk(model.config)  # raises before the directory is touched
    said = {name: getattr(settings.reward, name) for name in ("kind", "depth", "lora_layers", "rank", "alpha")}
    start = common.load_start(settings, model, dataclasses.replace(RewardConfig(), **said), "reward")
    train, held_out, split, where, mix = _data(settings, model, encoder)
    reference = _reference(settings, model)
    parts = ((train, TRAINING), (held_out, f"{split.kind} texts"))
    rows = [row for part, what in parts for row in collect_comparisons(part, settings.seed, f"{what} of {where}").rows]
    check_room(model, rows)
    try:
        check_batch(settings.reward, train)
    except ValueError as error:
        raise ValueError(f"--reward.{error}: {where} leaves no more to train on; change it, or the data") from error
    directory = run_directory(settings.run_dir, lambda: common.open_directory(settings))
    with progress("ppo-jax reward", is_first(), log=directory / LOG) as screen:
        common.report_long_texts(screen, train.too_long + held_out.too_long, settings.max_length, settings.too_long)
        common.tell_found(screen, split)
        common.tell(screen, describe_unknown(model, rows))
        task = f"Base: {settings.model}. Preferences: {where.name}."
        summary = common.describe_run(settings, "Reward model", task, measured_on=f"{split.kind} pairs")
        common.begin_report(directory, summary)
        setup = OfflineSetup(
            model, train, held_out, settings.reward, settings.seed, loop=settings.loop, reference=reference,
            config=common.repeatable_yaml(settings), mix=mix, start=start,
        )  # fmt: skip
        result = run_reward(directory, setup, screen, settings.resume)
        table = [bucket._asdict() for bucket in result.calibration]
        page = common.write_report(directory, summary, after=result.heldout, calibration=table)
        report_result(screen, result, page, split.kind)
        base, run = settings.model, settings.run_dir
        screen.message(
            common.next_commands(
                (f"ppo-jax ppo --model {base} --prompts prompts.jsonl --reward {run}", "PPO against it"),
                (f"ppo-jax serve-reward --reward {run}", "the same over HTTP"),
            )
        )


def report_result(screen: Screen, result: RewardResult, page: Path, kind: str) -> None:
    """Say what the reward model is worth, and where it is."""
    values, pairs = result.heldout, sum(bucket.pairs for bucket in result.calibration)
    for line in format_table(result.calibration):
        screen.message(line)
    screen.message(
        f"{kind} scores: mean {values['score_mean']:.2f}, std {values['score_std']:.2f}, "
        f"from {values['score_min']:.2f} to {values['score_max']:.2f}; "
        f"calibration error {100 * values['calibration_error']:.1f} %"
    )
    screen.message(
        f"{100 * result.accuracy:.1f} % of {pairs} {kind} pairs in the right order; "
        f"the reward model is at {result.path}; report: {page}"
    )


class _Data(NamedTuple):
    """Token rows, and where they come from."""

    training: Data
    measured: Data
    split: Split
    path: Path
    mix: Mixture | None


def _data(settings: RewardSettings, model: Model, encoder: Encoder | None) -> _Data:
    """Read the file and encode both parts. No row has an EOS: a reward reads a response's text, however that ended.

    By a template of LLaMA-Factory rows do end with what it writes there.
    """
    if encoder is not None and settings.pairs is None:
        raise ValueError("--dataset.template is for --pairs")
    encode: Callable[..., Any]
    if settings.pairs is not None:
        path, encode = settings.pairs, encode_preferences if encoder else partial(encode_pairs, eos=False)
        split = _split("preference pairs", path, "pairs", settings)
    elif settings.ratings is not None:
        path, encode = settings.ratings, encode_ratings
        split = _split("ratings", path, "ratings", settings)
    else:
        assert settings.choices is not None
        path, encode = settings.choices, encode_choices
        split = _split("choices", path, "choices", settings)
    training, measured = (
        encode(part, encoder or model.tokenizer, settings.max_length, settings.too_long)
        for part in (split.training, split.measured)
    )
    kept = training.kept if isinstance(training, EncodedPairs) else ()
    mix = make_mixture(settings.dataset, split.training, kept)
    return _Data(training, measured, split, path, mix)


def _split(stage: Stage, path: Path, what: str, settings: RewardSettings) -> Split:
    if settings.dataset.weights and stage != "preference pairs":
        raise ValueError(f"--dataset.weights are for --pairs: {what} of several files are taken together, unweighted")
    return read_split(stage, path, settings.dataset, settings.held_out, settings.seed, what)


def _reference(settings: RewardSettings, model: Model) -> list[list[int]]:
    if settings.reference is None:
        return []
    if not settings.reward.normalise:
        raise ValueError("--reference is only read to normalise; drop it, or --reward.no-normalise")
    records = [RatingRecord(r.prompt, r.response, 0.0, r.where) for r in read_sft(settings.reference)]
    rows = encode_ratings(records, model.tokenizer, settings.max_length, settings.too_long).rows
    if len(rows) < 2:
        raise ValueError(f"{settings.reference} has {len(rows)} text; a standard deviation needs at least 2")
    return rows


def sweep_task() -> Task:
    """Describe `ppo-jax reward` to a sweep, which makes one run after another."""
    return Task("ppo-jax reward", RewardSettings, lambda settings: 0, run=reward)
