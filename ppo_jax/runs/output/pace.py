"""How long things take: seconds spent compiling, and what is left of a run with several phases."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

COMPILING = "/jax/core/compile/"  # how JAX's names of what it measures of a compilation begin


class PlannedPhase(NamedTuple):
    """A phase of a run: what people call it, and its share of the work in any unit, the same for all phases."""

    label: str
    share: float


Plan = Mapping[str, PlannedPhase]  # by the names that `Screen.update` is called with, in their order


@functools.cache
def count_compiling() -> Callable[[], float]:
    """Begin to count; return seconds() that this process has spent since on tracing, lowering and compiling."""
    total = 0.0

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal total
        if event.startswith(COMPILING):
            total += duration_secs

    jax.monitoring.register_event_duration_secs_listener(note)
    return lambda: total


def left_of_all(plan: Plan, at: str, left: float | None, spent: float, before: float) -> float | None:
    """Estimate the seconds until the end of all phases; None in the last phase, or where nothing is known yet.

    A unit of a share takes as long as in this phase, (spent + left) / share, or where `left` is not known as in those
    before it.

    Args:
      at: the phase that runs now.
      left: seconds until its end.
      spent, before: seconds since it began, and from the start of the run until then.
    """
    names = list(plan)
    place = names.index(at)
    earlier, later = (sum(plan[name].share for name in part) for part in (names[:place], names[place + 1 :]))
    if not later:
        return None
    if left is not None:
        return left + later * (spent + left) / plan[at].share
    if not earlier:
        return None
    unit = before / earlier
    return max(0.0, unit * plan[at].share - spent) + later * unit
