"""A machine that goes down: what is on the disk itself after every single call that the code makes.

The model is that of POSIX and no better: the bytes of a file are safe from `fsync` of it on, the names in a directory
from `fsync` of the directory on; of what came since, anything may be there or not. After every call all choices are
looked at of directories whose new names are there, without any new bytes; and that everything is there.
"""

import itertools
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Calls of C functions after which names or bytes may have changed.
CALLS = {
    "open",
    "write",
    "writelines",
    "flush",
    "close",
    "__exit__",
    "truncate",
    "fsync",
    "replace",
    "rename",
    "unlink",
}
CALLS |= {"remove", "mkdir", "rmdir", "link", "symlink", "get_errno"}  # the last: after a function called by ctypes

Node = bytes | dict[str, Any]  # a file's bytes; a directory's names


class Machine:
    """Everything below `root` is on the disk when it begins; inside `with` every call is a moment to go down at."""

    def __init__(self, root: Path, look: Callable[[Node, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.look, self.moments = root, look, 0
        self.safe_bytes: dict[int, bytes] = {}
        self.safe_names: dict[int, dict[str, int]] = {}
        self.kinds: dict[int, bool] = {}  # inode -> whether it is a directory
        for folder, _, names in os.walk(root):
            self._keep(folder)
            for name in names:
                self._keep(os.path.join(folder, name))
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            self._keep(f"/proc/self/fd/{descriptor}")

        monkeypatch.setattr(os, "fsync", fsync)

    def _keep(self, path: str) -> None:
        """Of a file its bytes, of a directory its names."""
        status = os.stat(path)
        self.kinds[status.st_ino] = stat.S_ISDIR(status.st_mode)
        if self.kinds[status.st_ino]:
            self.safe_names[status.st_ino] = names_of(path)
        else:
            with open(path, "rb") as file:
                self.safe_bytes[status.st_ino] = file.read()

    def __enter__(self) -> "Machine":
        sys.setprofile(self._profile)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        sys.setprofile(None)
        if kind is None:
            self._go_down("at the end")

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        name = getattr(argument, "__name__", "")
        if event in ("c_return", "c_exception") and name in CALLS and frame.f_globals is not globals():
            sys.setprofile(None)
            try:
                self._go_down(f"{name} in {frame.f_code.co_name}")
            finally:
                sys.setprofile(self._profile)

    def _go_down(self, where: str) -> None:
        self.moments += 1
        live: dict[int, dict[str, int]] = {inode: {} for inode in self.safe_names}  # what is no longer there is empty
        for folder, _, names in os.walk(self.root):
            live[os.stat(folder).st_ino] = names_of(folder)
            self.kinds[os.stat(folder).st_ino] = True
            for name in names:
                self.kinds.setdefault(os.lstat(os.path.join(folder, name)).st_ino, False)
        top, changed = os.stat(self.root).st_ino, [i for i in live if live[i] != self.safe_names.get(i, {})]
        for count in range(len(changed) + 1):
            for lucky in itertools.combinations(changed, count):
                self.look(
                    self._tree(top, lambda i, lucky=lucky: (live if i in lucky else self.safe_names).get(i, {})), where
                )
        self.look(everything(self.root), where)

    def _tree(self, inode: int, names: Callable[[int], dict[str, int]]) -> Node:
        if self.kinds.get(inode):
            return {name: self._tree(child, names) for name, child in names(inode).items()}
        return self.safe_bytes.get(inode, b"")


def names_of(folder: str) -> dict[str, int]:
    return {name: os.lstat(os.path.join(folder, name)).st_ino for name in os.listdir(folder)}


def everything(path: Path) -> Node:
    """A file's bytes, or all below a directory."""
    return {item.name: everything(item) for item in path.iterdir()} if path.is_dir() else path.read_bytes()


def files(node: Node, where: str = "") -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of all files."""
    if isinstance(node, bytes):
        yield where, node
        return
    for name, child in node.items():
        yield from files(child, f"{where}/{name}")
