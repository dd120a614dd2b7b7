"""Damaged input, drawn by hypothesis: hostile JSON values, documents with one of them in it, bytes flipped and cut."""

import contextlib
import copy
import json
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

PATIENCE = 120  # seconds after which a reader counts as hanging

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 1.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "\ud800", "\0", "../x", "x" * 3000, "9" * 5000),
    *([], [1], ["a", 1, None], [[]], [{}], {}, {"a": 1}, {"": {}}),
]
# Any JSON value, and the ones that have tripped readers.
hostile = st.sampled_from(HOSTILE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def to_json(value: Any) -> bytes:
    """JSON of a value, also of integers that Python would not print by default."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(limit)


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """`document` with one to three places replaced, removed or added to."""
    holder = {"": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(holder))
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        value = parent[key]
        if how == "remove" and parent is not holder:
            del parent[key]
        elif how == "add" and isinstance(value, dict):
            value[draw(st.text(max_size=8))] = copy.deepcopy(draw(hostile))
        else:
            parent[key] = copy.deepcopy(draw(hostile))
    return holder[""]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a document."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    for key in keys:
        yield node, key
        yield from _places(node[key])


@st.composite
def damaged(draw: st.DrawFn, content: bytes, region: int | None = None) -> bytes:
    """`content` with bits flipped, bytes cut out or put in, numbers blown up, or its end missing.

    Args:
      region: how many bytes at the beginning may be hit; None: all.
    """
    found, end = bytearray(content), len(content) if region is None else region
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(min(end, len(found)) - 1, 0)))
        how = draw(st.sampled_from(["flip", "flip", "cut", "delete", "insert", "number"]))
        if how == "flip" and found:
            found[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del found[at:]
        elif how == "delete":
            del found[at : at + draw(st.integers(1, 20))]
        elif how == "insert":
            found[at:at] = draw(st.binary(min_size=1, max_size=20))
        else:
            number = draw(st.sampled_from([0, 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]))
            found[at : at + 8] = struct.pack("<Q", number)
    return bytes(found)


class Hang(BaseException):
    """No answer in time. Not an Exception: readers turn those into errors of their own, and the hang would pass."""


def outcome(read: Callable[[], Any], *names: str) -> Any:
    """What `read` returns, or its error, which must be one of ours: it names one of `names` (none given: anything).

    Any other error, of a library or a bug, comes out of here and fails the test; so does a reader that hangs.
    """
    with _alarm():
        try:
            return read()
        except (ValueError, FileNotFoundError) as error:
            if isinstance(error, UnicodeError | json.JSONDecodeError):
                raise AssertionError(f"a bare {type(error).__name__}: {error}") from error
            assert not names or any(name in str(error) for name in names), str(error)
            return error


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise Hang(f"no answer after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
