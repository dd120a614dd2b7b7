"""A model's tokenizer: loaded, checked against the vocabulary, and saved."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppo_jax.data.disk import is_out_of_memory
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.files import gguf_tokenizer, peft_reading
from ppo_jax.models.files.hub import read_json, resolve, write_json


def load_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer of a Hugging Face directory, a `.gguf` file or a name on the hub."""
    where = resolve(path)
    if where.suffix == ".gguf":
        return gguf_tokenizer.load_tokenizer(where)
    from transformers import AutoTokenizer  # slow to import, and not needed to load weights

    if peft_reading.is_adapter(where) and not (where / "tokenizer_config.json").is_file():
        return load_tokenizer(peft_reading.base_of(where))
    if not where.is_dir() or not any((where / f).is_file() for f in ("tokenizer_config.json", "tokenizer.json")):
        raise FileNotFoundError(f"{where} has no tokenizer.json or tokenizer_config.json")
    for file in where.iterdir():
        if not (file.is_file() or file.is_dir()) and file.exists():
            raise ValueError(f"{file} is a FIFO, a device or a socket, not a file of a tokenizer; remove it")
    # transformers and tokenizers raise whatever a damaged file leads them to, and some only in use. A file that asks
    # for Python code of its own is refused: left open, transformers would ask at the terminal.
    with _library_errors(where):
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        tokenizer.decode(list(tokenizer("a")["input_ids"]))
        wrong = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if not isinstance(i, int | None)]
        if wrong or not tokenizer.get_vocab():
            raise TypeError("it has no tokens" if not wrong else f"{wrong[0]!r} is not a token id")
    return tokenizer


@contextlib.contextmanager
def _library_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust side is no Exception
        if is_out_of_memory(error):
            raise MemoryError(f"while the tokenizer of {where} was read") from error
        raise ValueError(f"{where}: the tokenizer cannot be read ({type(error).__name__}: {error})") from error


def check_vocabulary(config: ModelConfig, tokenizer: Any) -> None:
    """Raises ValueError when the tokenizer has an id for which the model has no embedding.

    Many embeddings without a token (more than 512 and 5 %; a few pad the table to a round size) are a warning: the
    tokenizer is probably another model's, and every prompt would mean something else.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    unused = config.vocab_size - largest - 1
    if unused > max(512, 0.05 * config.vocab_size):
        warnings.warn(
            f"the tokenizer has {largest + 1} tokens, but the model's vocab_size is {config.vocab_size}: {unused} "
            "embeddings have no token. Is this the tokenizer that belongs to the model?",
            stacklevel=2,
        )
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer's token {token!r} has id {largest}, but the model's vocab_size is {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )


def rows_without_token(vocab_size: int, tokenizer: Any) -> tuple[tuple[int, int], ...]:
    """Find the ranges [start, stop) of ids below `vocab_size` for which the tokenizer has no token.

    Models round their tables up: Qwen2.5 has 151,936 rows for 151,665 tokens.
    """
    known = set(tokenizer.get_vocab().values())
    rows = [i for i in range(vocab_size) if i not in known and not _token_of(i, tokenizer)]
    starts = [row for place, row in enumerate(rows) if not place or rows[place - 1] != row - 1]
    stops = [row + 1 for place, row in enumerate(rows) if place == len(rows) - 1 or rows[place + 1] != row + 1]
    return tuple(zip(starts, stops, strict=True))


def _token_of(token_id: int, tokenizer: Any) -> str | None:
    """Look up an id that the vocabulary does not list, which leaves out those that share a text."""
    try:
        return tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, ValueError):  # of tokenizers that are no table
        return None


def save_tokenizer(where: Path, tokenizer: Any) -> None:
    """Writes a transformers tokenizer with its chat template, for transformers 4 and 5."""
    tokenizer.save_pretrained(where)
    # transformers 5 writes a class name that version 4 does not know; both know this one, its old name.
    file = where / "tokenizer_config.json"
    if (content := read_json(file)).get("tokenizer_class") == "TokenizersBackend":
        write_json(file, content | {"tokenizer_class": "PreTrainedTokenizerFast"})
