"""A function in a thread of its own that runs only while it is resumed, so that members take turns.

At any moment one thread runs. So several processes that run the same members do all their collective calls in the same
order, and nothing of a run has to know that it is one of many.
"""

import threading
from collections.abc import Callable
from typing import Any


class Routine:
    """`function(park)` in a thread: park(request) hands a request over and waits for the answer to it."""

    def __init__(self, function: Callable[[Callable[[Any], Any]], Any], name: str) -> None:
        self.request: Any = None  # what it waits for; None once it has ended
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self._answer: Any = None
        self._raised: BaseException | None = None
        self._its_turn, self._our_turn = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, args=(function,), name=name, daemon=True)

    def start(self) -> None:
        """Runs it until it parks or ends."""
        self._thread.start()
        self._our_turn.acquire()

    def resume(self, answer: Any = None, error: BaseException | None = None) -> None:
        """Answers its request, or raises `error` where it waits; runs it until it parks again or ends."""
        assert not self.ended
        self._answer, self._raised = answer, error
        self._its_turn.release()
        self._our_turn.acquire()
        if self.ended:
            self._thread.join()

    def _main(self, function: Callable[[Callable[[Any], Any]], Any]) -> None:
        try:
            self.result = function(self._park)
        except BaseException as error:  # whoever resumed it decides
            self.error = error
        self.request, self.ended = None, True
        self._our_turn.release()

    def _park(self, request: Any) -> Any:
        self.request = request
        self._our_turn.release()
        self._its_turn.acquire()
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
        return self._answer
