"""Keeps off the screen what Orbax and TensorStore say of a failure besides the error that they raise."""

import functools
import logging
import sys
import traceback
from typing import Any


@functools.cache
def quiet() -> None:
    """Keeps off the screen what a failed save says besides the error that `checkpoint` raises; once is enough.

    Orbax logs the failures of its threads with tracebacks, leaves tasks whose errors asyncio logs, and what TensorStore
    had not yet written calls back an event loop that has ended: hundreds of times.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in _trace(record))
    earlier = sys.unraisablehook

    def hook(problem: Any) -> None:
        if problem.exc_type is not RuntimeError or str(problem.exc_value) != "Event loop is closed":
            earlier(problem)

    sys.unraisablehook = hook


def _trace(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
