"""Rows of many requests, scored together by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

Row = Sequence[int]


class Full(Exception):
    """More rows wait than are allowed, or nothing is taken any more."""


class _Request(NamedTuple):
    rows: Sequence[Row]
    answer: "Future[list[float]]"


class Batcher:
    """Collects requests and scores them in batches, in the order in which they came.

    A batch takes whole requests until it has `batch_size` rows; one that is not full waits `wait` seconds for more.
    What `score_rows` raises for a batch of several requests is tried again for each of them alone, so that only the
    one at fault gets it.
    """

    def __init__(
        self,
        score_rows: Callable[[Sequence[Row]], np.ndarray],
        batch_size: int,
        wait: float = 0.0,
        max_waiting: int = 4096,
    ) -> None:
        self._score_rows, self._batch_size, self._wait, self._max_waiting = score_rows, batch_size, wait, max_waiting
        self._requests: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="reward", daemon=True)
        self.waiting = 0  # rows
        self.batches = 0  # calls of score_rows

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> "Future[list[float]]":
        """Take these rows; their scores come later. Raise Full when there is no room, or after `stop`."""
        request = _Request(rows, Future())
        with self._changed:
            if not self._open:
                raise Full("the server is shutting down")
            if self.waiting + len(rows) > self._max_waiting:
                raise Full(f"{self.waiting} rows are waiting already; come back later")
            self._requests.append(request)
            self.waiting += len(rows)
            self._changed.notify()
        return request.answer

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more requests, score those that wait, and end the thread; return whether it ended.

        After `timeout` seconds what still waits gets Full, and a call of `score_rows` that does not return is left
        behind in its daemon thread.
        """
        with self._changed:
            self._open = False
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        with self._changed:
            left, self.waiting = list(self._requests), 0
            self._requests.clear()
        for request in left:
            if request.answer.set_running_or_notify_cancel():
                request.answer.set_exception(Full("the server has stopped"))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while taken := self._next_batch():
            # A request that was given up while it waited is not scored; from here on none can be.
            batch = [request for request in taken if request.answer.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _next_batch(self) -> list[_Request]:
        """Wait for the next requests; [] when there will be none."""
        with self._changed:
            while self._open and not self._requests:
                self._changed.wait()
            until = time.monotonic() + self._wait
            while self._open and self.waiting < self._batch_size and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            batch: list[_Request] = []
            count = 0
            while self._requests and (not batch or count + len(self._requests[0].rows) <= self._batch_size):
                batch.append(self._requests.popleft())
                count += len(batch[-1].rows)
            self.waiting -= count
            return batch

    def _answer(self, batch: Sequence[_Request]) -> None:
        self.batches += 1
        try:
            scores = [float(x) for x in self._score_rows([row for request in batch for row in request.rows])]
            if len(scores) != sum(len(request.rows) for request in batch):
                raise RuntimeError(f"{len(scores)} scores for {sum(len(r.rows) for r in batch)} rows")
        except Exception as error:  # anything may come from a device; the thread must live on
            if len(batch) > 1:
                for request in batch:
                    self._answer([request])
            else:
                batch[0].answer.set_exception(error)
            return
        start = 0
        for request in batch:
            request.answer.set_result(scores[start : start + len(request.rows)])
            start += len(request.rows)
