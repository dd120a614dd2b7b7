"""JSON lines: appended, read, repaired after a kill, and cut back on resume."""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.data.disk import parse_json, read_bytes, replace_file, strict
from ppo_jax.data.documents import check_line


def append_jsonl(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records as strict JSON, a line each. NaN becomes null; an infinity becomes "Infinity" / "-Infinity"."""
    lines = [json.dumps(strict(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    data = memoryview("".join(lines).encode("utf-8", "replace"))
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:  # half a line would spoil the one after it
            file.truncate(start)
            raise


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines file, in order; [] when the file is missing.

    A torn last line (the process was killed while writing it) is left out. Any other line that is not a JSON object, or
    not what files of this name hold (`documents.LINES`), raises ValueError with file, line number and field.
    """
    path = Path(path)
    if not path.exists():
        return []
    return [record for _, record in _parse_lines(path)]


def repair_jsonl(path: str | os.PathLike) -> None:
    """Remove a torn last line in place, and end a whole one that lacks its newline."""
    path = Path(path)
    data = read_bytes(path) if path.exists() else b""
    if data and not data.endswith(b"\n"):
        whole = _is_object(data[data.rfind(b"\n") + 1 :])
        replace_file(path, data + b"\n" if whole else data[: data.rfind(b"\n") + 1])


def truncate_jsonl(path: str | os.PathLike, step: int, phases: Collection[str] | None = None) -> int:
    """Remove the records of a resumed run that lie after `step`; return how many.

    Phases count their steps separately, so resuming PPO at step 20 must not touch reward-model step 300: with
    `phases` only records of those phases are considered. A torn last line goes too. The file is replaced
    atomically: a crash leaves either the old or the new one.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = _parse_lines(path)
    keep = [
        line
        for line, record in lines
        if record.get("step", 0) <= step or (phases is not None and record.get("phase") not in phases)
    ]
    replace_file(path, b"".join(line + b"\n" for line in keep))
    return len(lines) - len(keep)


def _parse_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Yield (line without newline, record) of each line that is not blank."""
    lines = read_bytes(path).split(b"\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if _is_object(line):
            record = parse_json(line)
            check_line(path, number, record)
            parsed.append((line, record))
        elif number < len(lines):  # the last element is what follows the last newline: a torn line
            raise ValueError(f"{path}, line {number}: not a JSON object: {line[:60]!r}; mend or delete the line")
    return parsed


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are both one
        return False
