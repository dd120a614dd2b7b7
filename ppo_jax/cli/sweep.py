"""`ppo-jax sweep STAGE`, `sweep-report` and `compare`: ranges of any settings -> a study of many runs -> its page."""

import dataclasses
import importlib.util
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppo_jax.cli.common import read_date
from ppo_jax.cli.parse import Brief
from ppo_jax.data.chat import use_date
from ppo_jax.data.extras import install_line
from ppo_jax.parallel import launch
from ppo_jax.parallel.agreement import agree, of_first
from ppo_jax.parallel.mesh import use_mesh
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.output import config
from ppo_jax.runs.sweep.command import SETTINGS, delete_sweep, plan_sweep, run_sweep, show_plan
from ppo_jax.runs.sweep.plan import SweepConfig
from ppo_jax.runs.sweep.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Search ranges of a command's options."""

    ranges: dict[str, str] = dataclasses.field(default_factory=dict)
    """Give options by dotted name and their ranges, as hyper.kl-coef "log 0.005..0.2" policy.rank "4 8 16" seed 0..4;
    a range of seed repeats every setting with each seed."""
    sweep: SweepConfig = SweepConfig()
    """These options say how the ranges are searched."""
    dry_run: bool = False
    """Print the plan (groups, members, programs, how long it takes), and do nothing else."""


def make_settings(cls: type, brief: Brief, run_dir: str, examples: tuple[str, ...]) -> tuple[type, Brief]:
    """Make the settings of a sweep over those of a command, and choose what its --help shows."""
    here: Any = [("run_dir", Path, dataclasses.field(default=Path(run_dir)))]
    made = dataclasses.make_dataclass(
        f"Sweep{cls.__name__}", here, bases=(SweepOptions, cls), frozen=True, kw_only=True
    )
    made.__module__ = cls.__module__
    made.__doc__ = f"Search ranges of the options of {cls.__name__.removesuffix('Settings')} in a study of many runs."
    shown = tuple(name for name in brief.fields.get(cls, ()) if name not in ("resume", "compute", "hyper"))
    parts = {
        made: ("ranges", "sweep", "dry_run", *shown),
        SweepConfig: ("search", "trials", "objective", "members", "prune", "storage"),
    }
    return made, Brief(examples, {**parts, **{kind: names for kind, names in brief.fields.items() if kind is not cls}})


def sweep(settings: Any, make_task: Callable[[], Task]) -> None:
    """Run one slice of `ppo-jax sweep STAGE`."""
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(f"a sweep needs Optuna: {install_line('sweep')}")
    task = make_task()
    names = [field.name for field in dataclasses.fields(task.settings)]
    base = task.settings(**{name: getattr(settings, name) for name in names})
    plan = plan_sweep(task, base, settings.ranges, settings.sweep)
    if settings.dry_run:
        print("\n".join(show_plan(task, base, plan, settings.run_dir)))
        return
    if hasattr(settings, "distributed"):
        launch.start(settings.distributed)
    if settings.overwrite:
        agree(lambda: _overwrite(settings), ValueError, ConnectionError)
    resume = "yes" if getattr(settings, "resume", "no") == "yes" and not settings.overwrite else "auto"
    settings, base = (fix_date(one) for one in (settings, base))
    with use_mesh(settings.mesh), use_date(getattr(settings, "date", "")):
        run_sweep(settings.run_dir, base, plan, task, _repeatable(settings), resume)  # type: ignore[arg-type]
    if is_first():
        report_sweep(SweepReportSettings(settings.run_dir, settings.sweep.storage))


def fix_date(settings: Any) -> Any:
    """Give the settings with the sweep's day, which prompts may tell, whatever the day on which a slice begins.

    It is the one given, else that of the sweep in run_dir, else today's. Collective.
    """
    if not hasattr(settings, "date"):
        return settings
    earlier = read_date(settings.run_dir.expanduser() / SETTINGS)
    return dataclasses.replace(settings, date=of_first(settings.date or earlier or date.today().isoformat()))


def _repeatable(settings: Any) -> str:
    """Settings as YAML for another slice, or another day; the database's password is left out."""
    from ppo_jax.runs.sweep.search import hide_password

    url = settings.sweep.storage
    off: dict[str, Any] = {"overwrite": False}
    if hasattr(settings, "distributed"):
        off["distributed"] = launch.DistributedConfig()
    off["sweep"] = dataclasses.replace(settings.sweep, storage=hide_password(url) if url else "")
    return config.to_yaml(dataclasses.replace(settings, **off))


def _overwrite(settings: Any) -> None:
    from ppo_jax.runs.sweep.results import forget_study

    if is_first():
        delete_sweep(settings.run_dir, lambda: forget_study(settings.run_dir, settings.sweep.storage))


@dataclasses.dataclass(frozen=True)
class SweepReportSettings:
    """Make the page of a sweep, whether it has ended or not: curves, frontier, importance, the best settings."""

    directory: Annotated[Path, tyro.conf.Positional]
    """The sweep is in this directory."""
    storage: str = ""
    """The study is in the database at this URL; by default it is where the sweep says."""


BRIEF_REPORT = Brief(("ppo-jax sweep-report runs/sweep",))


def report_sweep(settings: SweepReportSettings) -> None:
    """Run `ppo-jax sweep-report`."""
    from ppo_jax.report import sweep as page
    from ppo_jax.runs.sweep.results import read_results, write_tables

    results = read_results(settings.directory, settings.storage)
    write_tables(settings.directory, results)
    print(f"report: {page.write(settings.directory, results)}")


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """Lay several runs over each other on one page: curves, the settings that differ, samples side by side."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """These are the run directories."""
    to: Path = Path("compare")
    """The page and its pictures go into this directory."""


BRIEF_COMPARE = Brief(("ppo-jax compare runs/first runs/second --to runs/compared",))


def compare(settings: CompareSettings) -> None:
    """Run `ppo-jax compare`."""
    from ppo_jax.report import compare as page

    print(f"report: {page.write(settings.to, settings.runs)}")
