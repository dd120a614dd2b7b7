"""A reward that is any Python function, called in threads with a time limit.

A thread cannot be stopped from outside: a call that hangs is given up, and its thread is left behind as a daemon, which
keeps neither the run nor the end of the process waiting. (A call that hangs in C code without releasing Python's lock
stops everything; nothing but another process would help.)
"""

import contextlib
import dataclasses
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ppo_jax.rewards.base import HostReward
from ppo_jax.rewards.failures import Report, printable
from ppo_jax.rewards.scores import number, to_scores
from ppo_jax.types import Scores

ABANDONED = 64  # calls left hanging at once; beyond, rows fail without being tried


@dataclasses.dataclass(frozen=True)
class FunctionConfig:
    """How a Python reward function is called."""

    per_sample: bool = False
    """Call f(prompt, response, metadata) -> number for each row; else f(prompts, responses, metadata) -> numbers."""
    threads: int = 4
    """At most this many calls run at once, where the function is called per sample."""
    timeout: float = 60.0
    """One call may take at most this many seconds."""
    deadline: float = 300.0
    """A whole batch may take this many seconds; rows not scored by then have failed."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")
        for name in ("timeout", "deadline"):
            if not 0 < getattr(self, name) < 1e6:
                raise ValueError(f"{name}={getattr(self, name)} must be positive seconds, below a million")


def function_reward(function: Callable[..., Any], config: FunctionConfig, report: Report) -> HostReward:
    """The scores that `function` gives.

    It is called with lists of its own, (prompts, responses, metadata), and returns one number per row in any sequence
    or array. A call that raises, hangs or returns another count fails all its rows; a value that is not a finite number
    fails its row. `report` hears the cause.
    """
    abandoned: list[_Call] = []  # over all batches: those that hung, until they end

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        table = [dict(row) for row in metadata]  # what the function does to its arguments stays with it
        if config.per_sample:
            calls = [_Call(function, list(row), None) for row in zip(prompts, responses, table, strict=True)]
            rows = [call.outcome for call in _run(calls, config, abandoned)]
        else:
            whole = _Call(function, [list(prompts), list(responses), table], len(responses))
            rows = _spread(_run([whole], config, abandoned)[0].outcome, len(responses))
        scores, failed = [], dict[tuple[str, str], int]()
        for value, cause, detail in rows:
            score, wrong = (0.0, None) if cause else number(value)
            if cause or wrong:
                key = (cause or f"the function returned {wrong}", detail)
                failed[key] = failed.get(key, 0) + 1
            scores.append(float("nan") if cause or wrong else score)
        for (cause, detail), count in failed.items():
            report(cause, count, detail)
        return to_scores(scores)

    return reward


# (value, cause, detail): the cause is "" where a value came back.
_Outcome = tuple[Any, str, str]


class _Call:
    """One call of the function, and what became of it."""

    def __init__(self, function: Callable[..., Any], arguments: list[Any], rows: int | None) -> None:
        self.function, self.arguments, self.rows = function, arguments, rows
        self.outcome: _Outcome = (None, "the function was not reached before the deadline of the batch", "")
        self.began, self.finished = 0.0, False

    def __call__(self) -> _Outcome:
        try:
            value = self.function(*self.arguments)
            if self.rows is not None and not isinstance(value, str | bytes | dict):
                with contextlib.suppress(TypeError):  # not a sequence; the caller says so
                    value = list(itertools.islice(iter(value), self.rows + 1))  # a generator runs here, and may not end
            return value, "", ""
        except BaseException as error:  # SystemExit too: it would end this thread without a word
            where = traceback.extract_tb(error.__traceback__)[-1]
            detail = f"{printable(str(error))}, {where.filename}:{where.lineno}"
            return None, f"the function raised {type(error).__name__}", detail


def _run(calls: list[_Call], config: FunctionConfig, abandoned: list[_Call]) -> list[_Call]:
    """Runs the calls, `config.threads` at once, each in a daemon thread of its own; fills their outcomes."""
    done: queue.SimpleQueue[tuple[_Call, _Outcome]] = queue.SimpleQueue()
    end = time.monotonic() + config.deadline
    waiting, running = list(reversed(calls)), list[_Call]()
    while waiting or running:
        while waiting and len(running) < config.threads:
            abandoned[:] = [call for call in abandoned if not call.finished]
            if len(abandoned) >= ABANDONED:
                for call in waiting:
                    call.outcome = (None, f"the function is not called any more, since {ABANDONED} calls hang", "")
                waiting.clear()
            else:
                running.append(_start(waiting.pop(), done))
        if not running:
            break
        limit = min(end, running[0].began + config.timeout)  # the first began first
        try:
            call, outcome = done.get(timeout=max(0.0, limit - time.monotonic()))
        except queue.Empty:
            over = time.monotonic() >= end
            late = running if over else running[:1]
            for call in late:
                allowed = min(config.timeout, config.deadline)
                call.outcome = (None, f"the function did not return within {allowed:g} s", "")
            abandoned += late
            running = running[len(late) :]
            if over:
                break
            continue
        if call in running:  # not one that was given up before
            running.remove(call)
            call.outcome = outcome
    return calls


def _start(call: _Call, done: queue.SimpleQueue[tuple[_Call, _Outcome]]) -> _Call:
    def work() -> None:
        outcome = call()
        call.finished = True
        done.put((call, outcome))

    call.began = time.monotonic()
    threading.Thread(target=work, name="reward-function", daemon=True).start()
    return call


def _spread(outcome: _Outcome, rows: int) -> list[_Outcome]:
    """The outcome of a call for a whole batch, row by row."""
    value, cause, _ = outcome
    if cause:
        return [outcome] * rows
    if not isinstance(value, list):
        return [(None, f"the function returned {type(value).__name__} in place of a list of numbers", "")] * rows
    if len(value) != rows:
        count = str(len(value)) if len(value) < rows else "more"
        return [(None, "the function returned a wrong number of scores", f"{count} for {rows} rows")] * rows
    return [(item, "", "") for item in value]
