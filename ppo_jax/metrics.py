"""The writers that put metrics into a run directory, and their files.

A *writer* is any function `write(step, phase, values)`. Only process 0 needs one; `combine([])` writes nothing.
"""

import atexit
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ppo_jax import plain_json

Writer = Callable[[int, str, Mapping[str, float]], object]

RESERVED = ("step", "phase", "time")  # the columns of metrics.jsonl that are not values


def combine(writers: Iterable[Writer]) -> Writer:
    """One writer that calls each of `writers` in order."""
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
    """`call`, which writes something, as a function that lets no failure through; returns how many calls are kept.

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


def jsonl_writer(path: str | os.PathLike) -> Writer:
    """Writer that appends one JSON object a line to `path`: {"step", "phase", "time", and the values by name}.

    `time` is in seconds since the Unix epoch. Every line reaches the operating system before `write` returns, so a
    killed process loses none; a torn last line that an earlier crash left is removed first. The first write to a phase
    drops what an earlier process wrote of that phase from that step on: what is done again is recorded once.
    """
    path = Path(path)
    repair_jsonl(path)
    begun: set[str] = set()

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
    """Writer of TensorBoard events, one TensorBoard run per phase (`directory/ppo`, `directory/eval`, ...).

    The first write to a phase hides what an earlier process wrote from that step on, so a resumed run draws one
    curve. Without the tensorboardX package `notify` gets one line (default: stderr) and nothing is written.
    """
    try:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
    except ImportError:
        text = "TensorBoard events are not written: pip install 'ppo_jax[tensorboard]' (metrics.jsonl has all numbers)"
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
    """Writer to Weights & Biases (off unless asked for); each phase has its own step axis, `<phase>/step`.

    The run id is the name of the run directory, so that a resumed run continues its page. Raises ImportError
    with the pip command when the package is missing: whoever asks for it wants to know before the run, not after.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("wandb was asked for but is not installed: pip install 'ppo_jax[wandb]'") from error

    run_dir = Path(run_dir).resolve()
    run = wandb.init(
        project=project, id=run_dir.name, name=run_dir.name, dir=str(run_dir), config=dict(config or {}), resume="allow"
    )
    known: set[str] = set()

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        if phase not in known:
            run.define_metric(f"{phase}/step")
            run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            known.add(phase)
        named = {f"{phase}/{name}": float(value) for name, value in values.items() if not math.isnan(value)}
        run.log({**named, f"{phase}/step": int(step)})

    return write


# -- JSON lines ------------------------------------------------------------------------------------------------------


def append_jsonl(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records as strict JSON, a line each. NaN becomes null; an infinity becomes "Infinity" / "-Infinity"."""
    lines = [json.dumps(strict(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    data = memoryview("".join(lines).encode("utf-8", "replace"))
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:  # half a line would spoil the one after it
            file.truncate(start)
            raise


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, in order; [] when the file is missing.

    A torn last line (the process was killed while writing it) is left out. Any other line that is not a JSON
    object raises ValueError with file and line number.
    """
    path = Path(path)
    if not path.exists():
        return []
    return [record for _, record in _parse_lines(path)]


def repair_jsonl(path: str | os.PathLike) -> None:
    """Removes a torn last line in place, and ends a whole one that lacks its newline."""
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        whole = _is_object(data[data.rfind(b"\n") + 1 :])
        replace_file(path, data + b"\n" if whole else data[: data.rfind(b"\n") + 1])


def truncate_jsonl(path: str | os.PathLike, step: int, phases: Collection[str] | None = None) -> int:
    """Removes the records of a resumed run that lie after `step`; returns how many.

    Phases count their steps separately, so resuming PPO at step 20 must not touch reward-model step 300: with
    `phases` only records of those phases are considered. A torn last line goes too. The file is replaced
    atomically: a crash leaves either the old or the new one.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = _parse_lines(path)
    keep = [
        line
        for line, record in lines
        if record.get("step", 0) <= step or (phases is not None and record.get("phase") not in phases)
    ]
    replace_file(path, b"".join(line + b"\n" for line in keep))
    return len(lines) - len(keep)


def _parse_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line without newline, record) of each line that is not blank."""
    lines = path.read_bytes().split(b"\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if _is_object(line):
            parsed.append((line, json.loads(line)))
        elif number < len(lines):  # the last element is what follows the last newline: a torn line
            raise ValueError(f"{path}, line {number}: not a JSON object: {line[:60]!r}; mend or delete the line")
    return parsed


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(plain_json.loads(line), dict)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are both one
        return False


def strict(value: Any) -> Any:
    """The value with what JSON cannot hold replaced, recursively; arrays of one number become that number."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and not math.isfinite(number):
        return None if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
    return number


def replace_file(path: Path, data: bytes) -> None:
    """Writes a whole file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
