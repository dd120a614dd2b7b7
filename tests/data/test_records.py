"""Every wrong line is an error with its place; every right one is read as written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.data import read_pairs, read_prompts, read_sft
from ppo_jax.data.lines import ROLES

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def _file(folder: Path, *lines: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_prompts(tmp_path: Path) -> None:
    path = _file(tmp_path, {"prompt": " The "}, {"messages": [USER], "metadata": {"id": 7}}, {"prompt": [USER]})
    records = read_prompts(path)
    assert [r.prompt for r in records] == [" The ", [USER], [USER]]
    assert [r.metadata for r in records] == [{}, {"id": 7}, {}]
    assert [r.where for r in records] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_pairs(tmp_path: Path) -> None:
    bad = {"role": "assistant", "content": "go"}
    path = _file(
        tmp_path,
        {"chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [bad]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, bad]},
    )
    assert [tuple(r[:4]) for r in read_pairs(path)] == [
        (None, "a", "b", 0.0),
        ("p", "a", "b", 2.0),
        ([USER], "a", "b", 0.0),
        ([USER], [ASSISTANT], [bad], 0.0),
        (None, [USER, ASSISTANT], [USER, bad], 0.0),
    ]


def test_sft(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        {"prompt": "p", "response": "r"},
        {"prompt": [USER], "response": "r"},
        {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
        {"text": "t"},
    )
    assert [(r.prompt, r.response) for r in read_sft(path)] == [
        ("p", "r"),
        ([USER], "r"),
        ([USER, ASSISTANT, USER], "hello"),
        (None, "t"),
    ]


def test_plain_text(tmp_path: Path) -> None:
    # Windows line ends, a byte order mark, blank lines at the end; U+2028 and form feed end no line.
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xef\xbb\xbffirst \r\n" + "se\u2028co\x0cnd \n".encode() + b"\r\n\n")
    assert [r.prompt for r in read_prompts(path)] == ["first ", "se\u2028co\x0cnd "]
    assert [(r.prompt, r.response) for r in read_sft(path)] == [(None, "first "), (None, "se\u2028co\x0cnd ")]
    path.write_text("first\n\nthird\n")
    with pytest.raises(ValueError, match=r"data.txt:2: \"prompt\" is empty"):
        read_prompts(path)


@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5), escaped=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str], escaped: bool) -> None:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
    path.write_bytes("\n".join(lines).encode())
    assert [r.response for r in read_sft(path)] == texts


@pytest.mark.parametrize(
    ("read", "line", "message"),
    [
        (read_prompts, {"promt": "a"}, '"promt" (did you mean "prompt"?); allowed: "prompt" or "messages"'),
        (read_prompts, {"prompt": "a", "messages": [USER]}, 'has messages, prompt; allowed: "prompt" or "messages"'),
        (read_prompts, {"metadata": {}}, "has no text; allowed"),
        (read_prompts, {"prompt": 3}, '"prompt" must be text or a list of messages'),
        (read_prompts, {"prompt": " \n"}, '"prompt" is empty'),
        (read_prompts, {"prompt": "\ud800"}, '"prompt" holds half of a surrogate pair'),
        (read_prompts, {"prompt": []}, '"prompt" must be text or a list of messages'),
        (read_prompts, {"messages": "a"}, '"messages" must be a list of messages'),
        (read_prompts, {"messages": [USER, "a"]}, '"messages[1]" must be {"role": ..., "content": ...}, got \'a\''),
        (read_prompts, {"messages": [{**USER, "name": "x"}]}, 'messages[0]: unknown field "name"'),
        (read_prompts, {"messages": [{"role": "user"}]}, 'messages[0]: has role; allowed: "role" and "content"'),
        (read_prompts, {"messages": [{**USER, "role": "usr"}]}, f"is 'usr'; allowed: {', '.join(ROLES)}"),
        (read_prompts, {"messages": [{**USER, "content": None}]}, '"messages[0].content" must be text, got None'),
        (read_prompts, {"messages": [USER, ASSISTANT]}, "must not be the \"assistant\"'s"),
        (read_prompts, {"prompt": "a", "metadata": 3}, '"metadata" must be an object, got 3'),
        (read_prompts, ["prompt"], "each line must be one JSON object, got ['prompt']"),
        (read_pairs, {"chosen": "a"}, 'has chosen; allowed: "chosen" and "rejected"; optional: "prompt", "margin"'),
        (read_pairs, {"chosen": "a", "rejected": ""}, '"rejected" is empty'),
        (read_pairs, {"chosen": "a", "rejected": [USER, ASSISTANT]}, "must both be text or both be messages"),
        (read_pairs, {"prompt": "p", "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, 'text but "chosen" is'),
        (read_pairs, {"chosen": [ASSISTANT], "rejected": [USER, ASSISTANT]}, '"chosen" has only a response'),
        (read_pairs, {"chosen": [USER, ASSISTANT], "rejected": [USER]}, 'last message of "rejected" must be'),
        (read_pairs, {"chosen": "a", "rejected": "b", "margin": -1}, '"margin" must be a finite number'),
        (read_pairs, {"chosen": "a", "rejected": "b", "margin": float("nan")}, "NaN is not a number of JSON"),
        (read_prompts, {"prompt": "a", "metadata": {"x": [float("-inf")]}}, "-Infinity is not a number of JSON"),
        (read_pairs, {"chosen": "a", "rejected": "b", "margin": 10**400}, '"margin" must be a finite number'),
        (read_pairs, {"chosen": "a", "rejected": "b", "margin": True}, '"margin" must be a finite number'),
        (read_sft, {"prompt": "a"}, 'allowed: "prompt" and "response" or "messages" or "text"'),
        (read_sft, {"prompt": "a", "text": "b"}, "has prompt, text; allowed"),
        (read_sft, {"messages": [USER]}, 'last message of "messages" must be the assistant'),
        (read_sft, {"prompt": "a", "response": ["b"]}, "\"response\" must be text, got ['b']"),
    ],
)  # fmt: skip
def test_wrong_lines(tmp_path: Path, read: Callable[[Path], Any], line: Any, message: str) -> None:
    right = {read_prompts: {"prompt": "a"}, read_pairs: {"chosen": "a", "rejected": "b"}, read_sft: {"text": "a"}}
    path = _file(tmp_path, right[read], line, right[read])
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


@pytest.mark.parametrize("read", [read_prompts, read_pairs, read_sft])
def test_wrong_files(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(FileNotFoundError, match="none.jsonl is not a file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read(tmp_path)
    path = tmp_path / "data.jsonl"
    for content, message in [
        (b"", "data.jsonl: the file is empty"),
        (b"\n \n", "data.jsonl: the file is empty"),
        (b'{"text": "caf\xe9"}', "data.jsonl:1: not UTF-8: byte 0xe9 at column 14"),
        (b'{"text": "a"', "data.jsonl:1: not JSON"),
        (b"[" * 100_000, "data.jsonl:1: not JSON"),
        (b"9" * 5_000, "data.jsonl:1: not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "data.jsonl:1: the key 'prompt' stands twice in one object"),
        (b'{"prompt": "a", "metadata": {"n": [{"k": 1, "k": 1}]}}', "data.jsonl:1: the key 'k' stands twice"),
        (b'{"prompt": "a", "metadata": {"n": 1e999}}', "data.jsonl:1: not JSON (1e999 is not a number of JSON"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            read(path)
        assert message in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04\x15", "no text but a Parquet file; name it FILE.parquet"),
        (b"\x1f\x8b\x08\x00\xff", "compressed by gzip.*gunzip"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed by zstd.*unzstd"),
        (b"PK\x03\x04\x14\xff", "ZIP archive"),
        (b"\xff\xfe{\x00", "iconv -f UTF-16 -t UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_a_file_that_is_no_text_is_named_for_what_it_is(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content + b"\n\x00\xff")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path / name)
    assert "UTF-16" in message or "iconv" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "prompt,answer\nHello,x\n", "looks like a table .CSV.: name it FILE.csv"),
        ("a.jsonl", '[{"prompt": "a"}]\n', "looks like one JSON array: name it FILE.json"),
    ],
)
def test_a_table_or_an_array_under_a_wrong_name_is_told_the_right_one(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\na,b\n')
    with pytest.raises(ValueError, match="b.jsonl:2: not JSON") as error:
        read_prompts(tmp_path / "b.jsonl")
    assert "CSV" not in str(error.value)
