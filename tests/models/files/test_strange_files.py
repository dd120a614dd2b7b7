"""Files that are well-formed and strange: sizes that no file keeps, no memory, and FIFOs where files are expected."""

import errno
import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from ppo_jax.cli.main import FAILED, exit_code
from ppo_jax.cli.serve.server import read_token as read_server_token
from ppo_jax.cli.serve.settings import ServeSettings
from ppo_jax.data.jsonl import read_jsonl, repair_jsonl
from ppo_jax.data.lines import read_lines
from ppo_jax.models.files import artifacts, gguf, hf, tokenizer
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.rewards.options import RewardOptions, read_token
from ppo_jax.runs.output import config, rundir
from tests.data.tokenizer import make_tokenizer
from tests.models.files.test_gguf import fields_of, tensors_of, write
from tests.models.tiny import CONFIG, random_params

HUGE = 2**31 - 1
PARAMS = random_params(CONFIG)
BASE = artifacts.Base("base", "0" * 64, CONFIG)
FIELDS, TENSORS = fields_of(CONFIG), tensors_of(CONFIG, PARAMS)
ROPE = {"rope_freqs.weight": np.ones(4, np.float32)}
MORE = ("llama.rope.scaling.original_context_length", "llama.expert_count", "general.alignment")
SIZES = [
    *([name] for name, value in FIELDS.items() if isinstance(value, int)),
    *([name] for name in MORE),
    ["llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"],
]
LARGEST_PEAK = 8 * 2**20


def peak_of(run: Callable[[], object]) -> int:
    """Bytes at most allocated by Python and numpy while it runs, or fails by ValueError."""
    tracemalloc.start()
    try:
        run()
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("fields", SIZES, ids=",".join)
def test_a_gguf_that_claims_gigabytes_allocates_nothing(tmp_path: Path, fields: list[str], rope: bool) -> None:
    """The sizes that a header claims are compared with the tensors first, one by one and those that must agree."""
    path = write(tmp_path / "m.gguf", FIELDS | dict.fromkeys(fields, HUGE), TENSORS | (ROPE if rope else {}))
    assert peak_of(lambda: hf.load(path)) < LARGEST_PEAK
    assert peak_of(lambda: tokenizer.load_tokenizer(path)) < LARGEST_PEAK


def test_rope_factors_are_compared_before_they_are_expanded(tmp_path: Path) -> None:
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    path = write(tmp_path / "a.gguf", FIELDS | {f"llama.{name}": HUGE - 1 for name in names}, TENSORS | ROPE)
    with pytest.raises(ValueError, match=r"rope_freqs.weight has shape \(4,\), heads of width 2147483646 imply"):
        hf.load(path)
    path = write(
        tmp_path / "b.gguf", FIELDS, TENSORS | {"rope_freqs.weight": np.ones(gguf.LARGEST_ROPE + 1, np.float32)}
    )
    with pytest.raises(ValueError, match="at most 65536 values are read"):
        hf.load(path)


def test_a_config_that_claims_gigabytes_allocates_nothing(tmp_path: Path) -> None:
    hf.save(tmp_path, CONFIG, PARAMS, make_tokenizer())
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    for name, value in good.items():
        if isinstance(value, int) and not isinstance(value, bool):
            file.write_text(json.dumps(good | {name: HUGE}))
            assert peak_of(lambda: hf.load(tmp_path)) < LARGEST_PEAK, name


def test_an_adapter_that_claims_gigabytes_allocates_nothing(tmp_path: Path) -> None:
    artifacts.save(tmp_path / "a", "policy", {}, {}, BASE)
    file = tmp_path / "a" / artifacts.DESCRIPTION
    good = json.loads(file.read_text())
    sizes = [name for name, value in good["model"].items() if isinstance(value, int) and not isinstance(value, bool)]
    assert "hidden_size" in sizes

    def use() -> None:
        artifacts.check_base(artifacts.load(tmp_path / "a"), BASE.fingerprint, CONFIG)

    for changed in [{"layers": HUGE}, *({"model": good["model"] | {name: HUGE}} for name in sizes)]:
        file.write_text(json.dumps(good | changed))
        assert peak_of(use) < LARGEST_PEAK, changed


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), OSError(errno.ENOMEM, "Cannot allocate memory"), OSError("cannot load the tokenizer")],
)
def test_no_memory_is_not_a_damaged_file(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also where a library wraps it; the command says so, and that is no mistake in what was given."""
    make_tokenizer().save_pretrained(tmp_path)
    if error.args == ("cannot load the tokenizer",):
        error.__context__ = MemoryError()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    assert exit_code("ppo-jax", lambda: tokenizer.load_tokenizer(tmp_path)) == FAILED
    said = capsys.readouterr().err
    assert "out of memory" in said and "cannot be read" not in said


@pytest.mark.parametrize("module", [hf, artifacts])
def test_no_memory_for_weights_is_not_a_damaged_file(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    hf.save(tmp_path / "m", CONFIG, PARAMS)
    artifacts.save(tmp_path / "a", "policy", {}, {}, BASE)
    monkeypatch.setattr(module, "safe_open", fail)
    with pytest.raises(MemoryError):
        hf.load(tmp_path / "m") if module is hf else artifacts.load(tmp_path / "a")


FIFOS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a GGUF file": ("m.gguf", hf.load),
    "a GGUF file's tokenizer": ("m.gguf", tokenizer.load_tokenizer),
    "a GGUF file's sum": ("m.gguf", fingerprint_of),
    "config.json": ("config.json", lambda path: hf.load(path.parent)),
    "generation_config.json": ("generation_config.json", lambda path: hf.load(path.parent)),
    "weights": ("model.safetensors", lambda path: hf.load(path.parent)),
    "tokenizer.json": ("tokenizer.json", lambda path: tokenizer.load_tokenizer(path.parent)),
    "a tokenizer's other file": ("special_tokens_map.json", lambda path: tokenizer.load_tokenizer(path.parent)),
    "an adapter": (artifacts.DESCRIPTION, lambda path: artifacts.load(path.parent)),
    "prompts": ("prompts.jsonl", lambda path: list(read_lines(path))),
    "metrics": ("metrics.jsonl", read_jsonl),
    "metrics of a resumed run": ("metrics.jsonl", repair_jsonl),
    "a summary": (rundir.SUMMARY, lambda path: rundir.read_summary(path.parent)),
    "a configuration": ("config.yaml", lambda path: config.load(RewardOptions, path)),
    "a token": ("token", lambda path: read_token(RewardOptions(token_file=path))),
    "the server's token": ("token", lambda path: read_server_token(ServeSettings(Path("r"), token_file=path))),
}  # fmt: skip


@pytest.mark.parametrize("what", FIFOS)
def test_a_fifo_where_a_file_is_expected_is_an_error_at_once(what: str, tmp_path: Path) -> None:
    name, read = FIFOS[what]
    hf.save(tmp_path / "m", CONFIG, PARAMS, make_tokenizer())
    path = tmp_path / "m" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            read(path)
            ended.append(None)
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    if not ended:  # let it go: a writer comes and goes
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    assert ended, "it waits for a writer"
    if what != "generation_config.json":  # which may be absent
        assert isinstance(ended[0], ValueError | FileNotFoundError | NotADirectoryError), ended
