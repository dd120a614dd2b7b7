"""The writers that put metrics into a run directory, and their files.

A *writer* is any function `write(step, phase, values)`. Only process 0 needs one; `combine([])` writes nothing.
"""

import atexit
import contextlib
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ppo_jax.data.extras import install_line
from ppo_jax.data.jsonl import append_jsonl, read_jsonl, repair_jsonl, truncate_jsonl
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.config import read_mapping
from ppo_jax.runs.output.screen import Screen

Writer = Callable[[int, str, Mapping[str, float]], object]

RESERVED = ("step", "phase", "time")  # the columns of metrics.jsonl that are not values


PhaseWriter = Callable[[int, Mapping[str, float]], None]


def combine(writers: Iterable[Writer]) -> Writer:
    """Make one writer that calls each of `writers` in order."""
    writers = tuple(writers)

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        for writer in writers:
            writer(step, phase, values)

    return write


def resilient(
    call: Callable[..., object],
    notify: Callable[[str], None],
    what: str,
    errors: tuple[type[Exception], ...] = (OSError,),
) -> Callable[..., int]:
    """Let no failure of `call`, which writes something, through; what is made returns how many calls are kept.

    What could not be written (a full disk, a directory that is gone) is kept in memory and written, in order, with the
    next call that succeeds; a call without arguments only tries again. `notify` hears of the first failure of each
    series, and of its end.
    """
    waiting: list[tuple[Any, ...]] = []
    failed = False

    def attempt(*arguments: Any) -> int:
        nonlocal failed
        if arguments:
            waiting.append(arguments)
        while waiting:
            try:
                call(*waiting[0])
            except errors as error:
                if not failed:
                    notify(f"{what} cannot be written: {error}. Training goes on, and the lines are kept in memory")
                failed = True
                return len(waiting)
            waiting.pop(0)
        if failed:
            notify(f"{what} is written again, and nothing of it is missing")
        failed = False
        return 0

    return attempt


def jsonl_writer(path: str | os.PathLike, in_order: Sequence[str] = ()) -> Writer:
    """Make a writer of JSON objects, a line each, to `path`: {"step", "phase", "time", and the values by name}.

    `time` is in seconds since the Unix epoch. Every line reaches the operating system before `write` returns, so a
    killed process loses none; a torn last line that an earlier crash left is removed first. The first write to a phase
    drops what an earlier process wrote of that phase from that step on: what is done again is recorded once. Not so
    for the phases `in_order`, of which the caller has dropped what is done again.
    """
    path = Path(path)
    repair_jsonl(path)
    begun = set(in_order)

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        clash = [name for name in values if name in RESERVED]
        if clash:
            raise ValueError(f"metric named {clash[0]!r}: {', '.join(RESERVED)} are columns of their own; rename it")
        numbers = {name: float(value) for name, value in values.items()}
        if phase not in begun:
            truncate_jsonl(path, int(step) - 1, [phase])
            begun.add(phase)
        append_jsonl(path, [{"step": int(step), "phase": phase, "time": round(time.time(), 3), **numbers}])

    return write


def tensorboard_writer(directory: str | os.PathLike, notify: Callable[[str], None] | None = None) -> Writer:
    """Make a writer of TensorBoard events, one TensorBoard run per phase (`directory/ppo`, `directory/eval`, ...).

    The first write to a phase hides what an earlier process wrote from that step on, so a resumed run draws one
    curve. Without the tensorboardX package `notify` gets one line (default: stderr) and nothing is written.
    """
    try:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
    except ImportError:
        text = f"TensorBoard events are not written: {install_line('tensorboard')} (metrics.jsonl has all numbers)"
        (notify or _to_stderr)(text)
        return combine([])

    # Written in this thread: tensorboardX's own dies of a full disk, and then blocks whoever adds to its queue.
    open_phases: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    flushed: dict[str, float] = {}

    def start(phase: str, step: int) -> Any:
        folder = Path(directory) / phase
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes that start within one second must not share a file.
        events = EventsWriter(str(folder / "events"), suffix := f".{time.time_ns()}")
        paths[phase] = next(folder.glob(f"*{suffix}"))
        events.write_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))
        return events

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        if phase not in open_phases or not paths[phase].exists():  # the run directory may have been removed
            open_phases[phase] = start(phase, int(step))
        events = open_phases[phase]
        try:
            for name, value in values.items():
                if not math.isnan(value):  # nothing was measured
                    scalar = summary.scalar(name, float(value))
                    events.write_event(Event(wall_time=time.time(), step=int(step), summary=scalar))
            if time.monotonic() - flushed.get(phase, 0.0) > 2:
                events.flush()
                flushed[phase] = time.monotonic()
        except OSError:
            flushed.pop(phase, None)
            del open_phases[phase]  # its file may end in half a record; the next write opens another
            raise

    def finish() -> None:
        for events in open_phases.values():
            with contextlib.suppress(OSError):
                events.flush()

    atexit.register(finish)
    return write


