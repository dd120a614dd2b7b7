"""Memory for what clients send: bytes are counted from their arrival until they are scored."""

import threading
from collections.abc import Callable
from types import TracebackType


class Room:
    """So many bytes in all. Whoever asks is given at most half of what is left.

    So a few large requests do not shut out the small ones, for which there is always some room left.
    """

    def __init__(self, limit: int, make_room: Callable[[], None] = lambda: None) -> None:
        self.limit, self.used = limit, 0
        self._make_room, self._lock = make_room, threading.Lock()

    def take(self, held: int, more: int) -> bool:
        """Take `more` bytes beside the `held` ones; False when there is no room."""
        if not self._fits(held, more):
            self._make_room()
        with self._lock:
            fits = self._fits(held, more)
            self.used += more * fits
            return fits

    def give_back(self, size: int) -> None:
        """Return bytes."""
        with self._lock:
            self.used -= size

    def _fits(self, held: int, more: int) -> bool:
        return 2 * (held + more) <= self.limit - self.used + held


class Held:
    """The bytes of one request; given back at the end of the block, but for those that were handed over."""

    def __init__(self, room: Room) -> None:
        self.room, self.size = room, 0

    def __enter__(self) -> "Held":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep(0)

    def take(self, more: int) -> bool:
        """Take more bytes; False when there is no room."""
        taken = self.room.take(self.size, more)
        self.size += more * taken
        return taken

    def keep(self, size: int) -> None:
        """Give all but `size` bytes back, if there are as many."""
        if size < self.size:
            self.room.give_back(self.size - size)
            self.size = size

    def hand_over(self) -> Callable[[object], None]:
        """Leave the bytes to what gives them back, by what is returned."""
        size, self.size = self.size, 0
        return lambda _: self.room.give_back(size)
