"""Data files at random: JSON lines of prompts, pairs and demonstrations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.data import read_pairs, read_prompts, read_sft
from tests.fuzz.inputs import damaged, mutated, outcome, to_json

USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD: list[tuple[Callable[[Path], Any], list[dict]]] = [
    (read_prompts, [{"prompt": "a", "metadata": {"n": [1, {"x": None}]}}, {"messages": [USER]}]),
    (
        read_pairs,
        [
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.0},
            {"chosen": [USER, BOT], "rejected": [USER, BOT]},
        ],
    ),
    (read_sft, [{"prompt": "a", "response": "b"}, {"messages": [USER, BOT]}, {"text": "t"}]),
]


@pytest.mark.parametrize(("read", "lines"), GOOD, ids=[read.__name__ for read, _ in GOOD])
@settings(max_examples=150)
@given(data=st.data())
def test_records(read: Callable, lines: list[dict], tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Whatever is read can be written down again as UTF-8."""
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    content = b"\n".join(to_json(data.draw(mutated(line))) for line in lines)
    path.write_bytes(data.draw(st.sampled_from([content, data.draw(damaged(content))])))
    found = outcome(lambda: read(path), f"{path}:", f"{path} ")
    if not isinstance(found, Exception):
        assert len(found) >= 1
        for record in found:
            to_json(record)
            repr(record).encode()


@pytest.mark.parametrize("read", [read for read, _ in GOOD])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 5000, b"\x00" * 100, b"\xff\xfe{", b"9" * 9999, b'""'])
def test_lines_that_break_parsers(read: Callable, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    assert isinstance(outcome(lambda: read(path), f"{path}:1: "), ValueError)