def wandb_writer(project: str, run_dir: str | os.PathLike, config: Mapping[str, Any] | None = None) -> Writer:
    """Make a writer to Weights & Biases (off unless asked for); each phase has its own step axis, `<phase>/step`.

    The run id is drawn once and kept in run.json, so that a resumed run continues its page and two runs that are both
    called ppo do not. The samples of an evaluation become a table of its page, under `samples`. Raises ImportError
    with the pip command when the package is missing: whoever asks for it wants to know before the run, not after.

    Args:
      config: settings, nested as in YAML; wandb gets them flat, under dotted names.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"wandb was asked for but is not installed: {install_line('wandb')}") from error

    run_dir = Path(run_dir).resolve()
    run = wandb.init(
        project=project,
        id=choose_id(run_dir),
        name=run_dir.name,
        dir=str(run_dir),
        config=flatten_config(config or {}),
        resume="allow",
        settings=wandb.Settings(x_disable_meta=True),  # the command line, which may hold a reward's URL, and the host
    )
    known: set[str] = set()

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        if phase not in known:
            run.define_metric(f"{phase}/step")
            run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            known.add(phase)
        named = {f"{phase}/{name}": float(value) for name, value in values.items() if not math.isnan(value)}
        if phase == "eval" and (samples := read_samples(run_dir, step)):
            columns = list(samples[0])
            rows = [[sample.get(name) for name in columns] for sample in samples]
            named["samples"] = wandb.Table(columns=columns, data=rows)
        run.log({**named, f"{phase}/step": int(step)})

    return write


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested settings under dotted names, {"hyper": {"kl_coef": 1}} as {"hyper.kl_coef": 1}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten_config(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def choose_id(run_dir: Path) -> str:
    """Read the id of a run from run.json; draw one, and put it there, where there is none."""
    known = rundir.read_facts(run_dir).get("wandb")
    if not known:
        before = (run_dir / "wandb").is_dir()  # a run of earlier code, whose id was its name
        known = run_dir.name if before else f"{run_dir.name}-{secrets.token_hex(4)}"
        rundir.add_facts(run_dir, wandb=known)
    return known


def read_samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Read the samples of an evaluation as flat rows: step, prompt, response and the scores."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # that they cannot be read is no reason to lose the means
        return [
            {"step": sample["step"], "prompt": sample["prompt"], "response": sample["response"], **sample["scores"]}
            for sample in read_jsonl(run_dir / rundir.SAMPLES)
            if sample["step"] == step
        ]
    return []


# -- JSON lines ------------------------------------------------------------------------------------------------------


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_writer(directory: Path, screen: Screen, total: int | None = None) -> Writer:
    """Make a writer of a step's values to metrics.jsonl, to TensorBoard and onto the screen.

    A file that cannot be written is reported and tried again; it does not end the run. Only the first process writes.
    """
    return with_screen(run_files(directory, screen), screen, total)


def with_screen(
    writers: Sequence[Writer], screen: Screen, total: int | None
) -> Callable[[int, str, Mapping[str, float]], None]:
    files = combine(writers)

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        files(step, phase, values)
        if phase in ("ppo", "eval"):  # the other phases know their own length
            screen.update(phase=phase, step=step, total=total, values=values)

    return write


def run_files(
    directory: Path, screen: Screen, wandb: str = "", config: str = "", in_order: Sequence[str] = ()
) -> list[Callable[..., int]]:
    """Make a writer for each place; called without arguments it tries again what it could not write.

    Args:
      in_order: as for `jsonl_writer`.
    """
    if jax.process_index():
        return []
    say = screen.message
    tensorboard = tensorboard_writer(directory / rundir.TENSORBOARD, say)
    writers = [
        resilient(jsonl_writer(directory / rundir.METRICS, in_order), say, rundir.METRICS),
        resilient(tensorboard, say, f"{rundir.TENSORBOARD}/"),
    ]
    if wandb:
        online = wandb_writer(wandb, directory, read_mapping(config) if config else {})
        writers.append(resilient(online, say, "Weights & Biases", (Exception,)))
    return writers


def phase_writer(directory: Path, screen: Screen, phase: str, total: int) -> PhaseWriter:
    """Make write(step, values) of one phase, to the run's files and onto the screen."""
    files = run_writer(directory, screen)

    def write(step: int, values: Mapping[str, float]) -> None:
        files(step, phase, values)
        screen.update(phase=phase, step=step, total=total, values=values)

    return write
