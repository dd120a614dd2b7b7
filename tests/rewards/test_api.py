"""The HTTP reward against a real service: what is sent, what passes, and what the deadline ends."""

import asyncio
import email.utils
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.rewards import api, protocols
from ppo_jax.rewards.api import APIConfig, retry_after
from tests.rewards import faulty_server as faulty
from tests.rewards.caller import PROMPTS, RESPONSES, SECRET, Caller, check
from tests.rewards.faulty_server import Server, score, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_our_protocol_carries_prompt_response_and_metadata_apart(server: Server):
    check(Caller(server.url)(), failed=[])
    assert [path for path, *_ in server.requests] == ["/v1/score"] * 3
    assert server.requests[1][2] == {
        "model": "reward",
        "samples": [{"prompt": PROMPTS[i], "response": RESPONSES[i], "metadata": {"id": i}} for i in (2, 3)],
    }
    assert "Authorization" not in server.requests[0][1]


def test_the_other_protocol_carries_whole_texts(server: Server):
    check(Caller(server.theirs, model="judge")(), failed=[])
    assert server.requests[2][2] == {"model": "judge", "messages": [PROMPTS[i] + RESPONSES[i] for i in (4, 5)]}


def test_the_protocol_can_be_named(server: Server):
    check(Caller(server.url, protocol="llamafactory", rows_per_request=6)(), failed=[0, 1, 2, 3, 4, 5])
    assert "messages" in server.requests[0][2]  # (this server answers by its path)


def test_requests_run_side_by_side_in_bounds_and_come_back_in_order(server: Server):
    """All four connections are busy at once, and never a fifth; the last to be asked is the first to answer."""
    together, lock, busy = threading.Barrier(4), threading.Lock(), [0, 0]

    def fault(handler: faulty.Handler) -> None:
        with lock:
            busy[0] += 1
            busy[1] = max(busy)
        order = together.wait(20)
        time.sleep(0.01 * order)
        with lock:
            busy[0] -= 1
        faulty.works(handler)

    server.always = fault
    texts = [f"text {i}" for i in range(8)]
    scores = Caller(server.url, rows_per_request=1, connections=4).reward(texts, [""] * 8, [{}] * 8)
    assert busy[1] == 4
    np.testing.assert_array_equal(scores.reward, np.array([score(text) for text in texts], np.float32))


def test_connections_are_kept(server: Server):
    ports = set()
    server.always = lambda handler: (ports.add(handler.client_address), faulty.works(handler))[-1]
    caller = Caller(server.url)
    caller(), caller()
    assert len(server.requests) == 6 and len(ports) == 1


# -- faults that pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        faulty.status(500),
        faulty.status(502, "<html>Bad gateway</html>"),
        faulty.status(503),
        faulty.status(429),
        faulty.status(429, Retry_After="0"),
        faulty.status(503, Retry_After="soon"),
        faulty.reset,
        faulty.truncated,
    ],
)
def test_a_fault_that_passes_is_tried_again(server: Server, fault: faulty.Fault):
    server.faults = [faulty.works, fault, fault]
    caller = Caller(server.url)
    check(caller(), failed=[])
    assert len(server.requests) == 5 and caller.said == []


def test_silence_is_cut_off_and_tried_again(server: Server):
    server.faults = [faulty.hangs]
    check(Caller(server.url, read_timeout=0.2)(), failed=[])
    assert len(server.requests) == 4


