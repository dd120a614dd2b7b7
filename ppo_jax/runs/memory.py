"""Memory of the process that compiling leaves behind."""

import ctypes
import functools
from collections.abc import Callable

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of what it measures of a compilation
LEAST = 0.5  # seconds of a compilation that leaves something worth looking for


@functools.cache
def trim_after_compiling() -> None:
    """Have whatever the compiler frees go back to the system after every long compilation of this process.

    The C library keeps freed memory for itself, and of the compiler's that is hundreds of MiB: without this the peak of
    a small model is that of compiling and training together. Only glibc has the call; elsewhere nothing happens.
    """
    trim = find_trim()
    if trim is None:
        return

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs > LEAST:
            trim()

    jax.monitoring.register_event_duration_secs_listener(note)


def find_trim() -> Callable[[], object] | None:
    """The C library's `malloc_trim`, which gives whole free pages back; None where there is none."""
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return lambda: found(0)
