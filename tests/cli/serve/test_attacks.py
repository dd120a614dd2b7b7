"""Clients that mean ill, or leave, at real sockets: the others are answered, memory is bounded, errors are JSON."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest

from ppo_jax.cli.serve import connections
from ppo_jax.cli.serve.room import Held, Room
from ppo_jax.rewards.loading import Scorer
from tests.cli.serve.test_server import OURS, THEIRS, metrics_of, running, score_rows
from tests.data.tokenizer import make_tokenizer

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def plain() -> Scorer:
    return Scorer("plain", make_tokenizer(), [], 20, score_rows, {}, longest=4)


class Slow:
    """Scores when it may, and notes the rows that it was given."""

    def __init__(self) -> None:
        self.go, self.rows = threading.Event(), 0

    def __call__(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        assert self.go.wait(60)
        self.rows += len(rows)
        return score_rows(rows)


def body_of(*texts: str) -> bytes:
    return json.dumps({"model": "m", "messages": texts}).encode()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def peer(url: str, said: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30) as found:
        found.sendall(said)
        yield found


def head(length: int, path: str = THEIRS) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def answer_of(found: socket.socket) -> tuple[int, dict, str]:
    """(status, JSON, head) of an answer after which the connection ends."""
    said = b""
    while piece := found.recv(65536):
        said += piece
    top, _, rest = said.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in top.lower(), said
    return int(top.split()[1]), json.loads(rest), top.decode().lower()


# -- long texts --------------------------------------------------------------------------------------------------------


def test_long_texts_hold_nobody_up_and_memory_is_bounded(plain: Scorer) -> None:
    """40 clients with 8 MB each, nothing is scored yet: some wait, the others come back later, a letter is taken."""
    slow, long = Slow(), body_of("ab " * (8 * MEGABYTE // 3 - 100))
    before = psutil.Process().memory_info().rss
    with (
        running(plain._replace(score_rows=slow), max_waiting_bytes=20 * MEGABYTE) as url,
        ThreadPoolExecutor(41) as pool,
    ):
        asking = [pool.submit(httpx.post, f"{url}{THEIRS}", content=long, timeout=60) for _ in range(40)]
        letter = pool.submit(httpx.post, f"{url}{THEIRS}", content=body_of("a"), timeout=60)
        wait_until(lambda: sum(one.done() for one in asking) + metrics_of(url)["ppo_jax_requests_in_flight"] == 41)
        assert metrics_of(url)["ppo_jax_bytes_waiting"] <= 20 * MEGABYTE
        assert psutil.Process().memory_info().rss - before < 300 * MEGABYTE
        slow.go.set()
        assert letter.result().json()["scores"] == [2]
        answers = [one.result() for one in asking]
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
        again = httpx.post(f"{url}{THEIRS}", content=long, timeout=60)
        assert again.json()["scores"] == [sum(plain.encode_texts(["ab " * 7])[0][-20:])]
        assert metrics_of(url)["ppo_jax_bytes_waiting"] == 0


def test_what_waits_is_not_tokenised_and_of_a_long_text_only_the_end(plain: Scorer) -> None:
    seen: list[int] = []
    real = make_tokenizer()

    def counting(texts: list[str], **options: object) -> dict:
        seen.extend(map(len, texts))
        return real(texts, **options)

    slow = Slow()
    with (
        running(plain._replace(tokenizer=counting, score_rows=slow), batch_size=1, max_rows=4) as url,
        ThreadPoolExecutor(3) as pool,
    ):
        first = pool.submit(httpx.post, f"{url}{THEIRS}", content=body_of("a"), timeout=60)
        wait_until(lambda: bool(seen))
        count = len(seen)
        others = [
            pool.submit(httpx.post, f"{url}{THEIRS}", content=body_of("b" * MEGABYTE + end, "c"), timeout=60)
            for end in "de"
        ]
        wait_until(lambda: metrics_of(url)["ppo_jax_rows_waiting"] == 4)
        assert len(seen) == count and metrics_of(url)["ppo_jax_bytes_waiting"] < 1000
        slow.go.set()
        assert first.result().json()["scores"] == [2]
        assert [other.result().json()["scores"] for other in others] == [[19 * 3 + 5, 4], [19 * 3 + 6, 4]]
        assert max(seen) < 300


def test_room_is_left_for_small_requests() -> None:
    room = Room(100)
    with Held(room) as large, Held(room) as small:
        assert large.take(40) and not large.take(11) and large.take(10) and room.used == 50
        assert not small.take(26) and small.take(25)
        with Held(room) as smaller:
            assert not smaller.take(13) and smaller.take(12)
            smaller.keep(5)
            smaller.keep(7)  # there are no more than 5
            assert room.used == 80
            give_back = smaller.hand_over()
        assert room.used == 80
        give_back(None)
    assert room.used == 0


# -- connections -------------------------------------------------------------------------------------------------------


def test_half_a_head_is_not_waited_for(plain: Scorer) -> None:
    """The first request of a connection, a later one, and a connection on which nothing is said."""
    with running(plain, head_timeout=0.3) as url:
        whole = body_of("a")
        with peer(url, b"POST / HT") as half, peer(url) as silent, peer(url, head(len(whole)) + whole) as later:
            assert answer_of(half)[:2] == (408, {"detail": "the request's head did not arrive within 0.3 s"})
            assert silent.recv(10) == b""
            assert b" 200 " in later.recv(20)
            later.sendall(b"GET /hea")
            said = b""
            while piece := later.recv(65536):
                said += piece
            assert b" 408 " in said
        with httpx.Client() as kept:  # one that was quiet for longer than that between two whole requests
            kept.get(f"{url}/health")
            time.sleep(0.5)
            assert kept.get(f"{url}/health").status_code == 200


def test_a_new_connection_takes_the_place_of_one_that_waits_for_its_client(plain: Scorer) -> None:
    """Half heads, half bodies, idle ones: the oldest goes. Requests that are being answered stay, whoever comes."""
    slow, whole = Slow(), body_of("a")
    with (
        running(plain._replace(score_rows=slow), max_connections=6, head_timeout=60.0) as url,
        contextlib.ExitStack() as stack,
    ):
        half = [stack.enter_context(peer(url, b"POST / HTTP")) for _ in range(3)]
        half += [stack.enter_context(peer(url, head(100) + b"{")) for _ in range(3)]
        asking = []
        for i, old in enumerate(half):
            text = body_of("a" * (i + 1))
            asking.append(stack.enter_context(peer(url, head(len(text)) + text)))
            with contextlib.suppress(ConnectionError):
                assert old.recv(10) == b""
            for other in half[i + 1 :]:
                other.sendall(b" ")
        with peer(url) as another:
            status, detail, top = answer_of(another)
        assert status == 503 and "too many connections" in detail["detail"] and "retry-after: 1" in top
        slow.go.set()
        for one in asking:
            assert b" 200 " in one.recv(20)
        assert httpx.post(f"{url}{THEIRS}", content=whole).status_code == 200  # an idle one made room


def test_fewer_files_are_fewer_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, count in ((256, 64), (10_000, 512), (100, 8), (connections.resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, files=files: (files, files))
        assert connections.count_possible(512) == count


# -- clients that leave ------------------------------------------------------------------------------------------------


def test_clients_that_left_are_not_scored(plain: Scorer) -> None:
    """One is being scored, 20 leave: what they sent is passed over, and has made room before its turn."""
    slow = Slow()
    with (
        running(plain._replace(score_rows=slow), batch_size=1, max_rows=4, max_waiting=8) as url,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(httpx.post, f"{url}{THEIRS}", content=body_of("a"), timeout=60)
        wait_until(
            lambda: metrics_of(url).get("ppo_jax_rows_total") == 1 and metrics_of(url)["ppo_jax_rows_waiting"] == 0
        )
        for i in range(20):
            rows = body_of(*["b" * (i + 1)] * 4)
            with peer(url, head(len(rows)) + rows):
                wait_until(lambda count=i: metrics_of(url)["ppo_jax_rows_total"] == 1 + 4 * (count + 1))
            wait_until(lambda: metrics_of(url)["ppo_jax_requests_in_flight"] == 1)
        second = pool.submit(httpx.post, f"{url}{THEIRS}", content=body_of(*"cdef"), timeout=60)
        wait_until(lambda: metrics_of(url)["ppo_jax_requests_in_flight"] == 2)
        slow.go.set()
        assert first.result().json()["scores"] == [2] and second.result().json()["scores"] == [4, 5, 6, 7]
        assert slow.rows == 5 and metrics_of(url)["ppo_jax_bytes_waiting"] == 0


@pytest.mark.parametrize("moment", ["waiting", "being scored", "scored"])
def test_a_retry_of_the_same_rows_joins_the_first(plain: Scorer, moment: str) -> None:
    """It takes the first one's place, or its scores; they are computed once."""
    slow, rows = Slow(), body_of(*"abc")
    with running(plain._replace(score_rows=slow), batch_size=3, max_rows=4) as url, ThreadPoolExecutor(2) as pool:
        if moment == "waiting":
            pool.submit(httpx.post, f"{url}{THEIRS}", content=body_of("d"), timeout=60)
            wait_until(lambda: metrics_of(url).get("ppo_jax_rows_total") == 1)
            wait_until(lambda: metrics_of(url)["ppo_jax_rows_waiting"] == 0)  # else its batch takes of the next rows
        ahead = int(moment == "waiting")
        with peer(url, head(len(rows)) + rows):
            wait_until(lambda: metrics_of(url).get("ppo_jax_rows_total") == 3 + ahead)
            wait_until(lambda: metrics_of(url)["ppo_jax_rows_waiting"] == 3 * ahead)
        wait_until(lambda: metrics_of(url)["ppo_jax_requests_in_flight"] == ahead)  # the first has left
        if moment == "scored":
            slow.go.set()
            wait_until(lambda: slow.rows == 3)
        retry = pool.submit(httpx.post, f"{url}{THEIRS}", content=rows, timeout=60)
        wait_until(lambda: metrics_of(url).get("ppo_jax_requests_joined_total") == 1)
        slow.go.set()
        assert retry.result().json()["scores"] == [2, 3, 4]
        assert slow.rows == 3 + ahead
        other = httpx.post(f"{url}{THEIRS}", content=body_of(*"abd")).json()["scores"]
        assert other == [2, 3, 5] and metrics_of(url)["ppo_jax_requests_joined_total"] == 1


