"""Events for TensorBoard, in the run directory."""

import atexit
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.data.extras import install_line
from ppo_jax.runs.output.writers import Writer, combine


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


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
