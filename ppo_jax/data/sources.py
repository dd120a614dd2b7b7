"""The files that hold data, of every kind -> rows, each an object with the place where it stands.

    .jsonl or any other   one JSON object per line             "file:line"
    .json                 an array of objects, or as .jsonl    "file, row N"
    .csv, .tsv            a header, then rows of text          "file, line N"
    .parquet              (pyarrow)                            "file, row N"
    a directory           as `datasets` saves it               "directory, row N"
    hub:OWNER/NAME        a data set of the Hugging Face hub   "hub:OWNER/NAME, row N"; /SUBSET may follow

Rows come one after another, so whoever stops early reads no more of the file; only an array is read whole. Nothing of a
file is run: no pickles are read, and no loading scripts.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.data.disk import parse_json
from ppo_jax.data.extras import install_line
from ppo_jax.data.lines import LONGEST_LINE, read_objects, show_value

Row = dict[str, Any]
SUPPORTED = (
    ".jsonl, .json, .csv, .tsv, .parquet, a directory that `datasets` saved, or hub:OWNER/NAME; of prompts and "
    "demonstrations also .txt"
)
HUB = "hub:"
_HUB_NAME = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(/(?P<subset>[\w.-]+))?")
_REFUSED = {
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".zip",
    ".tar",
    ".xls",
    ".xlsx",
    ".arrow",
    ".feather",
    ".pkl",
    ".pickle",
    ".pt",
}
_ROWS_AT_ONCE = 256
_SAVED = ("state.json", "dataset_dict.json")


class Table(NamedTuple):
    """The rows of one file."""

    rows: Iterator[tuple[str, Row]]  # (where, the row); what is null in a table is left out of it
    columns: tuple[str, ...] | None = None  # of a table; None: each row names its own fields
    texts_only: bool = False  # CSV: numbers and lists are written as text


def open_table(path: str | Path, split: str = "train") -> Table:
    """Open the rows of a file, of a kind that its name tells.

    Args:
      split: of a data set that has several.

    Raises:
      ValueError: the file is of no supported kind, damaged, or needs a package; also while rows are read.
      FileNotFoundError: there is no such file.
    """
    if str(path).startswith(HUB):
        return _open_hub(str(path), split)
    path = Path(path)
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        return _open_saved(path, split)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file{_advise(path)}")
    kind = path.suffix.lower()
    if kind in _REFUSED:
        raise ValueError(f"{path}: {kind} files are not read; convert it. Supported: {SUPPORTED}")
    if kind == ".parquet":
        return _open_parquet(path)
    if kind in (".csv", ".tsv"):
        return _open_csv(path, "," if kind == ".csv" else "\t")
    if kind == ".json" and _begins_array(path):
        return Table(_read_array(path))
    return Table(read_objects(path))


def _advise(path: Path) -> str:
    if path.is_dir():
        return ", and no directory that `datasets` saved (one with state.json or dataset_dict.json)"
    named = re.fullmatch(r"[\w.-]+/[\w-]+", str(path))
    return f"; a data set of the Hugging Face hub is written {HUB}{path}" if named else ""


# -- text ------------------------------------------------------------------------------------------------------------


def _begins_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_array(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        values = parse_json(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, error)) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); a .json file is an array of objects, or one per line") from error
    if not values:
        raise ValueError(f"{path}: the array is empty")
    for number, value in enumerate(values, start=1):
        where = f"{path}, row {number}"
        if not isinstance(value, dict):
            raise ValueError(f"{where}: each entry of the array must be an object, got {show_value(value)}")
        yield where, value


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    return f"{path}: not UTF-8: {error.reason}; convert the file, for example with `iconv -t UTF-8`"


def _open_csv(path: Path, delimiter: str) -> Table:
    csv.field_size_limit(LONGEST_LINE)
    lines = _read_csv(path, delimiter)
    _, header = next(lines)
    return Table(_name_cells(path, tuple(header), lines), tuple(header), texts_only=True)


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line on which a row ends, its cells); the first is the header."""
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next((cells for cells in reader if cells), None)
            if header is None:
                raise ValueError(f"{path}: the file is empty")
            odd = [name for name in header if not name.strip() or header.count(name) > 1]
            if odd:
                raise ValueError(
                    f"{path}, line {reader.line_num}: the header must name each column, once; got {show_value(header)}"
                )
            yield reader.line_num, header
            for cells in reader:
                yield reader.line_num, cells
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(path, error)) from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _name_cells(
    path: Path, header: tuple[str, ...], lines: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[str, Row]]:
    empty = True
    for number, cells in lines:
        where = f"{path}, line {number}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} cells, but the header names {len(header)} columns")
        empty = False
        yield where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    if empty:
        raise ValueError(f"{path}: there is a header, but no row")


