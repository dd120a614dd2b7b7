"""`ppo-jax report`: the page of a run, drawn again from what its directory holds."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ppo_jax.cli.parse import Brief
from ppo_jax.report import page
from ppo_jax.runs.output.rundir import holds_run


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Draw the report of a run again, from what its directory holds; also in the middle of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """The report of this run directory (of `ppo-jax ppo`, `sft`, `dpo` or `reward`, or an experiment) is drawn."""


BRIEF = Brief(("ppo-jax report runs/ppo",))


def report(settings: ReportSettings) -> None:
    """`ppo-jax report`."""
    if not holds_run(settings.run):
        raise ValueError(f"{settings.run} holds no run: give the directory that has its metrics.jsonl")
    print(f"report: {page.write(settings.run)}")
