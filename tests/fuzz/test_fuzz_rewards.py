"""Replies of reward services at random: for every row that was sent a finite score or a cause, or one for all."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.rewards.protocols import Failed, read_answer, read_ours, read_theirs, show_text
from tests.fuzz.inputs import damaged, hostile, mutated, to_json

OURS = {"scores": [{"score": 1.5}, {"error": "x"}, {"score": -2}]}
THEIRS = {"scores": [1.5, 0, -2.25]}
CAUSE = 400  # characters of a cause and of a detail, which end up in a log


def rows_of(read: Any, body: bytes, count: int) -> list | None:
    """What `_Service._request` makes of a body; None where the whole request failed, with a printable cause."""
    try:
        rows = read(read_answer((body, "application/json"), show_text), count, show_text)
    except Failed as failure:
        assert failure.wait is None and len(failure.cause) < CAUSE and len(failure.detail) < CAUSE
        assert failure.cause.isprintable() and failure.detail.isprintable()
        return None
    return rows


@pytest.mark.parametrize(("read", "good"), [(read_ours, OURS), (read_theirs, THEIRS)], ids=["ours", "theirs"])
@settings(max_examples=300)
@given(data=st.data())
def test_replies(read: Any, good: dict, data: st.DataObject) -> None:
    document = data.draw(mutated(good) | hostile.map(lambda value: {"scores": [value] * 3}))
    content = to_json(document)
    body = data.draw(st.sampled_from([content, content, data.draw(damaged(content)), b"[" * 50_000]))
    rows = rows_of(read, body, 3)
    if rows is None:
        return
    assert len(rows) == 3
    for row in rows:
        if isinstance(row, float):
            assert math.isfinite(row) and abs(row) < 3.5e38
        else:
            cause, detail = row
            assert cause and len(cause) < CAUSE and len(detail) < CAUSE and detail.isprintable()


def test_a_good_reply_keeps_every_score() -> None:
    assert rows_of(read_theirs, json.dumps(THEIRS).encode(), 3) == [1.5, 0.0, -2.25]
    ours = rows_of(read_ours, json.dumps(OURS).encode(), 3)
    assert ours is not None and (ours[0], ours[2]) == (1.5, -2.0)
