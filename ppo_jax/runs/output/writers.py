"""What a writer of metrics is, what may be made of one, and the writer of metrics.jsonl.

A *writer* is any function `write(step, phase, values)`. Only process 0 needs one; `combine([])` writes nothing.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.jsonl import append_jsonl, repair_jsonl, truncate_jsonl

Writer = Callable[[int, str, Mapping[str, float]], object]

RESERVED = ("step", "phase", "time")  # the columns of metrics.jsonl that are not values


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
