"""GGUF files at random: bytes of the header, values of the metadata, and claims that no file can keep."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.models.files import gguf_container, hf
from ppo_jax.models.files.tokenizer import check_vocabulary, load_tokenizer
from tests.fuzz.inputs import damaged, outcome
from tests.models.files.test_gguf import fields_of, tensors_of, write
from tests.models.tiny import CONFIG, random_params

FIELDS, TENSORS = fields_of(CONFIG), tensors_of(CONFIG, random_params(CONFIG))
VALUES: list[Any] = [
    *(0, 1, -1, True, 2**31 - 1, 1.5, 1e-45, 1e308, float("nan"), float("inf"), "", "x", "\n", "{% for", "gpt-2"),
    *([1], ["a"], [1.0], ["a b", "c d"], ["a", "a"], ["", " "], [3, 3]),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "good.gguf", FIELDS, TENSORS)


@settings(max_examples=120)
@given(data=st.data())
def test_bytes(good: Path, data: st.DataObject) -> None:
    content = good.read_bytes()
    header = len(content) - sum(4 * int(np.prod(tensor.shape)) for tensor in TENSORS.values())
    path = good.with_name("bytes.gguf")
    path.write_bytes(data.draw(damaged(content, header)))
    outcome(lambda: hf.load(path), str(path))
    outcome(lambda: load_tokenizer(path), str(path))


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.sampled_from(VALUES), min_size=1, max_size=3))
def test_metadata(good: Path, changes: dict[str, Any]) -> None:
    path = good.with_name("fields.gguf")
    path.unlink(missing_ok=True)
    try:
        write(path, FIELDS | changes, TENSORS)
    except (ValueError, TypeError, struct.error, OverflowError, IndexError):  # the writer's own refusal
        return
    outcome(lambda: hf.load(path), str(path))
    tokenizer = outcome(lambda: load_tokenizer(path), str(path))
    if not isinstance(tokenizer, Exception):
        outcome(lambda: check_vocabulary(CONFIG, tokenizer))
        tokenizer.decode(tokenizer("ab")["input_ids"])


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (struct.pack("<QQ", 2**40, 0), "claims 1099511627776 tensors"),
        (struct.pack("<QQ", 0, 2**40), "claims 1099511627776 metadata fields"),
        (struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**40), "a string of 1099511627776 bytes"),
        (struct.pack("<QQ", 0, 1) + string(b"a") + struct.pack("<IIQ", 9, 0, 2**40), "an array of 1099511627776"),
        (
            struct.pack("<QQ", 0, 1) + string(b"a") + struct.pack("<IIQ", 9, 0, 2**23) + bytes(2**23),
            "an array of 8388608 values; at most 4194304",
        ),
        (struct.pack("<QQ", 0, 1) + string(bytes(2**24 + 1)), "a string of 16777217 bytes in the header; at most"),
        (
            struct.pack("<QQ", 1, 0) + string(b"w") + struct.pack("<IQIQ", 1, 2**40, 0, 0),
            "tensor 'w' ends beyond the end of the file",
        ),
    ],
)
def test_a_claim_of_a_terabyte_allocates_nothing(rest: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "claim.gguf"
    path.write_bytes(gguf_container.MAGIC + struct.pack("<I", 3) + rest + bytes(64))
    outcome(lambda: gguf_container.read(path))  # imports what it needs
    tracemalloc.start()
    with pytest.raises(ValueError, match=said):
        gguf_container.read(path)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_a_directory_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(ValueError, match="m.gguf: not a GGUF file but a directory"):
        hf.load(tmp_path / "m.gguf")
