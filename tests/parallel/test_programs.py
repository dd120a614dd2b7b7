"""The folder of compiled programs outlives processes that are killed while they write to it."""

from pathlib import Path

import pytest
from jax._src.lru_cache import LRUCache

from ppo_jax.parallel.programs import MOST_BYTES, drop_half_written


def make_folder(folder: Path) -> LRUCache:
    """Three programs, as JAX writes them."""
    cache = LRUCache(str(folder), max_size=MOST_BYTES)
    for name in "abc":
        cache.put(name, b"program " + name.encode())
    return cache


def test_programs_that_are_whole_stay(tmp_path: Path) -> None:
    cache = make_folder(tmp_path)
    drop_half_written(tmp_path)
    assert [cache.get(name) for name in "abc"] == [b"program a", b"program b", b"program c"]


@pytest.mark.parametrize("killed", ["before its time of use", "in its time of use", "no disk", "between deletions"])
def test_a_half_written_one_is_written_again(tmp_path: Path, killed: str) -> None:
    cache = make_folder(tmp_path)
    if killed == "before its time of use":
        (tmp_path / "b-atime").unlink()
        (tmp_path / "b-cache").write_bytes(b"prog")
        with pytest.raises(FileNotFoundError):  # what it is for: nothing more could be kept
            cache.put("d", b"program d")
    elif killed == "in its time of use":
        (tmp_path / "b-atime").write_bytes(b"")
    elif killed == "no disk":
        (tmp_path / "b-cache").write_bytes(b"")
    else:
        (tmp_path / "b-cache").unlink()
    drop_half_written(tmp_path)
    assert cache.get("b") is None and cache.get("a") == b"program a"
    cache.put("b", b"program b")
    cache.put("d", b"program d")
    assert cache.get("b") == b"program b" and cache.get("d") == b"program d"


def test_while_another_process_writes_nothing_is_deleted(tmp_path: Path) -> None:
    cache = make_folder(tmp_path)
    (tmp_path / "b-atime").unlink()
    with cache.lock:
        drop_half_written(tmp_path)
    assert cache.get("b") == b"program b"


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    drop_half_written(tmp_path / "programs")
    assert not (tmp_path / "programs").exists()
