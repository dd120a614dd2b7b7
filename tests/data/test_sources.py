"""One data set in every kind of file reads alike; what is wrong in a file is said with its place."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_jax.data.options import DatasetOptions
from ppo_jax.data.reading import read_pairs, read_prompts, read_ratings, read_records, read_sft
from ppo_jax.data.sources import open_table
from tests.fuzz.inputs import damaged, mutated, outcome, to_json

ROWS = [{"prompt": 'a, "b"\nc', "response": " 1"}, {"prompt": "true", "response": "é\u2028"}]
CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "saved", "splits"]


def write(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    """The rows in a file of that kind, written by the libraries that people write them with."""
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
            writer.writerows(cells)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist(rows)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=1)
        else:
            datasets = pytest.importorskip("datasets")
            found = datasets.Dataset(table)
            (found if kind == "saved" else datasets.DatasetDict({"train": found, "test": found})).save_to_disk(path)
    return path


@pytest.fixture(autouse=True)
def _parquet() -> None:
    pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_reads_alike(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS, kind)
    assert [(r.prompt, r.response) for r in read_sft(path)] == [(row["prompt"], row["response"]) for row in ROWS]
    assert all(r.where.startswith(str(path)) for r in read_sft(path))
    assert len(read_sft(path, DatasetOptions(max_samples=1))) == 1
    assert read_sft(path, DatasetOptions(split="test")) or kind == "saved"
    (tmp_path / "chat").mkdir()
    (chat,) = read_sft(write(tmp_path / "chat", CHAT, kind))
    assert (chat.prompt, chat.response) == (CHAT[0]["messages"][:1], "b")


def test_places(tmp_path: Path) -> None:
    """The second row, on the third line of CSV, which has a header and a cell of two lines."""
    places = {"jsonl": ":2", "json": ", row 2", "csv": ", line 4", "parquet": ", row 2", "saved": ", row 2"}
    for kind, place in places.items():
        (tmp_path / kind).mkdir()
        path = write(tmp_path / kind, ROWS, kind)
        assert read_sft(path)[1].where == f"{path}{place}"


def test_nulls_of_a_table_are_fields_that_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0}, {"chosen": "a", "rejected": "c"}]
    for kind in ("parquet", "csv"):
        path = write(tmp_path, rows, kind)
        assert [(r.prompt, r.margin) for r in read_pairs(path)] == [("p", 2.0), (None, 0.0)]


def test_numbers_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("response,rating\r\na,1\r\n7,-2.5\r\n")
    assert [(r.response, r.rating) for r in read_ratings(path)] == [("a", 1.0), ("7", -2.5)]
    path.write_text("response,rating\na,x\n")
    with pytest.raises(ValueError, match=r"r.csv, line 2: \"rating\" must be a number, got 'x'"):
        read_ratings(path)
    path.write_text("prompt,completion,label\np,c,true\np,d,0\n")
    assert [r.rating for r in read_ratings(path)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: the file is empty"),
        ("a.csv", b"prompt\n", "there is a header, but no row"),
        ("a.csv", b"prompt,prompt\na,b\n", "line 1: the header must name each column, once"),
        ("a.csv", b"prompt\na,b\n", "line 2: 2 cells, but the header names 1 columns"),
        ("a.csv", b'prompt\n"a\n', "not CSV"),
        ("a.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("a.json", b"[]", "the array is empty"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt": ]', "line 2 column"),
        ("a.json", b'[{"prompt": "a"}, 3]', "row 2: each entry of the array must be an object, got 3"),
        ("a.json", b"[" * 100_000, "nested more than 100 deep"),
        ("a.json", b"\xff[", "not UTF-8"),
        ("a.json", b"{}x", "each line must be one JSON object"),
        ("a.parquet", b"PAR1", "a.parquet: it cannot be read as Parquet"),
        ("a.jsonl.gz", b"x", ".gz files are not read; convert it. Supported: .jsonl"),
        ("a.pkl", b"x", ".pkl files are not read"),
    ],
)
def test_wrong_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_prompts(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a file, and no directory that `datasets` saved"):
        read_prompts(tmp_path)
    with pytest.raises(FileNotFoundError, match="owner/name is not a file; .* is written hub:owner/name"):
        read_prompts(Path("owner/name"))
    with pytest.raises(ValueError, match="hub:x: a data set of the hub is written hub:OWNER/NAME"):
        read_prompts(Path("hub:x"))
    path = write(tmp_path, ROWS, "splits")
    with pytest.raises(ValueError, match='has no split "dev"; it has: train, test'):
        read_sft(path, DatasetOptions(split="dev"))
    (path / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a data set that `datasets` saved"):
        read_sft(path)


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"hub:a/b: it could not be fetched \(ConnectionError: no route\); .*a file"):
        read_prompts(Path("hub:a/b"))


@pytest.mark.parametrize(("module", "kind"), [("pyarrow", "parquet"), ("datasets", "saved")])
def test_a_missing_package_is_named(module: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, ROWS, kind)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"data.{kind}.* {module}.*pip install"):
        read_sft(path)


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """What lies behind the rows that are wanted is not even looked at."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nnonsense\n')
    assert [r.response for r in read_sft(path, DatasetOptions(max_samples=1))] == ["a"]
    path = tmp_path / "a.csv"
    path.write_text('text\na\n"\n')
    assert next(open_table(path).rows)[1] == {"text": "a"}


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_errors_that_name_them(kind: str, data: Any, tmp_path: Path) -> None:
    path = write(tmp_path, ROWS, kind)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = outcome(lambda: read_sft(path), f"{path}:", f"{path},")
    if not isinstance(found, Exception):
        repr(found).encode()


FOREIGN: dict[str, list[dict[str, Any]]] = {
    "demonstrations": [
        {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["q", "a"]]},
        {
            "conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}],
            "system": "s",
            "tools": [{"name": "f", "parameters": {}}],
        },
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
    "preference pairs": [
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"conversations": [{"from": "human", "value": "h"}], "chosen": {"from": "gpt", "value": "g"},
         "rejected": {"from": "gpt", "value": "b"}},
    ],
    "ratings": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": True},
        {"instruction": "i", "completions": [{"response": "r", "overall_score": 3.0}]},
    ],
    "prompts": [{"instruction": "i", "output": "o"}, {"conversations": [{"from": "human", "value": "h"}]}],
}  # fmt: skip


@pytest.mark.parametrize("stage", FOREIGN)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_rows_of_every_form_are_errors_with_their_place(stage: Any, data: Any, tmp_path: Path) -> None:
    """Whatever is read can be written down as UTF-8; whatever not is one of our errors."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(to_json(data.draw(mutated(row))) for row in FOREIGN[stage]))
    found = outcome(lambda: read_records(stage, path), f"{path}:", f"{path} ")
    if not isinstance(found, Exception):
        for record in found.records:
            to_json(record)
            repr(record).encode()
        found.notice.encode()