def test_a_request_that_failed_is_asked_again(plain: Scorer) -> None:
    """Scores are kept, failures are not."""
    calls: list[int] = []

    def once(rows: Sequence[Sequence[int]]) -> np.ndarray:
        calls.append(len(rows))
        if len(calls) == 1:
            raise RuntimeError("a device that stumbles")
        return score_rows(rows)

    with running(plain._replace(score_rows=once)) as url:
        found = [httpx.post(f"{url}{THEIRS}", content=body_of("a")).status_code for _ in range(2)]
    assert found == [500, 200]


# -- errors are JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b"rubbish\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET /h\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000,
    ],
)
def test_malformed_http_is_refused_in_json(plain: Scorer, said: bytes) -> None:
    with running(plain) as url:
        with peer(url, said) as client:
            assert answer_of(client)[:2] == (400, {"detail": "this is not HTTP/1.1"})
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: ", 400),
        (head(2**40), 413),
    ],
)
def test_who_goes_on_speaking_reads_the_answer_first(plain: Scorer, said: bytes, status: int) -> None:
    """Not a reset connection, as TCP makes of one that is closed with bytes unread; endless talk ends it."""
    with running(plain) as url:
        with peer(url, said) as client:
            for _ in range(8):
                client.sendall(b"x" * 50_000)
                time.sleep(0.02)
            assert answer_of(client)[0] == status
        with peer(url, said) as client, contextlib.suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(b"x" * 100_000)
            pytest.fail("a hundred megabytes were read")


