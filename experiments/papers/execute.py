"""Execute the papers' notebooks.

python -m experiments.papers.execute                 # on the saved records; writes notebooks/*.ipynb with outputs
python -m experiments.papers.execute --only 05       # those whose names begin so
python -m experiments.papers.execute --smoke         # toys of all studies, nothing is written: make notebooks
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from experiments.papers.records import RESULTS
from ppo_jax.cli.main import exit_code
from ppo_jax.cli.parse import parse

# A toy spends its time on compilation: the flags of tests/conftest.py.
QUICK = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
FOLDER = RESULTS.parent.parent.parent / "notebooks"


@dataclasses.dataclass(frozen=True)
class Execution:
    """Execute notebooks from their py:percent files."""

    smoke: bool = False
    """Run a toy of every study and write nothing; the committed outputs must belong to the committed code."""
    only: str = ""
    """Execute the notebooks whose names begin so; by default all."""


def main(args: list[str] | None = None) -> None:
    """Execute one after another; the first error ends it."""
    options = parse(Execution, args, prog="experiments.papers.execute")
    if options.smoke:
        os.environ |= {"SMOKE": "1", "XLA_FLAGS": f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"}
    for path in sorted(FOLDER.glob(f"{options.only}*.py")):
        begin = time.monotonic()
        execute(path, options.smoke)
        print(f"{path.stem}: {time.monotonic() - begin:.0f} s", flush=True)


def execute(path: Path, smoke: bool) -> None:
    """One notebook, in a kernel of its own; its outputs go beside it, unless it is a toy's."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook, target = jupytext.read(path), path.with_suffix(".ipynb")
    if smoke and target.exists() and sources(nbformat.read(target, 4)) != sources(notebook):
        raise ValueError(f"{target} holds outputs of other code than {path.name}; execute it again without --smoke")
    kernel = NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": FOLDER}})
    kernel.execute()
    if not smoke:
        for number, cell in enumerate(notebook.cells):  # what differs from run to run would fill the diff
            cell["id"] = f"cell-{number}"
            cell["metadata"].pop("execution", None)
        nbformat.write(notebook, target)


def sources(notebook: Any) -> list[str]:
    """The cells' texts."""
    return [cell["source"].strip() for cell in notebook.cells]


if __name__ == "__main__":
    sys.exit(exit_code("experiments.papers.execute", main))
