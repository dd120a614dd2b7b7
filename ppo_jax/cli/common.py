"""The parts that several commands share: files -> records -> token rows -> a stage -> a run directory.

Everything that a user may have got wrong is looked at before the run directory is touched, so that a mistake beside
`--overwrite` deletes nothing.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, cast

from ppo_jax.data import DatasetOptions, TooLong
from ppo_jax.data.chat import use_date
from ppo_jax.data.disk import replace_file
from ppo_jax.data.llamafactory.encoding import Encoder, list_stops, make_encoder
from ppo_jax.data.options import TemplateOptions
from ppo_jax.models.config import ModelOptions
from ppo_jax.models.files.hub import resolve
from ppo_jax.models.files.peft_reading import is_adapter, read_trained
from ppo_jax.models.pretrained import Model, load_model
from ppo_jax.parallel import launch
from ppo_jax.parallel.agreement import of_first
from ppo_jax.parallel.launch import DistributedConfig
from ppo_jax.parallel.mesh import MeshConfig, check_rows, use_mesh
from ppo_jax.parallel.processes import is_first
from ppo_jax.report import page
from ppo_jax.rewards.addresses import saved_sources
from ppo_jax.runs.facts import environment, record_start
from ppo_jax.runs.output import config, rundir
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.prompts import Split
from ppo_jax.runs.setup import check_reference
from ppo_jax.train.offline import OfflineConfig
from ppo_jax.types import PyTree

SHOWN_OF_DATASET = ("columns", "max_samples", "more", "weights")  # of the options of data, in --help
S = TypeVar("S", bound=Any)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What every stage is told. (Of what is named here only `model` may be given by place.)"""

    model: str
    """The model is a Hugging Face directory, a name on the hub, or a .gguf file."""
    _: dataclasses.KW_ONLY
    start: str = ""
    """Training goes on with this LoRA adapter of the peft library (a directory or a name on the hub), as large as it
    is."""
    seed: int = 0
    """This number seeds the order of the data, sampling and initialisation."""
    too_long: TooLong = "error"
    """A text longer than allowed is an error, is truncated from the left, or is dropped; share cuts prompt and answer
    on the right as LLaMA-Factory does, with a template of it."""
    chat_template: Path | None = None
    """This file's chat template (Jinja) takes the place of the tokenizer's own, also in what is exported."""
    dataset: DatasetOptions = DatasetOptions()
    """These options say how the files of data are read, mixed and held out."""
    compute: ModelOptions = ModelOptions()
    """These options trade memory against speed when the model is run."""
    mesh: MeshConfig = MeshConfig()
    """These options say how many devices share the work; by default it is one."""
    distributed: DistributedConfig = DistributedConfig()
    """These options say how this process finds the others, where there are several."""
    date: str = ""
    """This day, as 2026-11-28, is the date that chat templates write; by default it is the day when the run began."""
    overwrite: bool = False
    """Delete the run that is in run_dir and start anew."""

    @property
    def base(self) -> tuple[str, ModelOptions, Path | None, TemplateOptions]:
        """What `load_base` takes."""
        return self.model, self.compute, self.chat_template, self.dataset.template

    def __post_init__(self) -> None:
        if self.too_long == "share" and not self.dataset.template.name:
            raise ValueError("too_long=share is the way of LLaMA-Factory and goes with --dataset.template.name")


def load_base(
    name: str, compute: ModelOptions, chat_template: Path | None, template: TemplateOptions
) -> tuple[Model, Encoder | None]:
    """Load the model that a stage starts from, with the template of LLaMA-Factory that its data are encoded by, if any.

    That template says what ends an answer, of the exported tokenizer too.
    """
    model = load_model(name, compute, chat_template)
    if not template.name:
        return model, None
    encoder = make_encoder(template, model.tokenizer)
    stops = {*model.config.eos_token_ids, *list_stops(encoder.template, model.tokenizer)}
    return model._replace(config=dataclasses.replace(model.config, eos_token_ids=tuple(sorted(stops)))), encoder


def load_start(settings: RunSettings, model: Model, chosen: Any, option: str, reference: str = "base") -> PyTree:
    """Read the adapter that training goes on with; None where it begins with a fresh one.

    Args:
      chosen: the options under `option` that say what is trained, which an adapter says itself.
      reference: where the KL is measured from.
    """
    check_reference(reference, "--dpo.reference" if option == "adapter" else "--ppo.kl.reference", settings.start)
    if not settings.start:
        return None
    if chosen != type(chosen)():
        raise ValueError(f"--start says itself what is trained; leave out what else --{option}.* says of it")
    where = Path(resolve(settings.start))
    if not is_adapter(where):
        how = "write one by `ppo-jax export RUN --to DIR --format peft`, or give a whole model as --model"
        raise ValueError(f"--start {settings.start} is no adapter of the peft library: {how}")
    return read_trained(model.config, where)


