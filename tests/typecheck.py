"""The run-time type checker of the tests: beartype, with int accepted where float is asked (PEP 484)."""

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

F = TypeVar("F", bound=Callable)

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: F) -> F:
    """`function`, checked on each call; as it is where it names a Protocol that is not `runtime_checkable`."""
    try:
        return _beartype(function)
    except BeartypeDecorHintPep3119Exception:
        return function