@pytest.mark.parametrize("path", [f"{OURS}/", f"{THEIRS}/", "/health/", "//health", "/"])
def test_a_wrong_slash_is_a_404_that_leads_nowhere(plain: Scorer, path: str) -> None:
    with running(plain) as url:
        for method in ("GET", "POST"):
            answer = httpx.request(method, f"{url}{path}", headers={"Host": "evil.example"})
            assert answer.status_code == 404 and answer.json() == {"detail": "Not Found"}
            assert "location" not in answer.headers


def test_a_websocket_is_an_ordinary_request(plain: Scorer) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    with running(plain, token="secret") as url:
        assert httpx.get(f"{url}{OURS}", headers=headers).status_code == 401


def test_a_request_that_the_end_cuts_off_is_told_so_in_json(plain: Scorer) -> None:
    """Grace is over while one is being scored, and while the body of another is still to come."""
    slow = Slow()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        with running(plain._replace(score_rows=slow), grace=0.2) as url:
            asked = pool.submit(httpx.post, f"{url}{THEIRS}", content=body_of("a"), timeout=60)
            half = stack.enter_context(peer(url, head(100) + b"{"))
            wait_until(lambda: metrics_of(url).get("ppo_jax_requests_in_flight") == 2)
        assert asked.result().status_code == 503 and asked.result().json() == {"detail": "the server is shutting down"}
        assert answer_of(half)[:2] == (503, {"detail": "the server is shutting down"})
        slow.go.set()
