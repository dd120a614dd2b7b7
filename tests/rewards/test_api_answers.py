"""Wrong answers of a real service fail their own rows by name, none is scored 0 for it; tokens are shown nowhere."""

import html
import json
import logging
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.rewards import protocols
from ppo_jax.rewards.api import APIConfig, api_reward
from ppo_jax.rewards.failures import FailureLog
from ppo_jax.rewards.protocols import check_url
from tests.rewards import faulty_server as faulty
from tests.rewards.caller import SECRET, Caller, check
from tests.rewards.faulty_server import Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


# -- wrong answers --------------------------------------------------------------------------------------------------

OURS = {
    '"scores": wrong count': (faulty.says([{"score": 1.0}]), "a wrong number of scores", "1 for 2 rows"),
    "no list": (faulty.says({"score": 1.0}), 'no list "scores"', ""),
    "a list of numbers": (faulty.says([1.0, 2.0]), 'neither "score" nor "error"', ""),
    "not an object": (faulty.raw("[1.0, 2.0]"), 'no list "scores"', ""),
    "HTML": (faulty.raw("<html>Welcome!</html>", "text/html; charset=utf-8"), "not JSON (text/html)", "<html>Welcome!"),
    "half of it": (faulty.raw('{"scores": [{"sc'), "not JSON (application/json)", '{"scores": [{"sc'),
    "empty": (faulty.raw(""), "not JSON", "it is empty"),
    "deep": (faulty.raw('{"scores":' + "[" * 50_000), "not JSON", ""),
    "a key twice": (
        faulty.raw('{"scores": [{"score": 1, "score": 2}, {"score": 3}]}'),
        "a key twice",
        "'score' stands",
    ),
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["score", "error", "scores"]), inner),
    max_leaves=8,
)


@settings(max_examples=300)
@given(JSON | st.builds(lambda scores: {"scores": scores}, st.lists(JSON, min_size=2, max_size=2)))
def test_any_answer_is_two_rows_or_a_named_failure(answer: Any):
    """No answer becomes anything but finite scores and named failures."""
    for read in (protocols.read_ours, protocols.read_theirs):
        try:
            rows = read(answer, 2)
        except protocols.Failed as failure:
            assert failure.cause
            continue
        assert len(rows) == 2
        for row in rows:
            assert (row[0] and isinstance(row[1], str)) if isinstance(row, tuple) else np.isfinite(np.float32(row))


# -- the token and the URL ---------------------------------------------------------------------------------------------


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
