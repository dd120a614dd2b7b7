"""Agreement of processes that save and read checkpoints: what fails in one fails in all, at the same place.

Otherwise one would go on alone, and the next collective call of the others would wait for it for ever.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


class Elsewhere(RuntimeError):
    """Another process failed; the message has its number and its words."""


def gather_texts(text: str) -> list[str]:
    """Gather the texts of all processes, in their order. Collective."""
    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    if jax.process_count() == 1:
        return [text]
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(data)], np.int32))).reshape(-1)
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(data)] = data
    every = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(every, sizes, strict=True)]


def of_first(value: T) -> T:
    """Give what process 0 gives (any JSON value) to all processes. Collective."""
    return value if jax.process_count() == 1 else json.loads(gather_texts(json.dumps(value))[0])


def anywhere(flag: bool) -> bool:
    """Tell whether it is true in any process. Collective."""
    return any(gather_texts("x" if flag else "")) if jax.process_count() > 1 else flag


def agree(action: Callable[[], T], *kinds: type[Exception]) -> T:
    """Call `action`, which must not be collective; if it fails in one process, all raise. Collective.

    With one process it is just called. With several all raise an error of the same of `kinds`, the first one that
    came up in any process, with the words of the lowest process that had it. Any other error is raised as it is where
    it came up, and as `Elsewhere` in the other processes.
    """
    if jax.process_count() == 1:
        return action()
    failure: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as error:
        failure = error
    code = -1 if failure is None else next((i for i, k in enumerate(kinds) if type(failure) is k), len(kinds))
    # What is known only from another process comes last: that one has the cause.
    second_hand = isinstance(failure, Elsewhere) or isinstance(failure and failure.__cause__, Elsewhere)
    told = [code, second_hand, str(failure).strip() or type(failure).__name__]
    every = [(*json.loads(text), process) for process, text in enumerate(gather_texts(json.dumps(told)))]
    failed = sorted((found for found in every if found[0] >= 0), key=lambda found: (found[0], found[1], found[3]))
    if not failed:
        return result
    code, _, text, process = failed[0]
    if code < len(kinds):
        raise kinds[code](f"{text} (process {process})") from failure
    if failure is not None and not second_hand:
        raise failure
    raise Elsewhere(f"process {process}: {text}") from failure
