"""Execute the papers' notebooks.

python -m experiments.papers.execute                 # on the saved records; writes notebooks/*.ipynb with outputs
python -m experiments.papers.execute --only 05       # those whose names begin so
python -m experiments.papers.execute --smoke         # toys of all studies, nothing is written: make notebooks
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments.papers.records import RESULTS
from ppo_jax.cli.main import exit_code
from ppo_jax.cli.parse import parse

# A toy spends its time on compilation: the flags of tests/conftest.py.
QUICK = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
WORDS = ("02", "03", "06", "08")  # those on the language of 24 words: half of the work
FOLDER = RESULTS.parent.parent.parent / "notebooks"


@dataclasses.dataclass(frozen=True)
class Execution:
    """Execute notebooks from their py:percent files."""

    smoke: bool = False
    """Run a toy of every study and write nothing; the committed outputs must belong to the committed code."""
    only: str = ""
    """Execute the notebooks whose names begin so; by default all."""


class Kernel(NamedTuple):
    """A kernel that executes notebooks one after another."""

    execute: Callable[[Any], Any]
    close: Callable[[], None]


def main(args: list[str] | None = None) -> None:
    """Execute notebooks: each in a kernel of its own, or, of toys, two kernels at a time; the first error ends it."""
    options = parse(Execution, args, prog="experiments.papers.execute")
    paths = sorted(FOLDER.glob(f"{options.only}*.py"))
    if not options.smoke:
        for path in paths:
            with closing(open_kernel()) as kernel:
                report(path, partial(write, path, kernel))
        return
    os.environ |= {"SMOKE": "1", "XLA_FLAGS": f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"}
    groups = [[path for path in paths if (path.name[:2] in WORDS) == words] for words in (True, False)]
    with ThreadPoolExecutor(len(groups)) as pool:
        for done in [pool.submit(try_notebooks, group) for group in groups if group]:
            done.result()


def try_notebooks(paths: Sequence[Path]) -> None:
    """Toys of several notebooks in one kernel, so that what they share is imported, learnt and compiled once."""
    with closing(open_kernel()) as kernel:
        for path in paths:
            report(path, partial(try_notebook, path, kernel))


def report(path: Path, work: Callable[[], None]) -> None:
    """Print how long it took."""
    begin = time.monotonic()
    work()
    print(f"{path.stem}: {time.monotonic() - begin:.0f} s", flush=True)


def try_notebook(path: Path, kernel: Kernel) -> None:
    """A toy, whose names are forgotten before the next; nothing is written."""
    import jupytext
    import nbformat

    notebook, target = jupytext.read(path), path.with_suffix(".ipynb")
    if target.exists() and sources(nbformat.read(target, 4)) != sources(notebook):
        raise ValueError(f"{target} holds outputs of other code than {path.name}; execute it again without --smoke")
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    kernel.execute(notebook)


def write(path: Path, kernel: Kernel) -> None:
    """Execute a notebook on the saved records; its outputs go beside it."""
    import jupytext
    import nbformat

    notebook = jupytext.read(path)
    kernel.execute(notebook)
    for number, cell in enumerate(notebook.cells):  # what differs from run to run would fill the diff
        cell["id"] = f"cell-{number}"
        cell["metadata"].pop("execution", None)
    nbformat.write(notebook, path.with_suffix(".ipynb"))


def open_kernel() -> Kernel:
    """Start a kernel in the folder of the notebooks."""
    from jupyter_client.manager import KernelManager
    from nbclient import NotebookClient

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(FOLDER))

    def execute(notebook: Any) -> None:
        client = NotebookClient(notebook, km=manager, timeout=None, resources={"metadata": {"path": FOLDER}})
        client.execute(cleanup_kc=False)

    return Kernel(execute, partial(manager.shutdown_kernel, now=True))


def sources(notebook: Any) -> list[str]:
    """The cells' texts."""
    return [cell["source"].strip() for cell in notebook.cells]


if __name__ == "__main__":
    sys.exit(exit_code("experiments.papers.execute", main))
