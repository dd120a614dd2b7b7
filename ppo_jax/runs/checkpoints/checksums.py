"""CRC-32 sums of arrays, also of those that are spread over several processes: one sum for every piece of such."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Sums = dict[str, Any]  # {"crc32": of the whole array}, or {"pieces": {bounds: CRC-32 of that part}}


def array_sum(array: Any) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def sums(arrays: Mapping[str, Any]) -> dict[str, Sums]:
    """The sums of each array. Collective where an array is spread over several processes."""
    spread = {name: array for name, array in arrays.items() if _spread(array)}
    found: dict[str, Sums] = {name: {"crc32": array_sum(x)} for name, x in arrays.items() if name not in spread}
    places = {place: number for number, place in enumerate((n, b) for n, x in spread.items() for b in _all_bounds(x))}
    if not places:
        return found
    own = np.zeros(len(places), np.uint32)  # of the pieces whose first copy is here
    for name, array in spread.items():
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                own[places[name, _bounds(shard.index, array.shape)]] = array_sum(shard.data)
    every = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, len(places)).max(axis=0)
    for (name, bounds), total in zip(places, every, strict=True):
        found.setdefault(name, {"pieces": {}})["pieces"][bounds] = int(total)
    return found


def changed(
    saved: Mapping[str, Sums], arrays: Mapping[str, Any], read: Callable[[Sequence[str]], Mapping[str, Any]]
) -> list[str]:
    """The names of arrays that are not those whose sums were saved, as far as this process looks. Not collective.

    A process looks at what it holds. Where that cannot be compared, since an array is spread otherwise than it was
    saved, one of the processes reads all of it (`read`), another array each in turn.
    """
    wrong, unclear = [], []
    for name, array in arrays.items():
        entry = saved[name]
        if not _spread(array):
            wrong += [name] * (not _whole(entry, array))
            continue
        pieces = entry.get("pieces", {})
        if set(_all_bounds(array)) <= pieces.keys():
            held = {_bounds(shard.index, array.shape): shard.data for shard in array.addressable_shards}
            wrong += [name] * any(array_sum(data) != pieces[bounds] for bounds, data in held.items())
        elif pieces or "crc32" in entry:
            unclear.append(name)
    for name in sorted(unclear)[jax.process_index() :: jax.process_count()]:
        wrong += [name] * (not _whole(saved[name], read([name])[name]))
    return sorted(wrong)


def _spread(array: Any) -> bool:
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def _whole(entry: Mapping[str, Any], array: Any) -> bool:
    """Whether all of an array is what the entry says; an entry without sums says nothing."""
    array = np.asarray(array)
    if "crc32" in entry and array_sum(array) != entry["crc32"]:
        return False
    pieces = entry.get("pieces", {})
    return all(array_sum(array[_index(bounds)]) == total for bounds, total in pieces.items())


def _all_bounds(array: jax.Array) -> list[str]:
    return sorted({_bounds(index, array.shape) for index in array.sharding.devices_indices_map(array.shape).values()})


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> str:
    """ "0:4,8:16" for the slices of a piece; "" for a scalar."""
    return ",".join("{}:{}".format(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _index(bounds: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, part.split(":"))) for part in bounds.split(",") if part)
