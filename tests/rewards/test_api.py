"""The HTTP reward against a real service that fails in every way; no row is ever scored 0 for it."""

import asyncio
import email.utils
import html
import json
import logging
import socket
import threading
import time
import urllib.parse
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.rewards import api
from ppo_jax.rewards.api import APIConfig, api_reward, check_url, retry_after
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.types import Scores
from tests.rewards import faulty_server as faulty
from tests.rewards.faulty_server import Server, score, serving

PROMPTS = [f"prompt {i}" for i in range(6)]
RESPONSES = [" answer" * (i + 1) for i in range(6)]
METADATA = [{"id": i} for i in range(6)]
EXPECTED = np.array([score(p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)], np.float32)
QUICK = dict(rows_per_request=2, connections=1, backoff=0.01, deadline=30.0)  # requests in order, two rows each


class Caller:
    """A reward and what it said."""

    def __init__(self, url: str, token: str | None = None, **changes: Any) -> None:
        self.said: list[str] = []
        self.log = FailureLog(self.said.append)
        self.reward = api_reward(url, APIConfig(**(QUICK | changes)), self.log, token)

    def __call__(self) -> Scores:
        return self.reward(PROMPTS, RESPONSES, METADATA)


def check(scores: Scores, failed: list[int]) -> None:
    """Defects 2 and 19: the other rows have their fractions, and the failed ones no number at all, least of all 0."""
    good = [i for i in range(6) if i not in failed]
    assert scores.reward.dtype == np.float32 and scores.reward.shape == (6,)
    np.testing.assert_array_equal(scores.valid, [i in good for i in range(6)])
    np.testing.assert_array_equal(scores.reward[good], EXPECTED[good])
    assert np.isnan(scores.reward[failed]).all()


@pytest.fixture
def server():
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
    calls, read = [], api._list

    def defect(answer: Any, rows: int) -> list[Any]:
        calls.append(1)
        return read(answer, rows) if len(calls) != 2 else 1 // 0

    monkeypatch.setattr(api, "_list", defect)
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


# -- faults that stay --------------------------------------------------------------------------------------------------

OURS = {
    '"scores": wrong count': (faulty.says([{"score": 1.0}]), "a wrong number of scores", "1 for 2 rows"),
    "no list": (faulty.says({"score": 1.0}), 'no list "scores"', ""),
    "a list of numbers": (faulty.says([1.0, 2.0]), 'neither "score" nor "error"', ""),
    "not an object": (faulty.raw("[1.0, 2.0]"), 'no list "scores"', ""),
    "HTML": (faulty.raw("<html>Welcome!</html>", "text/html; charset=utf-8"), "not JSON (text/html)", "<html>Welcome!"),
    "half of it": (faulty.raw('{"scores": [{"sc'), "not JSON (application/json)", '{"scores": [{"sc'),
    "empty": (faulty.raw(""), "not JSON", "it is empty"),
    "deep": (faulty.raw('{"scores":' + "[" * 50_000), "not JSON", ""),
    "bytes": (lambda h: h.answer(b"\xff\xfe\x00"), "not JSON", ""),
    "flood": (faulty.floods, "too large", "more than 73728 bytes for 2 rows"),
    "gzip": (lambda h: h.answer(b"\x1f\x8b", Content_Encoding="gzip"), "compressed (gzip)", ""),
    "400": (faulty.status(400), "HTTP 400", "out of luck"),
    "401": (faulty.status(401), "HTTP 401", ""),
    "404": (faulty.status(404, "<h1>no\x1b[2Jsuch\r\npage</h1>"), "HTTP 404", "<h1>no [2Jsuch page</h1>"),
    "a redirect": (faulty.status(307, Location="http://127.0.0.1:1/"), "HTTP 307", ""),
    "204": (faulty.status(204, ""), "HTTP 204", ""),
}


@pytest.mark.parametrize("name", OURS)
def test_a_wrong_answer_fails_its_own_rows_by_name_and_is_not_asked_again(server: Server, name: str):
    fault, cause, detail = OURS[name]
    server.faults = [faulty.works, fault]
    caller = Caller(server.url)
    check(caller(), failed=[2, 3])
    assert len(server.requests) == 3
    (counted,) = caller.log.counts.items()
    assert cause in counted[0] and counted[1] == 2
    assert len(caller.said) == 1 and cause in caller.said[0] and detail in caller.said[0]


ROWS = {
    "true": (True, "bool in place of a number"),
    "null": (None, "NoneType in place of a number"),
    "text": ("1.5", "str in place of a number"),
    "NaN as text": ("NaN", "the text NaN or Infinity"),
    "infinity as text": ("-Infinity", "the text NaN or Infinity"),
    "NaN": (float("nan"), "NaN"),
    "infinity": (float("inf"), "infinity"),
    "1e300": (1e300, "too large for float32"),
    "a list": ([1.0], "list in place of a number"),
    "a huge integer": (10**400, "too large for float32"),
}


