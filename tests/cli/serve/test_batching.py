"""The batcher: every request gets its own rows' scores, whoever waits beside it, whatever fails, however it ends."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ppo_jax.cli.serve.batching import Batcher, Full


def sums(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([sum(row) for row in rows], np.float32)


class Recorder:
    """Sums of rows, slowly, and how many rows each call had."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.sizes = seconds, []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        self.go.wait()
        time.sleep(self.seconds)
        self.sizes.append(len(rows))
        if any(13 in row for row in rows):
            raise RuntimeError("13 is not scored")
        return sums(rows)


def test_many_threads_get_their_own_scores_in_few_calls() -> None:
    score = Recorder(seconds=0.002)
    batcher = Batcher(score, batch_size=16, wait=0.002)
    batcher.start()

    def ask(number: int) -> bool:
        rows = [[100, number, i] for i in range(1 + number % 4)]
        return batcher.submit(rows).result(30) == sums(rows).tolist()

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(100, 500)))
    batcher.stop()
    assert sum(score.sizes) == sum(1 + n % 4 for n in range(100, 500)) and max(score.sizes) <= 16
    assert batcher.batches == len(score.sizes) < 400 / 2 and batcher.waiting == 0


def test_only_the_request_at_fault_fails() -> None:
    score = Recorder()
    score.go.clear()
    batcher = Batcher(score, batch_size=8, wait=0.05)
    batcher.start()
    futures = [batcher.submit([[n, 1]]) for n in (11, 12, 13, 14)]
    score.go.set()
    for n, future in zip((11, 12, 13, 14), futures, strict=True):
        if n == 13:
            with pytest.raises(RuntimeError, match="13 is not scored"):
                future.result(30)
        else:
            assert future.result(30) == [n + 1]
    assert batcher.submit([[1]]).result(30) == [1], "the thread lives on"
    batcher.stop()


def test_a_wrong_number_of_scores_is_an_error_and_never_shifted() -> None:
    batcher = Batcher(lambda rows: np.zeros(len(rows) + 1), 4)
    batcher.start()
    with pytest.raises(RuntimeError, match="2 scores for 1 rows"):
        batcher.submit([[1]]).result(30)
    batcher.stop()


def test_a_request_larger_than_a_batch_is_scored_in_one_call() -> None:
    score = Recorder()
    batcher = Batcher(score, batch_size=2)
    batcher.start()
    assert batcher.submit([[i] for i in range(7)]).result(30) == list(range(7))
    batcher.stop()
    assert score.sizes == [7]  # row_scorer cuts it into programs


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    score = Recorder()
    score.go.clear()
    batcher = Batcher(score, batch_size=1, max_waiting=3)
    batcher.start()
    first = batcher.submit([[1]])
    while batcher.waiting:  # the thread has taken it
        time.sleep(0.001)
    second = batcher.submit([[2], [3]])
    with pytest.raises(Full, match="2 rows are waiting already"):
        batcher.submit([[4], [5]])
    score.go.set()
    assert first.result(30) == [1] and second.result(30) == [2, 3]
    assert batcher.submit([[4], [5], [6]]).result(30) == [4, 5, 6]
    batcher.stop()


def test_a_call_that_does_not_return_does_not_hold_up_the_end() -> None:
    score = Recorder()
    score.go.clear()
    batcher = Batcher(score, batch_size=1)
    batcher.start()
    first = batcher.submit([[1]])
    while batcher.waiting:
        time.sleep(0.001)
    waiting = batcher.submit([[2]])
    assert not batcher.stop(0.05) and not first.done()
    with pytest.raises(Full, match="has stopped"):
        waiting.result(0)
    score.go.set()
    assert first.result(30) == [1] and batcher.stop() and batcher.waiting == 0


def test_what_waits_is_scored_before_the_end_and_what_was_given_up_is_not() -> None:
    score = Recorder()
    score.go.clear()
    batcher = Batcher(score, batch_size=1)
    batcher.start()
    first = batcher.submit([[1]])
    while batcher.waiting:
        time.sleep(0.001)
    waiting = [batcher.submit([[n]]) for n in (2, 3, 4)]
    assert waiting[1].cancel()
    stopper = threading.Thread(target=batcher.stop)
    stopper.start()
    while batcher._open:
        time.sleep(0.001)
    with pytest.raises(Full, match="shutting down"):
        batcher.submit([[5]])
    score.go.set()
    stopper.join(30)
    assert [f.result(0) for f in (first, waiting[0], waiting[2])] == [[1], [2], [4]]
    assert len(score.sizes) == 3