def describe_roles(settings: RunSettings, reference: str) -> str:
    """Say which model is the base, which the reference, and what a policy starts from."""
    if not settings.start:
        return f"Base and reference: {settings.model}."
    start = Path(settings.start).name
    return f"Base: {settings.model}. Start: {start}. Reference: {start if reference == 'start' else settings.model}."


@contextlib.contextmanager
def use_run_mesh(settings: RunSettings, rows: int, what: str) -> Iterator[None]:
    """Join the other processes, if there are any; inside the block everything runs on the mesh of the settings.

    Args:
      rows: how many the devices work on at once.
      what: says so in the message, with the options that decide it.

    Raises ValueError when the rows do not spread evenly over the devices that cut the batch.
    """
    check_rows(rows, settings.mesh, what)
    launch.start(settings.distributed)
    with use_mesh(settings.mesh):
        yield


@contextlib.contextmanager
def use_run_date(settings: S) -> Iterator[S]:
    """Give the settings with the day of the run, which chat templates write inside the block. Collective.

    It is the one given, else that of the run which goes on, else today's: a run that was stopped before midnight has
    the same prompts after it.
    """
    goes_on = getattr(settings, "resume", "no") != "no" and not settings.overwrite
    earlier = read_date(settings.run_dir.expanduser() / rundir.CONFIG) if goes_on else ""
    day = of_first(settings.date or earlier or date.today().isoformat())
    with use_date(day):
        yield dataclasses.replace(settings, date=day)


def read_date(file: Path) -> str:
    """Read the day in the settings of an earlier run; "" where they have none."""
    found = config.read_mapping(file.read_text(encoding="utf-8"), str(file)).get("date") if file.is_file() else None
    return str(found or "")


def describe_micro_batch(option: str, config: OfflineConfig) -> tuple[int, str]:
    """Describe the micro-batch of a configuration under `--option`, as `use_run_mesh` takes it."""
    what = f"a micro-batch (--{option}.batch-size {config.batch_size} / --{option}.accumulate {config.accumulate})"
    return config.micro_batch, what


def open_directory(settings: Any) -> Path:
    """Open the run directory, and write into it the settings that repeat the run, and who started it when."""
    directory = rundir.open_run(settings.run_dir, getattr(settings, "resume", "no"), settings.overwrite)
    if not (directory / rundir.CONFIG).exists():  # a resumed run's is replaced when its checkpoint has been read
        replace_file(directory / rundir.CONFIG, repeatable_yaml(settings).encode())
    record_start(directory)
    return directory


def describe_run(settings: Any, title: str, task: str, **more: Any) -> page.Summary:
    """Gather what the report of a run is told before there are results.

    Args:
      more: further fields of `report.page.Summary`.
    """
    about = {"title": title, "task": task, "seed": settings.seed, "date": date.today().isoformat()}
    return cast(page.Summary, about | environment() | more)


def begin_report(directory: Path, summary: page.Summary) -> None:
    """Leave in the run directory what its report is to say, so that one can be drawn on the way."""
    with contextlib.suppress(OSError):  # a full disk is no reason to end the run
        rundir.write_summary(directory, summary)


def write_report(directory: Path, summary: page.Summary, **results: Any) -> Path:
    """Write the report with these results as well; return its path. Only the first process has something to draw."""
    if is_first():
        page.write(directory, cast(page.Summary, {**summary, **results}))
    return directory / rundir.REPORT


def repeatable_yaml(settings: Any) -> str:
    """Write settings as YAML that, passed back with --config, neither deletes nor continues anything by itself."""
    off: dict[str, Any] = {"overwrite": False} | ({"resume": "no"} if hasattr(settings, "resume") else {})
    if hasattr(settings, "distributed"):  # where a process ran is not part of what it did
        off["distributed"] = launch.DistributedConfig()
    if isinstance(sources := getattr(settings, "reward", None), tuple):  # no secrets, no internal addresses
        off["reward"] = saved_sources(sources)
    return config.to_yaml(dataclasses.replace(settings, **off))


def next_commands(*lines: tuple[str, str]) -> str:
    """Say what to do next: commands, each with what it is for."""
    width = max(len(command) for command, _ in lines)
    return "\n".join(["Next:", *(f"  {command:<{width}}  # {purpose}" for command, purpose in lines)])


def tell(screen: Screen, notice: str) -> None:
    """Say a notice, if there is one."""
    if notice:
        screen.message(notice)


def tell_found(screen: Screen, split: Split) -> None:
    """Say what the files held, and what was held out of it."""
    for line in (*split.found, split.notice):
        tell(screen, line)


def report_long_texts(screen: Screen, count: int, limit: int, too_long: TooLong) -> None:
    """Say how many texts were too long and what was done with them."""
    if count:
        done = {"drop": "dropped", "share": "cut by shares"}.get(too_long, "truncated from the left")
        screen.message(f"{count} texts were longer than {limit} tokens and were {done}")