@pytest.mark.parametrize("protocol", ["ours", "theirs"])
@pytest.mark.parametrize("name", ROWS)
def test_a_single_bad_row_fails_alone(server: Server, name: str, protocol: str):
    value, cause = ROWS[name]
    server.faults = [faulty.works, faulty.entry(1, {"score": value} if protocol == "ours" else value)]
    caller = Caller(server.url if protocol == "ours" else server.theirs)
    check(caller(), failed=[3])
    assert len(server.requests) == 3 and len(caller.said) == 1 and f"a score is {cause}" in caller.said[0]


def test_a_row_may_fail_by_name(server: Server):
    server.faults = [faulty.entry(0, {"error": "too long\nfor me"}), faulty.entry(1, {"score": 1.0, "error": "unsure"})]
    caller = Caller(server.url)
    check(caller(), failed=[0, 3])
    assert caller.log.counts == {"the service could not score the row": 2}
    assert "(too long for me)" in caller.said[0]


def test_whole_numbers_and_fractions_stay_what_they_are(server: Server):
    """Defect 2: scores cast to integers."""
    server.faults = [faulty.says([3, -0.75])]
    scores = Caller(server.theirs, rows_per_request=6).reward(["a", "b"], ["", ""], [{}, {}])
    np.testing.assert_array_equal(scores.reward, np.array([3.0, -0.75], np.float32))


def test_each_cause_is_named_once_with_a_count(server: Server):
    server.always = faulty.status(500)
    caller = Caller(server.url, retries=1)
    for _ in range(3):
        check(caller(), failed=list(range(6)))
    assert len(caller.said) == 1 and "tried 2 times" in caller.said[0]
    assert caller.log.summary() == "the service answered HTTP 500 (18 rows)"
    server.always = faulty.works
    check(caller(), failed=[])  # and it recovers


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


# -- the token and the URL ---------------------------------------------------------------------------------------------

SECRET = "sk-0123456789abcdef"


def test_the_token_goes_to_the_service_and_nowhere_else(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
):
    """Even where the service echoes it, and where every library logs all that it has."""
    caplog.set_level(logging.DEBUG)
    server.faults = [
        faulty.status(401, f"bad token {SECRET}"),
        faulty.raw(f"Bearer {SECRET}?"),
        faulty.entry(0, {"error": f"you sent {SECRET}"}),
    ]
    caller = Caller(server.url, token=SECRET)
    caller()
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for _, headers, _ in server.requests)
    assert len(caller.said) == 3 and sum("[token]" in line for line in caller.said) == 3
    everything = [*caller.said, *caller.log.counts, caplog.text, *capfd.readouterr()]
    assert not any(SECRET in text for text in everything)


@pytest.mark.parametrize("before", [0, 100, 150, 158, 165, 620, 636, 640])
def test_a_token_that_is_echoed_late_is_not_shown_in_part(server: Server, before: int):
    """What is said of an answer is cut at some length; spaces are folded, so the place is not the length."""
    server.faults = [
        faulty.status(401, "x" * before + f"{SECRET} is wrong"),
        faulty.raw("x" + " " * before + SECRET),
        faulty.entry(0, {"error": "y" * before + SECRET}),
    ]
    caller = Caller(server.url, token=SECRET)
    caller()
    assert len(caller.said) == 3
    assert not any(SECRET[:4] in text for text in [*caller.said, *caller.log.counts])


def _php(text: str) -> str:
    return json.dumps(text).replace("/", "\\/")


@pytest.mark.parametrize("echo", [json.dumps, _php, html.escape, urllib.parse.quote_plus])
def test_a_token_with_odd_characters_is_hidden_as_others_write_it(server: Server, echo: Any):
    token = 'a/b+c"d&e\\f<9876543210'
    server.always = faulty.status(403, f"no: {echo(token)}")
    caller = Caller(server.url, token=token)
    caller()
    assert "[token]" in caller.said[0] and "9876543210" not in caller.said[0]


@pytest.mark.parametrize("token", ["", "two words", "a\nb", "sécret"])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(token: str):
    with pytest.raises(ValueError, match="the bearer token is empty or has") as error:
        api_reward("http://127.0.0.1/", APIConfig(), FailureLog(), token)
    assert not token or token not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["", "rm", "ftp://h/x", "http://", "http:///x", "http://h:99999/", "http://h:0/", "http://h:x/", "http://a b/"],
)
def test_what_is_no_url(url: str):
    with pytest.raises(ValueError, match="must look like"):
        check_url(url)


def test_a_password_in_the_url_is_refused_without_being_shown():
    with pytest.raises(ValueError, match="bearer token") as error:
        check_url("https://anna:hunter2@host/score")
    assert "hunter2" not in str(error.value)


def test_proxies_are_not_asked_for_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    check(Caller(server.url)(), failed=[])


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["score", "error", "scores"]), inner),
    max_leaves=8,
)


@settings(max_examples=300)
@given(JSON | st.builds(lambda scores: {"scores": scores}, st.lists(JSON, min_size=2, max_size=2)))
def test_any_answer_is_two_rows_or_a_named_failure(answer: Any):
    """No answer becomes anything but finite scores and named failures."""
    for read in (api._read_ours, api._read_theirs):
        try:
            rows = read(answer, 2)
        except api._Failed as failure:
            assert failure.cause
            continue
        assert len(rows) == 2
        for row in rows:
            assert (row[0] and isinstance(row[1], str)) if isinstance(row, tuple) else np.isfinite(np.float32(row))


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
