"""The GGUF container: metadata and the places of the tensors, every length checked against the file.

Layout (little-endian): magic, version u32, tensor count u64, metadata count u64, the metadata (key, type u32,
value), per tensor (name, dimensions, type u32, offset u64), padding to `general.alignment`, the tensor data.
Source: the GGUF specification in the ggml repository (docs/gguf.md), versions 2 and 3.
"""

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
STRING, ARRAY = 8, 9
# Far beyond any real header (a vocabulary of 262,144 tokens has 514,906 merges), and small enough to hold.
MOST_FIELDS, MOST_TENSORS, MOST_ITEMS, LONGEST = 2**14, 2**18, 2**22, 2**24
# Metadata value types as struct formats; 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Stored(NamedTuple):
    """A tensor as it lies in the file."""

    shape: tuple[int, ...]  # outermost first, as numpy and torch say it (GGUF says it the other way round)
    kind: int  # ggml type number
    data: np.ndarray  # uint8 [rows, bytes per row], a view of the mapped file


def read(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Maps the file and reads its header.

    Returns:
      metadata (numbers, strings and lists of them) and tensors by name. Tensor data is read when it is used.

    Raises:
      ValueError: the file is not GGUF, is cut short, or gives a length that cannot be.
    """
    if not path.is_file():
        raise ValueError("not a GGUF file but a directory, or nothing that can be mapped")
    if path.stat().st_size < 24:
        raise ValueError("not a GGUF file: shorter than a header")
    data = np.memmap(path, mode="r")
    view = data.data
    if bytes(view[:4]) != MAGIC:
        raise ValueError("not a GGUF file: it does not begin with GGUF")
    (version, tensor_count, field_count), offset = _unpack(view, 4, "IQQ")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} (0x{version:08x}) is not supported; supported: 2, 3, little-endian")
    for what, count, most in (("metadata fields", field_count, MOST_FIELDS), ("tensors", tensor_count, MOST_TENSORS)):
        if count > most:
            raise ValueError(f"the header claims {count} {what}; at most {most} are read")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key, offset = _string(view, offset)
        (kind,), offset = _unpack(view, offset, "I")
        if key in metadata:
            raise ValueError(f"metadata field {key!r} occurs twice")
        try:
            metadata[key], offset = _value(view, offset, kind)
        except ValueError as error:
            raise ValueError(f"metadata field {key!r}: {error}") from None
    headers = []
    for _ in range(tensor_count):
        name, offset = _string(view, offset)
        (rank,), offset = _unpack(view, offset, "I")
        if not 1 <= rank <= 4:
            raise ValueError(f"tensor {name!r} has {rank} dimensions")
        dimensions, offset = _unpack(view, offset, "Q" * rank)
        (kind, start), offset = _unpack(view, offset, "IQ")
        headers.append((name, tuple(reversed(dimensions)), kind, start))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1:
        raise ValueError(f"general.alignment={alignment!r} is not a positive integer")
    base = -(-offset // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, shape, kind, start in headers:
        if name in tensors:
            raise ValueError(f"tensor {name!r} occurs twice")
        tensors[name] = _place(data, name, shape, kind, base + start)
    return metadata, tensors


def dequantize(name: str, tensor: Stored) -> np.ndarray:
    """The tensor in float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as expand

    kind = GGMLQuantizationType(tensor.kind)
    try:
        return expand(np.asarray(tensor.data), kind).reshape(tensor.shape).astype(np.float32, copy=False)
    except NotImplementedError:
        raise ValueError(f"tensor {name!r} is {kind.name}, which the gguf package cannot expand") from None


def _place(data: np.ndarray, name: str, shape: Sequence[int], kind: int, start: int) -> Stored:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {name!r} has the unknown type {kind}") from None
    if not all(shape) or shape[-1] % block:
        raise ValueError(f"tensor {name!r} of shape {tuple(shape)} does not consist of blocks of {block}")
    rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
    if start + rows * row_bytes > data.size:
        raise ValueError(f"tensor {name!r} ends beyond the end of the file: the file is cut short")
    return Stored(tuple(shape), kind, data[start : start + rows * row_bytes].reshape(rows, row_bytes))


def _unpack(view: memoryview, offset: int, layout: str) -> tuple[tuple[Any, ...], int]:
    size = struct.calcsize("<" + layout)
    if offset + size > len(view):
        raise ValueError("the file is cut short in its header")
    return struct.unpack_from("<" + layout, view, offset), offset + size


def _string(view: memoryview, offset: int) -> tuple[str, int]:
    (length,), offset = _unpack(view, offset, "Q")
    if length > len(view) - offset:
        raise ValueError(f"a string of {length} bytes in the header does not fit the file")
    if length > LONGEST:
        raise ValueError(f"a string of {length} bytes in the header; at most {LONGEST} are read")
    # Names and tokens are UTF-8 by the specification; UnicodeDecodeError is a ValueError.
    return str(view[offset : offset + length], "utf-8"), offset + length


def _value(view: memoryview, offset: int, kind: int) -> tuple[Any, int]:
    if kind in SCALARS:
        (value,), offset = _unpack(view, offset, SCALARS[kind])
        return value, offset
    if kind == STRING:
        return _string(view, offset)
    if kind != ARRAY:
        raise ValueError(f"unknown value type {kind}")
    (item, count), offset = _unpack(view, offset, "IQ")
    if item not in SCALARS and item != STRING:
        raise ValueError(f"unsupported array of value type {item}")
    smallest = 8 if item == STRING else struct.calcsize("<" + SCALARS[item])
    if count * smallest > len(view) - offset:
        raise ValueError(f"an array of {count} values does not fit the file")
    if count > MOST_ITEMS:
        raise ValueError(f"an array of {count} values; at most {MOST_ITEMS} are read")
    if item != STRING:
        values, offset = _unpack(view, offset, f"{count}{SCALARS[item]}")
        return list(values), offset
    strings = []
    for _ in range(count):
        text, offset = _string(view, offset)
        strings.append(text)
    return strings, offset
