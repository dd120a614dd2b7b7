"""What is claimed is not believed: checkpoints, data lines and replies of terabytes cost no memory, and are refused."""

import contextlib
import inspect
import json
import resource
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.data import read_pairs, read_prompts, read_sft
from ppo_jax.data.disk import parse_json
from ppo_jax.data.jsonl import read_jsonl
from ppo_jax.runs.checkpoints import manifests
from ppo_jax.runs.checkpoints import store as checkpoint
from tests.checkpoints import read_arrays
from tests.fuzz.inputs import hostile, mutated, outcome, to_json
from tests.rewards import faulty_server as faulty
from tests.rewards.caller import Caller

MB = 10**6
TERABYTE = 10**12
STATE = {"w": jnp.arange(3000, dtype=jnp.float32).reshape(50, 60), "key": jax.random.key(3), "step": jnp.int32(2)}


@contextlib.contextmanager
def memory_below(limit: float) -> Iterator[None]:
    """Fails where more bytes than `limit` were held at once, by Python or (new peaks of the process) by anything."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 2 * limit + 100 * MB


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "good"
    with checkpoint.open_manager(path) as manager:
        checkpoint.save(manager, 2, STATE, {"facts": {"seed": 1}})
    return path


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def claim(path: Path, change: Callable[[dict], Any]) -> None:
    """Another description, with a sum that is right."""
    file = path / "2" / "meta" / "metadata"
    document = json.loads(file.read_text())
    change(document["manifest"])
    document["checksum"] = manifests.document_sum(document)
    file.write_text(json.dumps(document))


def store(path: Path, shape: list[int]) -> None:
    """Another header of the array `w`; without contents it takes no place."""
    base = {"driver": "ocdbt", "base": f"file://{path / '2' / 'arrays'}/"}
    values = tensorstore.KvStore.open(base).result()
    header = json.loads(values["w/.zarray"])
    values["w/.zarray"] = json.dumps(header | {"shape": shape, "chunks": [min(size, 1000) for size in shape]}).encode()


def test_a_manifest_that_claims_a_terabyte(path: Path) -> None:
    claim(path, lambda manifest: manifest["w"].update(shape=[TERABYTE // 4]))
    with (
        memory_below(20 * MB),
        pytest.raises(checkpoint.CheckpointError, match=r"2 does not fit the state:\n  w: float32\[250000000000\]"),
    ):
        checkpoint.restore(path, STATE)


def test_arrays_that_claim_a_terabyte(path: Path) -> None:
    store(path, [TERABYTE // 4 // 60, 60])
    with memory_below(20 * MB):
        for read in (lambda: checkpoint.restore(path, STATE), lambda: read_arrays(path, ["w"])):
            with pytest.raises(checkpoint.DamagedCheckpoint, match=r"w is stored as float32\[.*, 60\], but saved as"):
                read()


@pytest.mark.parametrize("name", ["meta/metadata", "arrays/_METADATA", "arrays/_sharding"])
def test_a_description_of_a_terabyte(path: Path, name: str) -> None:
    with (path / "2" / name).open("ab") as file:
        file.truncate(TERABYTE)  # takes no place either
    with memory_below(20 * MB), pytest.raises(checkpoint.DamagedCheckpoint, match=r"2: .* 1000000000000 bytes"):
        checkpoint.restore(path, STATE)


SUMS: dict[str, Any] = {
    "a list": [1],
    "nothing": None,
    "no bounds": {"a:b": 1},
    "of another array": {"0:1,0:1,0:1": 1},
    "of no axis": {"": 1},
    "half an axis": {"0:9" * 2000: 1},
    "5,000 digits": {"0:" + "9" * 5000 + ",0:60": 1},
    "a sum that is none": {"0:50,0:60": "x"},
    "another sum": {"0:50,0:60": 1},
    "out of the array": {"70:80,0:60": 1},
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_pieces_are_not_believed(path: Path, name: str) -> None:
    claim(path, lambda manifest: (manifest["w"].pop("crc32"), manifest["w"].update(pieces=SUMS[name])))
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"2: .*('w'|saved: w$)"):
        checkpoint.restore(path, STATE)


@pytest.mark.parametrize("depth", [101, 900, 991, 995, 10**6])
def test_a_description_of_nesting(path: Path, depth: int) -> None:
    nested = '{"format": 2, "checksum": 1, "manifest": {}, "meta": ' + "[" * depth + "]" * depth + "}"
    (path / "2" / "meta" / "metadata").write_text(nested)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="nested more than 100 deep"):
        checkpoint.restore(path, STATE)


def test_what_could_not_be_read_is_not_saved(tmp_path: Path) -> None:
    with checkpoint.open_manager(tmp_path) as manager:
        with pytest.raises(ValueError, match="at most 67108864 are read"):
            checkpoint.save(manager, 1, STATE, {"note": "a" * (1 << 26)})
        checkpoint.save(manager, 1, STATE)
    assert checkpoint.restore(tmp_path, STATE)[1] == 1


@settings(max_examples=100)
@given(data=st.data())
def test_any_manifest(saved: Path, data: st.DataObject) -> None:
    path = saved.with_name("claims")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(saved, path)
    file = path / "2" / "meta" / "metadata"
    document = json.loads(file.read_text())
    document["manifest"]["step"]["pieces"] = {"": document["manifest"]["step"].pop("crc32")}
    document["manifest"] = data.draw(mutated(document["manifest"]) | hostile)
    document = json.loads(to_json(document)) if plain(document) else document | {"manifest": [[]]}
    document["checksum"] = manifests.document_sum(document)
    file.write_bytes(to_json(document))
    found = outcome(lambda: checkpoint.restore(path, STATE), str(path))
    if not isinstance(found, Exception):
        np.testing.assert_array_equal(found[0]["w"], STATE["w"])
    outcome(lambda: checkpoint.read_manifest(path), str(path))


def plain(document: Any) -> bool:
    """Whether it comes back from JSON: integers of 400 digits do not."""
    with contextlib.suppress(ValueError):
        return json.loads(to_json(document)) is not None
    return False


@pytest.mark.parametrize("read", [read_prompts, read_pairs, read_sft])
@pytest.mark.parametrize("start", [b"", b'{"prompt": "', b'{"prompt": "a", "response": "b"}\n'])
def test_a_line_without_end(read: Callable, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(TERABYTE)
    with memory_below(100 * MB), pytest.raises(ValueError, match=rf"{path}:[12]: "):
        read(path)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"":', b'["]",'])
def test_a_file_of_nesting(opening: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(opening * (10 * MB // len(opening)) + b"\n{}\n")
    with memory_below(150 * MB):
        with pytest.raises(ValueError, match=f"{path}:1: not JSON .nested more than 100 deep"):
            read_prompts(path)
        with pytest.raises(ValueError, match=f"{path}, line 1: not a JSON object"):
            read_jsonl(path)


def test_a_line_of_one_long_string_costs_a_few_times_its_size(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"prompt": "a' + rb"\n" * (7 * MB) + b'"}\n')
    with memory_below(100 * MB):
        assert len(read_prompts(path)) == 1


@given(hostile)
def test_what_is_not_deep_is_read_as_by_the_parser(value: Any) -> None:
    text = to_json(value)
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            parse_json(text, finite=False)
        return
    found = [parse_json(given, finite=False) for given in (text, text.decode())]
    assert to_json(found[0]) == to_json(found[1]) == to_json(expected)


def test_strings_are_not_counted_and_the_depth_is() -> None:
    assert parse_json(r'["[[[[", "\"[[[", "\\\\", [{}]]', depth=3) == ["[[[[", '"[[[', "\\\\", [{}]]
    with pytest.raises(ValueError, match="nested more than 2 deep"):
        parse_json(r'["[[[[", "\"[[[", "\\\\", [{}]]', depth=2)
    for torn in ('["', '["\\', '"\\"', "]]]", ""):
        with pytest.raises(ValueError):
            parse_json(torn)


def test_the_callers_depth_does_not_matter() -> None:
    """Where few calls are left, a parser that goes down one per level cannot tell its own end from the caller's."""

    def deeper(left: int) -> Any:
        return deeper(left - 1) if left else parse_json("[" * 50_000)

    used = len(inspect.stack(0))
    for left in range(60, 200, 7):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            deeper(sys.getrecursionlimit() - used - left)


