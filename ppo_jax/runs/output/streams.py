"""Standard output and error of a run: they may be closed, full, or read by nobody any more, and the run goes on."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Unbreakable:
    """A stream that loses what cannot be written, where the one below would raise."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:
            drop_stream(self.stream, error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            drop_stream(self.stream, error)


@contextlib.contextmanager
def unbreakable() -> Iterator[None]:
    """Let nothing that is printed inside the block fail: not the run's words, nor those of a user's reward."""
    before = sys.stdout, sys.stderr
    wrapped = [None if stream is None else Unbreakable(stream) for stream in before]
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        for name, stream, own in zip(("stdout", "stderr"), before, wrapped, strict=True):
            if getattr(sys, name) is own:  # else somebody else has put another in its place
                setattr(sys, name, stream)


def drop_stream(stream: Any, error: Exception) -> None:
    """Send a stream nowhere whose reader is gone; what it still holds would fail again when the process ends."""
    if isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def flush_streams() -> str:
    """Write out what standard output and error still hold; return what went wrong with the former, "" where nothing.

    A reader that has gone (`head`) has seen enough: that is nothing wrong. Afterwards nothing is left that could fail
    when the process ends.
    """
    wrong = ""
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError as error:
            drop_stream(stream, error)
        except (OSError, ValueError) as error:
            drop_stream(stream, BrokenPipeError())
            wrong = str(error) if stream is sys.stdout else wrong
    return wrong


def claim_streams() -> None:
    """Open closed streams on nothing: else the next file that is opened would get what is meant for them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
