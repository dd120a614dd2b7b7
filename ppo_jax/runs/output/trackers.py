"""Trackers that a run may be shown in beside its own files: Weights & Biases, MLflow, Trackio.

Each is a function that opens the page of a run, or goes on with it, and returns how values are sent there. The page's
id and the last step that it was sent of each value are kept in trackers.json: two runs of one name have two pages, and
a run that goes on has one, on which nothing is missing and nothing stands twice. What a resumed run does again, which
comes out as before, is not sent again.

They are told settings, numbers and samples; not the command, the host, or the URL of a reward.
"""

import atexit
import contextlib
import contextvars
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.data.extras import install_line
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.rewards.addresses import hide_addresses
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.writers import Writer

Samples = Sequence[Mapping[str, Any]]  # rows: step, prompt, response and the scores
Send = Callable[[int, Mapping[str, float], Samples], None]  # step, {"phase/name": number}, samples of an evaluation

LABELS = {"wandb": "Weights & Biases", "mlflow": "MLflow", "trackio": "Trackio"}


class Page(NamedTuple):
    """What is to be shown of a run, and where."""

    project: str
    directory: Path  # of the run, absolute
    id: str | None  # None: it is not there yet
    config: Mapping[str, Any]  # settings under dotted names

    @property
    def new_id(self) -> str:
        """An id that no other run has, though many are called ppo."""
        return f"{self.directory.name}-{secrets.token_hex(4)}"


def tracker_writer(name: str, project: str, run_dir: str | os.PathLike, config: Mapping[str, Any]) -> Writer:
    """Make a writer to a tracker, which leaves out what trackers.json says that it was sent before.

    Args:
      config: settings, nested as in YAML.

    Raises:
      ImportError: its package is missing; with the command that installs it. Whoever asks for a tracker wants to know
        before the run, not after.
      ValueError: it cannot be reached, or does not have the run that trackers.json names.
    """
    directory = Path(run_dir).resolve()
    known = rundir.read_trackers(directory).get(name) or _read_earlier(name, directory)
    before = dict[str, int](known.get("sent", {}))
    sent = dict(before)
    try:
        number, send = OPEN[name](Page(project, directory, known.get("id"), flatten_config(config)))
    except ImportError as error:
        raise ImportError(f"{name} was asked for but is not installed: {install_line(name)}") from error
    except Exception as error:  # each has its own kinds
        raise ValueError(f"{LABELS[name]} cannot be used: {hide_addresses(str(error))}") from error

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        named = {f"{phase}/{column}": float(value) for column, value in values.items()}
        new = {column: value for column, value in named.items() if step > before.get(column, -1)}
        if not new:
            return
        samples = read_samples(directory, step) if phase == "eval" else []
        try:
            send(int(step), {column: value for column, value in new.items() if not math.isnan(value)}, samples)
        except Exception as error:
            raise RuntimeError(hide_addresses(str(error))) from error
        sent.update(dict.fromkeys(new, int(step)))
        rundir.write_trackers(directory, rundir.read_trackers(directory) | {name: {"id": number, "sent": sent}})

    return write


def _read_earlier(name: str, directory: Path) -> dict[str, Any]:
    """What a run of earlier code is known by at Weights & Biases, the only one there was: it was sent all there is."""
    number = rundir.read_facts(directory).get("wandb") if name == "wandb" else None
    if number is None:
        return {}
    lines = read_jsonl(directory / rundir.METRICS)
    return {"id": number, "sent": {f"{line['phase']}/{column}": line["step"] for line in lines for column in line}}


def open_wandb(page: Page) -> tuple[str, Send]:
    """Weights & Biases: each phase has its own step axis, `<phase>/step`; samples are a table."""
    import wandb

    number = page.id or page.new_id
    # Neither the command line, which may hold a reward's URL, nor the host, nor the address of a git remote.
    quiet = wandb.Settings(x_disable_meta=True, x_disable_machine_info=True, disable_git=True, host="")
    run = wandb.init(
        project=page.project,
        id=number,
        name=page.directory.name,
        dir=str(page.directory),
        config=dict(page.config),
        resume="allow",
        reinit="create_new",  # a sweep has several runs in one process
        settings=quiet,
    )
    axes: set[str] = set()

    def send(step: int, values: Mapping[str, float], samples: Samples) -> None:
        phases = {name.partition("/")[0] for name in values}
        for phase in phases - axes:
            run.define_metric(f"{phase}/step")
            run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            axes.add(phase)
        tables: dict[str, Any] = {}
        if samples:
            tables["samples"] = wandb.Table(**_table(samples))
        run.log({**values, **tables, **{f"{phase}/step": step for phase in phases}})

    return number, send


def open_mlflow(page: Page) -> tuple[str, Send]:
    """MLflow, where MLFLOW_TRACKING_URI says: settings are params, samples are tables in JSON.

    A param keeps its first value there; what the settings are now is in config.yaml.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    # What fails is kept and sent later, so the client need not hold up training with its own attempts, of minutes.
    for variable, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}.items():
        os.environ.setdefault(variable, value)
    client, number = MlflowClient(), page.id
    if number is None:
        found = client.get_experiment_by_name(page.project)
        experiment = client.create_experiment(page.project) if found is None else found.experiment_id
        number = client.create_run(experiment, run_name=page.directory.name).info.run_id
    known = client.get_run(number).data.params
    client.update_run(number, status="RUNNING")
    params = {_mlflow_name(name): str(value)[:6000] for name, value in page.config.items()}
    client.log_batch(number, params=[Param(*pair) for pair in params.items() if pair[0] not in known])
    client.log_dict(number, dict(page.config), "config.yaml")
    atexit.register(client.set_terminated, number)

    def send(step: int, values: Mapping[str, float], samples: Samples) -> None:
        if samples:
            client.log_dict(number, _table(samples), f"samples/{step}.json")
        now = int(1000 * time.time())
        client.log_batch(
            number, metrics=[Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        )

    return number, send


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./: -]", "_", name)


def open_trackio(page: Page) -> tuple[str, Send]:
    """Trackio, on this machine or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says; samples are a table.

    It writes in a thread of its own: of a process that is killed the last second may be missing there.
    """
    import trackio

    number = page.id or page.new_id
    # In a context of its own, since Trackio ends the run that was begun before in the same one: a sweep has several.
    run = contextvars.copy_context().run(
        trackio.init,
        page.project,
        name=number,
        config=dict(page.config),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    atexit.register(run.finish)

    def send(step: int, values: Mapping[str, float], samples: Samples) -> None:
        tables: dict[str, Any] = {}
        if samples:
            tables["samples"] = trackio.Table(**_table(samples))
        run.log({**values, **tables}, step=step)

    return number, send


OPEN: dict[str, Callable[[Page], tuple[str, Send]]] = {
    "wandb": open_wandb,
    "mlflow": open_mlflow,
    "trackio": open_trackio,
}


def _table(samples: Samples) -> dict[str, Any]:
    columns = list(samples[0])
    return {"columns": columns, "data": [[row.get(name) for name in columns] for row in samples]}


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested settings under dotted names, {"hyper": {"kl_coef": 1}} as {"hyper.kl_coef": 1}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten_config(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def read_samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Read the samples of an evaluation as flat rows: step, prompt, response and the scores."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # that they cannot be read is no reason to lose the means
        return [
            {"step": sample["step"], "prompt": sample["prompt"], "response": sample["response"], **sample["scores"]}
            for sample in read_jsonl(run_dir / rundir.SAMPLES)
            if sample["step"] == step
        ]
    return []
