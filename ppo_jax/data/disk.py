"""Bytes written whole or not at all, strict JSON, and checksums."""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
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


# -- files and directories that outlive a machine which goes down ----------------------------------------------------


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file: whoever looks finds the old one or this one, also after a power cut.

    Several processes may do so at once, as the slices of a sweep do: the last one's stays.
    """
    partial = _name_beside(path)
    try:
        partial.write_bytes(data)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Give an empty directory beside `target`, which takes its place at the end of the block.

    Where the block fails the new directory goes, and `target` is as it was. Parents are made. A link stays one, and
    what it leads to is replaced. What a killed process of this machine began is removed.
    """
    target = target.resolve()
    make_directory(target.parent)
    partial = _name_beside(target)
    partial.mkdir()
    try:
        yield partial
        publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _name_beside(target: Path) -> Path:
    """Name what will take the place of `target`, as nobody else does; what processes that were killed left goes."""
    begun = f".{target.name}.partial-"
    for left in target.parent.glob(f"{glob.escape(begun)}*"):
        _, process, host = (left.name.removeprefix(begun).split(".", 2) + ["", ""])[:3]
        if host == socket.gethostname() and not _lives(process):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return target.parent / f"{begun}{uuid.uuid4().hex[:8]}.{os.getpid()}.{socket.gethostname()}"


def publish(partial: Path, target: Path) -> None:
    """Put a finished file or directory in the place of `target`; what was there goes. Both lie in one directory.

    `partial` is on the disk itself before it gets the name, and the name is when this returns: a machine that goes
    down at any moment leaves the old or the new one, whole. Where it fails, `target` is as it was.
    """
    sync_tree(partial)
    if partial.is_dir():
        swap(partial, target)
    else:
        os.replace(partial, target)
    sync(target.parent)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, on the disk itself."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync_tree(path: Path) -> None:
    """Call `sync` on a file, or on a directory and all that is below it."""
    if path.is_dir() and not path.is_symlink():
        for item in path.iterdir():
            sync_tree(item)
    if not path.is_symlink():
        sync(path)


def sync(path: Path) -> None:
    """Return when the bytes of a file, or the names in a directory, are on the disk itself (fsync).

    A disk that cannot do this for directories, as some of networks, is left to its own ways.
    """
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)):
            raise


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

    In one step where the disk can exchange two names (Linux, most local disks), else in two. Where that fails,
    `target` is as it was, and OSError is raised.
    """
    old = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:8]}"
    if target.is_dir() and exchange(partial, target):
        old = partial
    else:
        try:
            if target.exists():
                os.replace(target, old)
            os.replace(partial, target)
        except BaseException:  # also where the user interrupts between the two
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise
    sync(target.parent)  # before the old one goes
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Give each of two paths the other's name, in one step; return False where system or disk cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Python has no name for it
    if rename is None:
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), both) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(other))


def _lives(process: str) -> bool:
    """Tell whether a process of this machine runs, by its number; what is no number does."""
    if not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


# -- JSON ------------------------------------------------------------------------------------------------------------


class RepeatedKey(ValueError):
    """A JSON object has a key more than once: which value counts is anybody's guess."""


def parse_json(data: str | bytes, depth: int = DEPTH, *, finite: bool = True) -> Any:
    """Parse a JSON text (bytes: UTF-8, or as `json` detects). Raise ValueError where it is none, or nested deeper.

    Args:
      finite: refuse the numbers that JSON has not, though Python writes and reads them: NaN, Infinity, and those that
        would become infinite, as 1e999.

    Raises:
      RepeatedKey: the same key stands twice in an object.
    """
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogatepass")
    level = 0
    for found in _TOKEN.finditer(text):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if level > depth:
            raise ValueError(f"nested more than {depth} deep")
    hooks: dict[str, Any] = {"parse_constant": _refuse_number, "parse_float": _finite_number} if finite else {}
    return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_unique_keys, **hooks)


def _refuse_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON; write null, or leave the field out")


def _finite_number(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _refuse_number(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(
            f"the key {next(key for key in keys if keys.count(key) > 1)[:60]!r} stands twice in one object"
        )
    return found
