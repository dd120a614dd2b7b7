"""Bytes written whole or not at all, strict JSON, and checksums."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

DEPTH = 100


_TOKEN = re.compile(r'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)  # strings may hold brackets


def sha256_of(path: Path) -> str:
    """Hash a file by sha256; a folder: the sorted lines `<sha256>  <path>` of its files, hidden ones apart."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("[!.]*") if p.is_file())
    lines = "".join(f"{sha256_of(p)}  {name}\n" for name, p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def strict(value: Any) -> Any:
    """Replace what JSON cannot hold in a value, recursively; arrays of one number become that number."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and not math.isfinite(number):
        return None if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
    return number


def read_bytes(path: Path) -> bytes:
    """Read a whole file. Raise ValueError for a FIFO, a device or a socket, which might be waited for without end."""
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise ValueError(f"{path} is a FIFO, a device or a socket; give a regular file")
    return path.read_bytes()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether it came from a lack of memory, also where a library has wrapped that: no file is to blame."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        error = error.__cause__ or error.__context__
    return False


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Give an empty directory beside `target`, which takes its place at the end of the block.

    Where the block fails the new directory goes, and `target` is as it was. Parents are made. A link stays one, and
    what it leads to is replaced.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        swap(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def keep_files(source: Path, target: Path, without: Collection[str] = ()) -> None:
    """Give the directory `target` what `source` has and it has not, apart from the names `without`.

    Files are linked where the disk can do that, and copied where not; `source` keeps them.
    """
    for item in source.iterdir() if source.is_dir() else ():
        new = target / item.name
        if item.name in without or new.exists():
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new, symlinks=True, copy_function=_link)
        else:
            _link(item, new)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def swap(partial: Path, target: Path) -> None:
    """Put the directory `partial` in the place of `target`; what was there is removed.

    Where that fails, `target` is as it was, and OSError is raised. Both lie in one directory.
    """
    old = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:8]}"
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    except BaseException:  # also where the user interrupts between the two
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def parse_json(data: str | bytes, depth: int = DEPTH) -> Any:
    """Parse a JSON text (bytes: UTF-8, or as `json` detects). Raise ValueError where it is none, or nested deeper."""
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogatepass")
    level = 0
    for found in _TOKEN.finditer(text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if level > depth:
            raise ValueError(f"nested more than {depth} deep")
    return json.loads(text.removeprefix("\ufeff"))
