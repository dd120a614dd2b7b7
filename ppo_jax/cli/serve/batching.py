"""Rows of many requests, scored together by one thread."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


class Full(Exception):
    """More rows wait than are allowed, or nothing is taken any more."""


class Answer(Future[list[Any]]):
    """What a request is waiting for. It keeps its place when its clients leave, and is passed over if none is back."""

    def __init__(self, rows: Sequence[Any], size: int) -> None:
        super().__init__()
        self.rows, self.size, self.clients = rows, size, 1  # rows: that are not scored yet
        self.scores: list[Any] = []


Batch = list[tuple[Answer, Sequence[Any]]]  # some requests, and of each the rows that are scored now


class Batcher:
    """Collects requests and scores them in batches: first the oldest, then the smallest, and so on by turns.

    So a small request waits for two batches, however many large ones came before it, and a large one goes on all the
    time. A batch has at most `batch_size` rows and, beyond its first row, at most `batch_total` of what `measure` says
    of a row; a request of more is scored in parts. A batch that is not full waits `wait` seconds for more. What
    `score_rows` raises for a batch of several requests is tried again for each of them alone, so that only the one at
    fault gets it. Requests whose clients have all left are not scored any more, and make room where there is none.
    """

    def __init__(
        self,
        score_rows: Callable[[Sequence[Any]], Sequence[Any]],
        batch_size: int,
        wait: float = 0.0,
        max_waiting: int = 4096,
        measure: Callable[[Any], int] = lambda row: 1,
        batch_total: float = math.inf,
    ) -> None:
        self._score_rows, self._batch_size, self._wait, self._max_waiting = score_rows, batch_size, wait, max_waiting
        self._measure, self._batch_total, self._smallest_first = measure, batch_total, True
        self._requests: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="reward", daemon=True)
        self.waiting = 0  # rows
        self.batches = 0  # calls of score_rows

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, rows: Sequence[Any]) -> Answer:
        """Take these rows; their scores come later. Raise Full when there is no room, or after `stop`."""
        request = Answer(rows, sum(map(self._measure, rows)))
        with self._changed:
            if not self._open:
                raise Full("the server is shutting down")
            if self.waiting + len(rows) > self._max_waiting:
                self._drop_abandoned()
            if self.waiting + len(rows) > self._max_waiting:
                raise Full(f"{self.waiting} rows are waiting already; come back later")
            self._requests.append(request)
            self.waiting += len(rows)
            self._changed.notify()
        return request

    def join(self, request: Answer) -> bool:
        """Wait for this request too; False when it has been passed over, or failed."""
        with self._changed:
            if request.cancelled() or request.done() and request.exception() is not None:
                return False
            request.clients += 1
            return True

    def leave(self, request: Answer) -> None:
        """Wait for this request no more."""
        with self._changed:
            request.clients -= 1

    def drop_abandoned(self) -> None:
        """Forget the requests that nobody waits for."""
        with self._changed:
            self._drop_abandoned()

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
            if request.running() or request.set_running_or_notify_cancel():
                request.set_exception(Full("the server has stopped"))
        return not self._thread.is_alive()

    def _drop_abandoned(self) -> None:
        for request in [request for request in self._requests if not request.clients]:
            self._drop(request)

    def _drop(self, request: Answer) -> None:
        """Score no more of a request."""
        self._requests.remove(request)
        self.waiting -= len(request.rows)
        if not request.done() and not request.cancel():  # a part of it was scored
            request.set_exception(Full("nobody waits for it"))

    def _work(self) -> None:
        while self._wait_for_requests():
            if batch := self._next_batch():
                self._score(batch)

    def _wait_for_requests(self) -> bool:
        """Wait until there is something to score, and a little for more; False when there will be nothing."""
        with self._changed:
            while self._open and not self._requests:
                self._changed.wait()
            until = time.monotonic() + self._wait
            while self._open and self.waiting < self._batch_size and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return bool(self._requests) or self._open

    def _next_batch(self) -> Batch:
        """Take the next rows."""
        with self._changed:
            batch: Batch = []
            self._smallest_first = not self._smallest_first
            key = (lambda request: request.size) if self._smallest_first else (lambda request: 0)
            count = total = 0
            for request in sorted(self._requests, key=key):
                if not request.clients or not (request.running() or request.set_running_or_notify_cancel()):
                    self._drop(request)
                    continue
                taken = 0
                for row in request.rows:
                    total += self._measure(row)
                    if count == self._batch_size or (count and total > self._batch_total):
                        break
                    count, taken = count + 1, taken + 1
                if taken:
                    batch.append((request, request.rows[:taken]))
                    self.waiting -= taken
                    request.rows = request.rows[taken:]
                    if not request.rows:
                        self._requests.remove(request)
                if count == self._batch_size or total > self._batch_total:
                    break
            return batch

    def _score(self, batch: Batch) -> None:
        self.batches += 1
        rows = [row for _, part in batch for row in part]
        try:
            scores = list(self._score_rows(rows))
            if len(scores) != len(rows):
                raise RuntimeError(f"{len(scores)} scores for {len(rows)} rows")
        except Exception as error:  # anything may come from a device; the thread must live on
            if len(batch) > 1:
                for one in batch:
                    self._score([one])
            else:
                self._fail(batch[0][0], error)
            return
        for request, part in batch:
            request.scores += scores[: len(part)]
            del scores[: len(part)]
            if not request.rows:
                found, request.scores = request.scores, []  # the answer may be kept longer
                request.set_result(found)

    def _fail(self, request: Answer, error: Exception) -> None:
        if not request.done():
            request.set_exception(error)
        with self._changed:
            if request in self._requests:
                self._drop(request)
