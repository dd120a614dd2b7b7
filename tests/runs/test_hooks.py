"""When the records of a stage are written, and what compiling leaves in memory."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs import memory
from ppo_jax.runs.hooks import Hooks, open_hooks
from ppo_jax.runs.output import rundir
from ppo_jax.runs.output.screen import progress
from ppo_jax.runs.stage import Stage, Start
from ppo_jax.runs.start import Ahead
from ppo_jax.train.loop import LoopConfig
from ppo_jax.types import Prompts

STATE: Any = SimpleNamespace(best=jnp.asarray(2.0))  # of an evaluation that was better than VALUES
VALUES = {"reward": 1.0}


def lines(folder: Path) -> list[tuple[str, int]]:
    path = folder / rundir.METRICS
    return [(record["phase"], record["step"]) for record in read_jsonl(path)] if path.exists() else []


def stage(folder: Path, screen: Any) -> Stage:
    return Stage(rundir.open_run(folder), "ppo", LoopConfig(), {}, "", screen)


def test_a_record_that_was_put_off_is_written_when_the_next_step_is_under_way_and_before_anything_else(tmp_path):
    def measure(hooks: Hooks, done: int) -> Mapping[str, float]:
        hooks.record(done, "eval", VALUES)
        return VALUES

    with progress("test", main_process=False) as screen:
        with open_hooks(stage(tmp_path, screen), Start(None, None, {})) as hooks:
            hooks.write(1, VALUES)
            assert lines(tmp_path) == [("ppo", 1)]  # unless it is asked for, nothing waits
            hooks.puts_off, hooks.measure = True, lambda done, state: measure(hooks, done)
            hooks.write(2, VALUES)
            hooks.save(2, STATE, due=False)
            assert lines(tmp_path) == [("ppo", 1)]
            prepared: list[int] = []
            hooks.prepare = lambda: prepared.append(1)
            hooks.meanwhile()
            assert lines(tmp_path) == [("ppo", 1), ("ppo", 2)] and prepared
            hooks.write(3, VALUES)
            hooks.evaluate(3, STATE)
            assert lines(tmp_path)[2:] == [("ppo", 3), ("eval", 3)]
            hooks.write(4, VALUES)
        assert lines(tmp_path)[4:] == [("ppo", 4)]


def test_a_batch_that_was_made_ahead_is_made_once():
    made: list[int] = []

    def make(number: int) -> Prompts:
        made.append(number)
        return Prompts(jnp.full((1, 2), number), jnp.ones((1, 2), bool), jnp.arange(1))

    batches = Ahead(make)
    assert batches(0).tokens[0, 0] == 0
    batches.prepare(1)
    assert made == [0, 1] and batches(1).tokens[0, 0] == 1 and made == [0, 1]
    assert batches(0).tokens[0, 0] == 0 and made == [0, 1, 0]  # asked for again, as a batch that is dumped


def test_an_error_loses_no_record(tmp_path):
    with (
        progress("test", main_process=False) as screen,
        pytest.raises(ZeroDivisionError),
        open_hooks(stage(tmp_path, screen), Start(None, None, {})) as hooks,
    ):
        hooks.puts_off = True
        hooks.write(1, VALUES)
        raise ZeroDivisionError
    assert lines(tmp_path) == [("ppo", 1)]


def test_what_compiling_leaves_is_given_back_after_every_long_compilation(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(memory, "find_trim", lambda: lambda: calls.append(1))
    monkeypatch.setattr(memory, "LEAST", 0.0)
    listeners: list[Any] = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    memory.trim_after_compiling.__wrapped__()
    (note,) = listeners
    note(memory.COMPILED, 0.1, fun_name="f")
    note("/jax/core/compile/jaxpr_trace_duration", 9.0)
    assert calls == [1]
    monkeypatch.setattr(memory, "LEAST", 0.5)
    note(memory.COMPILED, 0.1)
    assert calls == [1]


def test_jax_tells_of_a_compilation_under_that_name():
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    assert memory.COMPILED in events