# -- tables ----------------------------------------------------------------------------------------------------------


def _open_parquet(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet files need pyarrow: {install_line('data')}") from error
    try:
        file = parquet.ParquetFile(path)
        columns = tuple(file.schema_arrow.names)
    except Exception as error:  # a damaged file: whatever the library raises
        raise ValueError(_unreadable(path, "Parquet", error)) from error
    batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE))
    return Table(_number_rows(str(path), "Parquet", batches), columns)


def _open_saved(path: Path, split: str) -> Table:
    datasets = _import_datasets(str(path))
    try:
        found = datasets.load_from_disk(str(path), keep_in_memory=False)
    except Exception as error:
        raise ValueError(_unreadable(path, "a data set that `datasets` saved", error)) from error
    if isinstance(found, dict):  # DatasetDict
        if split not in found:
            raise ValueError(f'{path} has no split "{split}"; it has: {", ".join(map(str, found))}')
        found = found[split]
    return _table_of(found, str(path))


def _open_hub(name: str, split: str) -> Table:
    match = _HUB_NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name}: a data set of the hub is written {HUB}OWNER/NAME or {HUB}OWNER/NAME/SUBSET")
    datasets = _import_datasets(name)
    try:
        found = datasets.load_dataset(match["name"], match["subset"], split=split)
    except Exception as error:
        raise ValueError(
            f"{name}: it could not be fetched ({type(error).__name__}: {_first_line(error)}); check the name and the "
            f'split "{split}"; where there is no network give a file instead'
        ) from error
    return _table_of(found, name)


def _import_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name}: this needs the library datasets: {install_line('data')}") from error
    if int(datasets.__version__.split(".")[0]) < 4:  # earlier ones may run a data set's own code
        raise ValueError(f"{name}: datasets {datasets.__version__} is too old: {install_line('data')}")
    return datasets


def _table_of(found: Any, name: str) -> Table:
    """Read Arrow tables, so that no picture or sound is decoded and no saved format counts."""
    try:
        tables = found.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
        columns = tuple(found.column_names)
    except Exception as error:
        raise ValueError(_unreadable(name, "a data set", error)) from error
    return Table(_number_rows(name, "a data set", (table.to_pylist() for table in tables)), columns)


def _number_rows(name: str, kind: str, batches: Iterable[list[Row]]) -> Iterator[tuple[str, Row]]:
    count, pieces = 0, iter(batches)
    while True:
        try:
            rows = next(pieces, None)
        except Exception as error:
            raise ValueError(_unreadable(f"{name}, behind row {count}", kind, error)) from error
        if rows is None:
            break
        for count, row in enumerate(rows, start=count + 1):  # noqa: B020  # goes on counting
            yield f"{name}, row {count}", _without_nulls(row)
    if not count:
        raise ValueError(f"{name}: there is no row")


def _without_nulls(value: Any) -> Any:
    """Leave out what is null: a table has every field in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _unreadable(name: str | Path, kind: str, error: Exception) -> str:
    return f"{name}: it cannot be read as {kind} ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
