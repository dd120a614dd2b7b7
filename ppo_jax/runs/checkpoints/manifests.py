"""What a checkpoint says of its arrays, {path: shape, dtype or kind of key, sums}, and what of it may be believed.

A manifest is a foreign file's claim until the arrays are read: an array is read only where what is stored has the shape
and dtype that the manifest names, and those are what the reader has asked for.
"""

import json
import re
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.types import PyTree

Manifest = dict[str, dict[str, Any]]
_DTYPE = re.compile(r"(bool|u?int\d{1,2}|b?float\d{1,2}(_\w{1,12})?|complex\d{2,3})")
_BOUNDS = re.compile(r"(\d{1,15}:\d{1,15}(,\d{1,15}:\d{1,15})*)?")  # of a piece: "0:4,8:16"
WORDS = 8  # a typed key is stored as at most so many 32-bit words


def flatten(tree: PyTree) -> dict[str, Any]:
    """{path: leaf} in the tree's order; a path reads `params.layers.q`."""
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator=".") or "state", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    leaves = dict(pairs)
    if len(leaves) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two leaves share a path: {sorted({name for name in names if names.count(name) > 1})}")
    return leaves


def is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", np.dtype(float)), jax.dtypes.prng_key)


def key_impl(leaf: Any) -> Any:
    """The implementation's name (`threefry2x32`), of a concrete key: the leaf may be abstract."""
    return jax.random.key_impl(jnp.zeros((), leaf.dtype))


def describe(leaf: Any) -> dict[str, Any]:
    if is_key(leaf):
        return {"shape": list(leaf.shape), "dtype": f"key<{key_impl(leaf)}>"}
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def document_sum(document: Mapping[str, Any]) -> int:
    """Of everything in the document but the sum itself."""
    rest = {name: value for name, value in document.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def storable(leaf: Any) -> Any:
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def compare(saved: Manifest, wanted: Manifest) -> list[str]:
    """One line for each leaf that is not the same in both, by path."""

    def text(entry: dict[str, Any]) -> str:
        return f"{entry['dtype']}{entry['shape']}"

    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in saved:
            lines.append(f"{path}: missing in the checkpoint, the state has {text(wanted[path])}")
        elif path not in wanted:
            lines.append(f"{path}: {text(saved[path])} in the checkpoint, not in the state")
        elif text(saved[path]) != text(wanted[path]):
            lines.append(f"{path}: {text(saved[path])} in the checkpoint, {text(wanted[path])} in the state")
    return lines


def malformed(manifest: object) -> str | None:
    """What is wrong with the form of a manifest, if anything: each entry has a shape and the name of a dtype."""
    if not isinstance(manifest, dict):
        return f"its manifest is a {type(manifest).__name__}"
    for name, entry in manifest.items():
        shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)):
            return f"the shape of {name[:60]!r} in its manifest is {str(shape)[:60]}"
        if not isinstance(dtype, str) or _itemsize(dtype) is None:
            return f"the dtype of {name[:60]!r} in its manifest is {str(dtype)[:60]}"
        if not _are_sums(entry, len(shape) + dtype.startswith("key<")):
            return f"the sums of {name[:60]!r} in its manifest are no CRC-32 of it or of its pieces"
    return None


def _are_sums(entry: Mapping[str, Any], axes: int) -> bool:
    """Whether what an entry says besides shape and dtype has the form of `checksums.Sums`."""
    pieces = entry.get("pieces", {})
    return (
        type(entry.get("crc32", 0)) is int
        and isinstance(pieces, dict)
        and all(type(total) is int for total in pieces.values())
        and all(_BOUNDS.fullmatch(bounds) and bounds.count(":") == axes for bounds in pieces)
    )


def other_than_stored(manifest: Manifest, stored: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """One line for each of `names` that is not stored with the shape and dtype which the manifest names.

    Args:
      stored: {name: with .shape and .dtype}, from the arrays' own headers.
    """
    lines = []
    for name in names:
        shape, dtype = manifest[name]["shape"], manifest[name]["dtype"]
        if name not in stored:
            lines.append(f"{name} is not stored")
            continue
        found, kind = list(stored[name].shape), str(np.dtype(stored[name].dtype))
        fits = found == shape and kind == dtype
        if dtype.startswith("key<"):
            fits = found[:-1] == shape and len(found) == len(shape) + 1 and found[-1] <= WORDS and kind == "uint32"
        if not fits:
            lines.append(f"{name} is stored as {kind}{found}, but saved as {dtype}{shape}")
    return lines


def _itemsize(dtype: str) -> int | None:
    if dtype.startswith("key<"):
        return 4 * WORDS
    if not _DTYPE.fullmatch(dtype):  # numpy's parser of such names takes more, and Python's literals too
        return None
    try:
        return jnp.dtype(dtype).itemsize
    except TypeError:
        return None
