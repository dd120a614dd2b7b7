"""Where the values of a run go: metrics.jsonl, TensorBoard's files, trackers, and the screen."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.config import read_mapping
from ppo_jax.runs.output.screen import Screen
from ppo_jax.runs.output.tensorboard import tensorboard_writer
from ppo_jax.runs.output.trackers import LABELS, tracker_writer
from ppo_jax.runs.output.writers import RESERVED, Writer, combine, jsonl_writer, resilient
from ppo_jax.train.loop import LoopConfig


def run_writer(directory: Path, screen: Screen, total: int | None = None) -> Writer:
    """Make a writer of a step's values to metrics.jsonl, to TensorBoard and onto the screen.

    A file that cannot be written is reported and tried again; it does not end the run. Only the first process writes.
    """
    files = combine(run_files(directory, screen))

    def write(step: int, phase: str, values: Mapping[str, float]) -> None:
        files(step, phase, values)
        if phase in ("ppo", "eval"):  # the other phases know their own length
            screen.update(phase=phase, step=step, total=total, values=values)

    return write


def run_files(
    directory: Path, screen: Screen, loop: LoopConfig | None = None, config: str = "", in_order: Sequence[str] = ()
) -> list[Callable[..., int]]:
    """Make a writer for each place; called without arguments it tries again what it could not write.

    A tracker is first sent the lines of metrics.jsonl that it has not been sent (`trackers.tracker_writer`).

    Args:
      loop: says which trackers there are; None: TensorBoard alone.
      config: the settings that trackers are told, YAML.
      in_order: as for `jsonl_writer`.
    """
    if jax.process_index():
        return []
    loop, say = loop or LoopConfig(), screen.message
    writers = [resilient(jsonl_writer(directory / rundir.METRICS, in_order), say, rundir.METRICS)]
    for name in loop.log:
        if name == "tensorboard":
            events = tensorboard_writer(directory / rundir.TENSORBOARD, say)
            writers.append(resilient(events, say, f"{rundir.TENSORBOARD}/"))
            continue
        send = tracker_writer(name, loop.project, directory, read_mapping(config) if config else {})
        tracker = resilient(send, say, LABELS[name], (Exception,))
        for line in read_jsonl(directory / rundir.METRICS):
            values = {column: value for column, value in line.items() if column not in RESERVED}
            tracker(line["step"], line["phase"], {column: _number(value) for column, value in values.items()})
        writers.append(tracker)
    return writers


def _number(value: float | str | None) -> float:
    """A value of metrics.jsonl as it was measured: null is NaN there, an infinity is text."""
    return math.nan if value is None else float(value)