def test_a_restart_in_mid_batch_is_survived():
    """The service goes away between two requests of one batch, and comes back at the same port."""
    with serving() as first:
        port = first.port
        answered = threading.Event()

        def last_words(handler: faulty.Handler) -> None:
            faulty.works(handler)
            handler.close_connection = True
            answered.set()

        first.faults = [last_words]
        first.always = faulty.reset
        caller, found = Caller(first.url, retries=20, backoff=0.05), []
        batch = threading.Thread(target=lambda: found.append(caller()))
        batch.start()
        assert answered.wait(20)
    with serving(port) as second:
        batch.join(60)
        check(found[0], failed=[])
        assert len(second.requests) == 2 and caller.said == []


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(server: Server, date: bool, monkeypatch: pytest.MonkeyPatch):
    """The pause is at least what the service asks for: seconds, or until a date. Nobody sleeps in this test."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(api, "asyncio", _with_sleep(sleep))
    value = email.utils.formatdate(time.time() + 11, usegmt=True) if date else "7"
    server.faults = [faulty.status(429, Retry_After=value), faulty.status(500)]
    check(Caller(server.url, rows_per_request=6)(), failed=[])
    assert len(pauses) == 2 and 0.01 <= pauses[1] <= 0.02  # the second try, doubled, less up to a half
    assert 9 < pauses[0] <= 11 if date else pauses[0] == 7


def _with_sleep(sleep: Any) -> Any:
    copy = type(asyncio)("asyncio")
    copy.__dict__.update(asyncio.__dict__, sleep=sleep)
    return copy


def test_a_date_that_overflows_is_no_date(server: Server):
    server.faults = [faulty.status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 +9999999999999999999")]
    check(Caller(server.url)(), failed=[])


def test_what_nobody_thought_of_fails_the_rows_of_its_request_by_name(server: Server, monkeypatch: pytest.MonkeyPatch):
    """A defect of the client itself, here in how it reads the second answer."""
    calls, read = [], protocols._scores

    def defect(answer: Any, rows: int) -> list[Any]:
        calls.append(1)
        return read(answer, rows) if len(calls) != 2 else 1 // 0

    monkeypatch.setattr(protocols, "_scores", defect)
    caller = Caller(server.url, token=SECRET)
    check(caller(), failed=[2, 3])
    assert caller.log.counts == {"the request failed: ZeroDivisionError": 2}


def test_a_batch_of_no_rows_asks_nobody(server: Server):
    scores = Caller(server.url).reward([], [], [])
    assert scores.reward.shape == scores.valid.shape == (0,) and server.requests == []


def test_a_wait_beyond_the_deadline_is_not_begun(server: Server):
    server.always = faulty.status(429, Retry_After="3600")
    caller = Caller(server.url, deadline=20.0)
    check(caller(), failed=list(range(6)))
    assert len(server.requests) == 3
    assert caller.log.counts == {"the service answered HTTP 429": 6}
    assert "the next try would be in 3600 s, after the batch's deadline" in caller.said[0]


# -- the deadline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [faulty.drips, faulty.drips_headers, faulty.hangs])
def test_the_deadline_ends_what_never_ends(server: Server, fault: faulty.Fault):
    """The service says a byte before every time-out: only the batch's deadline stops it. What was scored stays."""
    server.faults = [faulty.works, fault]
    caller = Caller(server.url, deadline=1.0, read_timeout=60.0)
    check(caller(), failed=[2, 3, 4, 5])  # the third request waited behind the second
    assert list(caller.log.counts) == ["no answer before the deadline of 1 s"]
    check(caller(), failed=[])


def test_the_deadline_names_the_last_failure(server: Server):
    server.faults = [faulty.status(503), faulty.drips]
    caller = Caller(server.url, deadline=1.0, rows_per_request=6)
    check(caller(), failed=list(range(6)))
    assert "last failure: the service answered HTTP 503" in caller.said[0]


def test_nobody_is_there():
    with serving() as server:
        url = server.url
    caller = Caller(url, retries=2)
    check(caller(), failed=list(range(6)))
    (cause,) = caller.log.counts
    assert cause.startswith("the service cannot be reached: ConnectError")


def test_a_listener_that_never_accepts_is_bounded():
    """Connections stand in the kernel's queue; nothing is ever read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = Caller(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/score", deadline=0.5)
        check(caller(), failed=list(range(6)))
        assert list(caller.log.counts) == ["no answer before the deadline of 0.5 s"]


# -- small parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", 30.0),
        ("", None),
        ("-3", None),
        ("1.5", None),
        ("soon", None),
        ("٣", None),
        ("Wed, 21 Oct 2015 07:28:00 +9999999999999999999", None),
        ("Sat, 01 Jan 0001 00:00:00 +2359", 0.0),
    ],
)
def test_retry_after(value: str, seconds: float | None):
    assert retry_after(value, now=1445412450.0) == seconds  # 07:27:30 of that day


@given(st.text())
def test_retry_after_reads_anything(value: str):
    found = retry_after(value, now=0.0)
    assert found is None or found >= 0


def test_metadata_that_is_no_json_is_a_mistake(server: Server):
    caller = Caller(server.url)
    with pytest.raises(ValueError, match="metadata of a prompt cannot be sent"):
        caller.reward(["a"], ["b"], [{"x": float("nan")}])
    assert server.requests == []


@pytest.mark.parametrize(
    "wrong",
    [{"connections": 0}, {"rows_per_request": 0}, {"retries": -1}, {"deadline": 0.0}, {"backoff": -1.0},
     {"read_timeout": float("nan")}],
)  # fmt: skip
def test_settings_out_of_range(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        APIConfig(**wrong)
