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


def test_a_request_larger_than_a_batch_is_scored_in_parts() -> None:
    score = Recorder()
    batcher = Batcher(score, batch_size=2)
    batcher.start()
    assert batcher.submit([[i] for i in range(7)]).result(30) == list(range(7))
    batcher.stop()
    assert score.sizes == [2, 2, 2, 1]


def test_a_small_request_waits_for_two_batches_and_large_ones_go_on() -> None:
    """By hand: batches hold 4 in total; three of 3 rows of size 2 came before the small ones, and go by turns."""
    done: list[Sequence[int]] = []

    def score(rows: Sequence[Sequence[int]]) -> np.ndarray:
        go.wait()
        done.append([row[0] for row in rows])
        return sums(rows)

    go = threading.Event()
    batcher = Batcher(score, batch_size=8, measure=len, batch_total=4)
    batcher.start()
    first = batcher.submit([[0]])
    while batcher.waiting:
        time.sleep(0.001)
    large = [batcher.submit([[n + i, 0] for i in range(3)]) for n in (10, 20, 30)]
    small = [batcher.submit([[n]]) for n in (1, 2)]
    go.set()
    assert [f.result(30) for f in large] == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert [f.result(30) for f in (first, *small)] == [[0], [1], [2]]
    batcher.stop()
    assert done == [[0], [1, 2, 10], [11, 12], [20, 21], [22, 30], [31, 32]]


def test_a_large_request_that_fails_in_part_is_scored_no_further() -> None:
    score = Recorder()
    batcher = Batcher(score, batch_size=2)
    batcher.start()
    with pytest.raises(RuntimeError, match="13 is not scored"):
        batcher.submit([[13], [1], [2], [3], [4]]).result(30)
    assert batcher.submit([[1]]).result(30) == [1] and score.sizes == [2, 1] and batcher.waiting == 0
    batcher.stop()


def test_of_a_large_request_that_is_left_no_more_is_scored() -> None:
    score = Recorder()
    score.go.clear()
    batcher = Batcher(score, batch_size=2)
    batcher.start()
    left = batcher.submit([[1], [2], [3], [4], [5]])
    while batcher.waiting == 5:
        time.sleep(0.001)
    batcher.leave(left)
    other = batcher.submit([[6]])
    score.go.set()
    assert other.result(30) == [6] and score.sizes == [2, 1]
    with pytest.raises(Full, match="nobody waits"):
        left.result(0)
    assert not batcher.join(left) and batcher.waiting == 0
    batcher.stop()


def test_the_end_cuts_a_large_request_off() -> None:
    score = Recorder()
    score.go.clear()
    batcher = Batcher(score, batch_size=2)
    batcher.start()
    asked = batcher.submit([[1], [2], [3]])
    while batcher.waiting == 3:
        time.sleep(0.001)
    assert not batcher.stop(0.05)
    with pytest.raises(Full, match="has stopped"):
        asked.result(0)
    score.go.set()
    assert batcher.stop() and score.sizes == [2]


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
