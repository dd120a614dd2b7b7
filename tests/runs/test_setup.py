"""The text of a response: what stands behind the prompt, whatever a tokenizer does at the beginning of a text."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppo_jax.models.pretrained import Model
from ppo_jax.rollout import Sampling
from ppo_jax.runs.setup import missing_stop, with_stops
from ppo_jax.train.host import response_texts
from tests.data.tokenizer import make_tokenizer
from tests.models.tiny import CONFIG

PIECES = [
    "<s>",
    "</s>",
    "<unk>",
    "\u2581",
    "\u2581a",
    "\u2581film",
    "\u2581is",
    "n't",
    "s",
    "\u2581.",
    ".",
    "\n",
    "a",
    "is",
]
STRIPPING = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def pieces(decoder: Any, clean_up: bool = False) -> Any:
    """A tokenizer of these pieces; each "\u2581" is a space."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=clean_up
    )


def model(tokenizer: Any) -> Model:
    return Model("tiny", CONFIG, {}, tokenizer, "0" * 64)


def text(ids: list[int]) -> str:
    """By hand: the pieces one behind the other, special ones left out."""
    return "".join(PIECES[i].replace("\u2581", " ") for i in ids if i > 2)


TOKENIZERS = {
    "metaspace": pieces(decoders.Metaspace()),
    "strip": pieces(decoders.Sequence(STRIPPING)),
    "cleaned up": pieces(decoders.Sequence(STRIPPING), clean_up=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(ids=st.lists(st.sampled_from([1, *range(3, len(PIECES))]), max_size=8))
def test_a_response_is_what_its_tokens_say(name: str, ids: list[int]) -> None:
    """Spaces at its beginning, in front of a stop and of n't stay: with the prompt it is the text of all tokens."""
    assert model(TOKENIZERS[name]).decode(np.array(ids, np.int32)) == text(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(ids=st.lists(st.sampled_from([0, 1, *range(3, len(PIECES))]), max_size=8))
def test_special_tokens_stay_where_they_are_asked_for(name: str, ids: list[int]) -> None:
    whole = "".join(PIECES[i].replace("\u2581", " ") for i in ids)
    assert model(TOKENIZERS[name]).decode(np.array(ids, np.int32), special=True) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_responses_of_a_rollout(name: str) -> None:
    film, is_, stop, end = (PIECES.index(piece) for piece in ("\u2581film", "\u2581is", "\u2581.", "</s>"))
    tokens, mask = np.array([[0, 4, film, is_, stop, end]]), np.array([[True] * 4])
    found = response_texts(tokens, mask, model(TOKENIZERS[name]).decode, (end,))
    assert found == [" film is ."]


def test_a_tokenizer_without_a_decoder_is_read_as_it_is() -> None:
    assert model(make_tokenizer()).decode(np.array([2, 3, 1])) == "a b"


def test_stop_ids_add_to_the_models_unless_they_are_to_replace_them() -> None:
    base = model(make_tokenizer())
    base = base._replace(config=dataclasses.replace(CONFIG, eos_token_ids=(7, 9), tokenless=((38, 40),)))
    own = base.stop_ids
    assert set(own) > {7, 9}, "the tokenizer's too"
    assert with_stops(Sampling(), base).stop_ids == own
    assert with_stops(Sampling(stop_ids=(11, 7)), base).stop_ids == tuple(sorted({11, *own}))
    assert with_stops(Sampling(stop_ids=(11,), model_stops=False), base).stop_ids == (11,)
    # What a checkpoint is compared by: the tokens, not the way to them.
    assert with_stops(Sampling(stop_ids=(11, *own), model_stops=False), base).model_stops
    assert missing_stop(with_stops(Sampling(), base), base) == ""


def test_a_model_that_nothing_stops_is_told_of() -> None:
    base = model(make_tokenizer())
    base = base._replace(config=dataclasses.replace(CONFIG, tokenless=((38, 40),)))
    said = missing_stop(Sampling(response_length=5), base)
    assert "no token ends a response" in said and "all 5 tokens" in said and "stop-ids" in said
    assert "no token ends a response" in missing_stop(Sampling(stop_ids=(38, 39)), base)
    assert missing_stop(Sampling(stop_ids=(3, 39)), base) == "stop_ids [39] are no tokens of tiny and are never drawn"
    assert missing_stop(Sampling(stop_ids=(3,)), base) == ""
