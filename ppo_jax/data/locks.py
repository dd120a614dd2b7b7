"""Locks: one process at a time in a directory, or at a file that several would make.

A lock is the kernel's (`flock`, by the package filelock): it goes with the process that holds it, however that ends,
and reaches over machines where the file system passes it on. NFS (since Linux 2.6.12), Lustre mounted with `flock`,
GPFS, BeeGFS (with its option) and CephFS do. Lustre with `localflock` and NFS with `local_lock=flock` or `all` do not:
two machines do not see each other there. Where there are no such locks at all filelock falls back on a file that is
there or not; left by a process that died on another machine it has to be removed by hand, and the message says so.
"""

import contextlib
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

LOCK, HOLDER = ".lock", ".holder"  # in a directory that is held, or at the end of a name


class Held(ValueError):
    """Another process holds it; the message names that process."""


class _Hold(NamedTuple):
    lock: filelock.BaseFileLock
    process: int  # who took it: a fork does not hold what its parent does
    inode: int  # of the file that is locked


_held: dict[Path, _Hold] = {}


def hold_directory(directory: Path) -> bool:
    """Take a directory for this process, until it ends or `release_directory`; again is the same as once.

    Returns whether it was not this process's before.

    Raises:
      Held: another process has it.
      OSError: it cannot be written.
    """
    directory = directory.resolve()
    mine = _held.get(directory)
    if mine is not None and mine.process == os.getpid():
        if _inode(directory / LOCK) == mine.inode:
            return False
        _held.pop(directory).lock.release(force=True)  # the directory was removed, and with it the lock's name
    lock = _take(directory / LOCK, directory / HOLDER, str(directory))
    _held[directory] = _Hold(lock, os.getpid(), _inode(directory / LOCK))
    return True


def release_directory(directory: Path) -> None:
    """Let a directory go, if this process holds it."""
    mine = _held.pop(directory.resolve(), None)
    if mine is not None and mine.process == os.getpid():
        with contextlib.suppress(OSError):
            (directory / HOLDER).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            mine.lock.release()


def release_all() -> None:
    """Let all directories go that this process holds."""
    for directory in list(_held):
        release_directory(directory)


@contextlib.contextmanager
def hold_target(target: Path) -> Iterator[None]:
    """Keep every other process from making `target` within the block; raise `Held` where one does already."""
    target = target.resolve()
    lock_file, holder = _beside(target)
    lock = _take(lock_file, holder, str(target))
    try:
        yield
    finally:
        _remove(lock, lock_file, holder)


@contextlib.contextmanager
def wait_for_target(target: Path, say: Callable[[str], None], timeout: float = -1) -> Iterator[None]:
    """Do as `hold_target`, but wait for the other process, which `say` is told of.

    Raises:
      Held: it has waited for `timeout` seconds; negative: never.
    """
    target = target.resolve()
    lock_file, holder = _beside(target)
    try:
        lock = _take(lock_file, holder, str(target))
    except Held:
        say(f"{_describe(holder)} is making {target}; waiting for it")
        lock = _take(lock_file, holder, str(target), timeout)
    try:
        yield
    finally:
        _remove(lock, lock_file, holder)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.parent / f".{target.name}{LOCK}", target.parent / f".{target.name}{HOLDER}"


def _take(lock_file: Path, holder: Path, what: str, timeout: float = 0) -> filelock.BaseFileLock:
    lock = filelock.FileLock(lock_file, thread_local=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it falls back on a soft lock
            lock.acquire(timeout=timeout)
    except filelock.Timeout:
        soft = isinstance(lock, filelock.SoftFileLock)
        left = f" If that process is gone, remove {lock_file}." if soft else ""
        raise Held(
            f"{what} is in use by {_describe(holder)}: wait for it, stop it, or choose another place.{left}"
        ) from None
    with contextlib.suppress(OSError):  # a full disk does not undo the lock
        holder.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}))
    return lock


def _remove(lock: filelock.BaseFileLock, lock_file: Path, holder: Path) -> None:
    """Let the lock go, and removes its files while it is held."""
    for file in (holder, lock_file):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        lock.release()


def _inode(file: Path) -> int:
    """Return 0 where there is no such file."""
    try:
        return file.stat().st_ino
    except OSError:
        return 0


def _describe(holder: Path) -> str:
    """Say who holds a lock, for a message. The holder writes it down right after it has taken it."""
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(holder.read_text())
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
            return f"process {int(found['process'])} on {found['host']!s:.100} (since {since})"
        time.sleep(0.05)
    return "another process"
