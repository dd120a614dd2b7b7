"""What happens around the steps of a stage: records, evaluations, checkpoints and requests to stop."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from ppo_jax.data.disk import replace_file, sync
from ppo_jax.data.locks import Held, hold_directory
from ppo_jax.parallel.processes import is_first
from ppo_jax.runs.checkpoints import store
from ppo_jax.runs.checkpoints.saving import Saver, leave, saver
from ppo_jax.runs.evaluation import earlier_evaluations
from ppo_jax.runs.memory import trim_after_compiling
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.recording import run_files
from ppo_jax.runs.output.writers import Writer, combine, resilient
from ppo_jax.runs.signals import Requests, stop_requests
from ppo_jax.runs.stage import Stage, Start
from ppo_jax.train.loop import Interrupted, LoopConfig, Stopped, assess, evaluation_due

Values = Mapping[str, float]
COMPILING = "compiling {} (once, about a minute)"


class TakenOver(RuntimeError):
    """The directory of this run is now that of another: nothing more is written."""


class Best:
    """The best evaluation so far: every checkpoint remembers it, and its own checkpoint stays.

    record: {"step", "metric", "value"}, or nothing; filled as evaluations come.
    """

    def __init__(self, loop: LoopConfig, record: dict[str, Any]) -> None:
        self.loop, self.record = loop, record

    @property
    def step(self) -> int | None:
        return self.record.get("step")

    def note(self, step: int, state: Any, values: Values | None) -> Any:
        """The state that knows of an evaluation at `step`. Twice is the same as once."""
        state, better = assess(state, values, self.loop)
        if better:
            self.record.update({"step": step, "metric": self.loop.best_metric, "value": float(state.best)})
        return state


class Hooks:
    """`train.loop.Hooks` of a stage in its run directory.

    measure: (step, state) -> what the state is worth, recorded; None: given up, because the run is to stop.
    dump, causes: as in `train.loop.Hooks`.
    watch: (step, phase, values) of every record, to say what is wrong.
    puts_off: whether the record of a step waits until the device has the next one to work on.
    prepare: makes ready what the step after the next will need; called then too.
    evaluations: step -> values, of this process and of those before it.
    """

    def __init__(self, stage: Stage, keep: Saver, best: Best, asked: Requests) -> None:
        self.stage, self.keep, self.best, self.asked = stage, keep, best, asked
        directory, screen = stage.directory, stage.screen
        self.evaluations = earlier_evaluations(directory, *stage.evaluations)
        self.put_samples = resilient(rundir.write_samples, screen.message, rundir.SAMPLES)
        self.put_scores = resilient(rundir.write_scores, screen.message, rundir.EVALUATIONS)
        self.put_evaluation = partial(rundir.write_evaluation, put_samples=self.put_samples, put_scores=self.put_scores)
        self.files = run_files(directory, screen, stage.loop, stage.config, stage.phases)
        self.given: tuple[int, Any] | None = None  # the last step that was done, and its state
        self.measure: Callable[[int, Any], Values | None] = lambda step, state: {}
        self.dump: Callable[[int, Any], str] = lambda number, state: ""
        self.causes: Callable[[], str] = lambda: ""
        self.measured = False  # whether this process has evaluated
        self.watch: Writer = lambda step, phase, values: None
        self.puts_off = False
        self.prepare: Callable[[], object] = lambda: None
        self.waiting: tuple[int, Values] | None = None  # a record that was put off

    def record(self, step: int, phase: str, values: Values) -> None:
        """Put a line of values into the files of the run, and shows it."""
        combine(self.files)(step, phase, values)
        self.stage.screen.update(phase=phase, step=step, total=self.stage.loop.updates, values=values)
        self.watch(step, phase, values)

    def write(self, done: int, values: Values) -> None:
        self.asked.unsaved = True
        self.waiting = (done, values)
        if not self.puts_off:
            self.write_waiting()

    def meanwhile(self) -> None:
        self.write_waiting()
        self.prepare()

    def write_waiting(self) -> None:
        """Write the record that was put off, if there is one."""
        if self.waiting is not None:
            (done, values), self.waiting = self.waiting, None
            self.record(done, self.stage.phase, values)

    def evaluate(self, done: int, state: Any) -> Values | None:
        self.write_waiting()
        self.stage.screen.doing("evaluating" if self.measured else "evaluating (the first time with compiling)")
        values = self.measure(done, state)
        self.measured = True
        self.go_on()
        self.best.note(done, state, values)
        return values

    def go_on(self) -> None:
        """Show that training goes on, whose first step in this process compiles."""
        phase = self.stage.phase
        self.stage.screen.doing("" if self.asked.unsaved else COMPILING.format(phase), phase)

    def evaluate_left(self, state: Any) -> Any:
        """Make the evaluation that a run was stopped before; the state that knows of it. Raises `Interrupted`."""
        done = int(state.step)
        if not done:
            return state
        self.go_on()
        values: Values | None = self.evaluations.get(done)
        if values is None and evaluation_due(done, self.stage.loop):
            values = self.measure(done, state)
            if values is None:
                raise Interrupted(f"stopped by {self.asked()} at update {done}")
        return self.best.note(done, state, values)

    def save(self, done: int, state: Any, due: bool) -> None:
        self.given = (done, state)
        if due:
            self.write_waiting()
            # what the checkpoint takes for written is tried once more, and is on the disk before it
            self.hold_again()
            self.write_again()
            self.sync_records()
        self.keep(done, state, due)

    def stop(self, done: int) -> str | None:
        return self.asked() or store.preempted(done)

    def stopping(self) -> bool:
        """Whether the run is to stop as soon as it can."""
        return self.asked() is not None

    def write_again(self) -> int:
        """Tries what could not be written once more, and config.yaml where it is gone; the records still unwritten."""
        directory = self.stage.directory
        if directory.is_dir() and not (directory / rundir.CONFIG).exists():
            with contextlib.suppress(OSError):
                write_config(self.stage)
        return sum(again() for again in (self.put_samples, self.put_scores, *self.files))

    def hold_again(self) -> None:
        """Takes the directory again, where it was removed meanwhile. Raises `TakenOver` where another run is in it."""
        if not is_first() or not self.stage.directory.is_dir():
            return
        try:
            hold_directory(self.stage.directory)
        except Held as error:
            raise TakenOver(f"the run directory was removed, and another run is in its place: {error}") from None
        except OSError:
            pass  # the disk is full, say; that the directory cannot be written is said of what is written

    def sync_records(self) -> None:
        """Has the records so far outlive a power cut."""
        for name in (rundir.METRICS, rundir.SAMPLES, rundir.EVALUATIONS):
            try:
                sync(self.stage.directory / name)
            except FileNotFoundError:
                pass
            except OSError as error:
                self.stage.screen.message(f"{name}: its last lines may not outlive a power cut: {error}")

    def finish(self, state: Any) -> None:
        """Has the last state on disk, and says what could not be written. Raises `CheckpointSaveError`."""
        last = self.stage.loop.updates
        if self.keep.settle() != last:
            self.keep.insist(last, state)
        self.say_lost()  # the last save may have made a removed directory again
        if reason := self.stop(last + 1):
            raise Interrupted(f"stopped by {reason} after update {last}")

    def say_lost(self) -> None:
        """Try for the last time what could not be written, and say how much of it is lost."""
        if lost := self.write_again():
            self.stage.screen.message(f"{lost} lines that could not be written (the messages above say where) are lost")


@contextlib.contextmanager
def open_hooks(stage: Stage, start: Start) -> Iterator[Hooks]:
    """The hooks of a stage, for the length of the block: within it signals are requests to stop.

    Raises:
      Stopped: what the block raised, once the last state is saved; see `checkpoints.saving.leave`.
    """
    trim_after_compiling()
    best = Best(stage.loop, start.best)
    meta = {"config": stage.config, "facts": stage.facts, "best": best.record}
    notify = stage.screen.message
    checkpoints = stage.directory / rundir.CHECKPOINTS
    write_config(stage)
    with (
        stop_requests(notify) as asked,
        saver(checkpoints, stage.loop, meta, notify, start.last, lambda: best.step) as keep,
    ):
        hooks = Hooks(stage, keep, best, asked)
        asked.saved = lambda: store.latest_step(checkpoints)
        try:
            try:
                yield hooks
            finally:
                hooks.write_waiting()
        except Stopped as error:
            leave(error, keep, hooks.given)


def write_config(stage: Stage) -> None:
    """Write config.yaml, if the stage has a configuration."""
    if stage.config:
        replace_file(stage.directory / rundir.CONFIG, stage.config.encode())
