"""A model with its tokenizer, ready to use."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ppo_jax.data.chat import read_template, turn_end
from ppo_jax.models.config import ModelConfig, ModelOptions
from ppo_jax.models.files import hf
from ppo_jax.models.files.artifacts import Base
from ppo_jax.models.files.fingerprint import fingerprint_of
from ppo_jax.models.files.hub import resolve
from ppo_jax.models.files.tokenizer import check_vocabulary, load_tokenizer, rows_without_token
from ppo_jax.parallel.mesh import current_mesh
from ppo_jax.types import PyTree


class Model(NamedTuple):
    """A base model with its tokenizer."""

    name: str  # the path or hub name the user gave
    config: ModelConfig
    params: PyTree
    tokenizer: Any
    fingerprint: str  # of the weight files: adapters only fit the base they were trained on
    generation: Mapping[str, Any] = {}  # what generation_config.json says, for exports

    @property
    def base(self) -> Base:
        """What an artifact that is trained on it has to say of it."""
        return Base(self.name, self.fingerprint, self.config)

    @property
    def pad_id(self) -> int:
        """Fills empty slots; masks say which those are, so any id serves."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a response: the model's EOS ids, among them the chat template's, and the tokenizer's."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*self.config.eos_token_ids, *(() if own is None else (int(own),))}))

    def decode(self, ids: np.ndarray | jax.Array, special: bool = False) -> str:
        """Token ids of a response -> its text, by default without special tokens, as it stands behind the prompt's.

        Decoders of the SentencePiece kind drop the space before the first token of a text, and a response is not its
        beginning: prompt + response would be another text than the tokens say. So a token of known text goes first and
        is cut off again. (A tokenizer without a decoder only puts spaces between its tokens, and none before.)
        """
        read = partial(self.tokenizer.decode, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        row = [int(token) for token in np.asarray(ids)]
        if getattr(self.tokenizer, "is_fast", False) and self.tokenizer.backend_tokenizer.decoder is None:
            return str(read(row))
        guard = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        before, text = str(read(guard)), str(read([*guard, *row]))
        return text[len(before) :] if before and text.startswith(before) else str(read(row))


def load_model(path: str | Path, options: ModelOptions | None = None, template: Path | None = None) -> Model:
    """A base with its tokenizer from a Hugging Face directory, a .gguf file or a hub name, to be run as `options` say.

    Args:
      template: this file's chat template takes the place of the tokenizer's own.

    Raises ValueError or FileNotFoundError that name the file and what is wrong with it.
    """
    where = resolve(path)
    options = options or ModelOptions()
    config, params = hf.load(where, options.dtype, current_mesh(), options.quantise)
    tokenizer = load_tokenizer(where)
    if template is not None:
        tokenizer.chat_template = read_template(template, tokenizer)
    check_vocabulary(config, tokenizer)
    config = dataclasses.replace(config, tokenless=rows_without_token(config.vocab_size, tokenizer))
    end = turn_end(tokenizer)  # the chat template's may be no EOS of the model's files
    if end is not None and end not in config.eos_token_ids:
        config = dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, end))
    generation = hf.read_generation(where) if where.is_dir() else {}
    return Model(str(path), options.of(config), params, tokenizer, fingerprint_of(where), generation)
