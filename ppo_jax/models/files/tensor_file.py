"""Safetensors files written as they come: the header first, then one piece of a tensor after another.

The `safetensors` package wants every tensor in memory before it writes the first. What `write` leaves is byte for byte
what the package would (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the header's length, the
header as JSON, {name: dtype, shape, begin and end in the data}, filled up with spaces to a multiple of 8, the data.
"""

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from ppo_jax.data.disk import publish
from ppo_jax.parallel import processes

# Name of a dtype in numpy -> in the file; the package puts later ones first, so that every tensor is aligned.
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_BLOCK = 2**24  # bytes that are made contiguous at a time

Pieces = Iterator[np.ndarray | None]  # None in processes that do not write


class Entry(NamedTuple):
    """A tensor that is yet to be brought to the host."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Pieces]  # its elements in C order, see `processes.pieces`

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def entry(name: str, array: Any) -> Entry:
    """An array (global or numpy) as it is."""
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    return Entry(name, array.dtype, array.shape, lambda: processes.pieces(array))


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """As the package orders them: by dtype, then by name."""
    ranks = list(DTYPES)
    return sorted(entries, key=lambda entry: (-ranks.index(str(entry.dtype)), entry.name))


def pieces(entries: Iterable[Entry]) -> Pieces:
    """All pieces of all entries; none is made before it is asked for, and none is kept. Collective."""
    return itertools.chain.from_iterable(entry.pieces() for entry in entries)


def write(path: Path, entries: Sequence[Entry], source: Pieces, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file, whole or not at all, from the next pieces of `source`: those of `entries`, in this order.

    The host holds one piece at a time.

    Raises:
      ValueError: the pieces are not those of the entries.
      OSError: the disk is full, and the like.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ends = [0, *itertools.accumulate(entry.nbytes for entry in entries)]
    for entry, span in zip(entries, itertools.pairwise(ends), strict=True):
        header[entry.name] = {"dtype": DTYPES[str(entry.dtype)], "shape": entry.shape, "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for entry in entries:
                left = entry.nbytes
                while left > 0:
                    left -= _write_piece(file, next(source, None), entry)
                if left:
                    raise ValueError(f"{path}: {entry.name} has {-left} bytes too many")
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_piece(file: BinaryIO, piece: np.ndarray | None, entry: Entry) -> int:
    """Bytes written. A transposed piece is made contiguous a few rows at a time."""
    if piece is None or piece.dtype != entry.dtype or piece.size == 0:
        content = "nothing" if piece is None else f"{piece.dtype} {piece.shape}"
        raise ValueError(f"{file.name}: {entry.name} is {entry.dtype} {entry.shape}, got {content}")
    rows = piece.reshape(1) if piece.ndim == 0 else piece
    step = max(1, _BLOCK * len(rows) // piece.nbytes)
    for start in range(0, len(rows), step):
        file.write(np.ascontiguousarray(rows[start : start + step]).reshape(-1).view(np.uint8).data)
    return piece.nbytes