def head(*lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", "Content-Type: application/json", *lines, "", ""]).encode()


def flood(opening: bytes, piece: bytes) -> faulty.Fault:
    """A gigabyte at most, as fast as it is taken."""

    def fault(handler: faulty.Handler) -> None:
        handler.close_connection = True
        handler.wfile.write(opening)
        for _ in range(10**9 // len(piece)):
            if handler.server.over.is_set():
                break
            handler.wfile.write(piece)

    return fault


BLOCK = b" " * 65536
REPLIES = {
    "a claimed terabyte": (flood(head(f"Content-Length: {TERABYTE}"), BLOCK), "too large"),
    "chunks without end": (flood(head("Transfer-Encoding: chunked"), b"10000\r\n" + BLOCK + b"\r\n"), "too large"),
    "one chunk of a terabyte": (flood(head("Transfer-Encoding: chunked") + b"E8D4A51000\r\n", BLOCK), "too large"),
    "no length": (flood(head(), BLOCK), "too large"),
    "an error without end": (flood(head().replace(b"200 OK", b"400 No"), BLOCK), "HTTP 400"),
    "headers without end": (flood(b"HTTP/1.1 200 OK\r\n", b"X: " + b"x" * 60000 + b"\r\n"), "cannot be reached"),
    "a header line without end": (flood(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65536), "cannot be reached"),
    "nesting": (faulty.raw('{"scores":' * 3000), "not JSON"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_without_end_costs_its_rows_and_no_memory(name: str) -> None:
    fault, cause = REPLIES[name]
    with faulty.serving(always=fault) as server:
        caller = Caller(server.url, rows_per_request=6, retries=0)
        with memory_below(20 * MB):
            scores = caller()
        assert not scores.valid.any() and np.isnan(scores.reward).all()
        (counted,) = caller.log.counts
        assert cause in counted
