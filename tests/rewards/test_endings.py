"""Long texts: only their end is tokenised, and the tokens that are read are those of the whole text."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ppo_jax.data.tokens import token_rows
from ppo_jax.rewards.endings import MARGIN, cut_sides, end_rows, longest_token
from ppo_jax.rewards.loading import Scorer
from tests.data.tokenizer import make_tokenizer

WORDS = ["the", "river", "is", "lovely,", "dull.", "a", "café", "漢字かな", "12345", "x\n", "don't", "(and)", "\n\n"]


def text(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def trained(pieces: Any, decoder: Any) -> Any:
    """A byte-pair tokenizer of 400 tokens, some of several letters, trained on the words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pieces, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(np.random.default_rng(0), 2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = {
    "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "sentences": (pre_tokenizers.Metaspace(), decoders.Metaspace()),  # puts a blank before every text
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_has_the_tokens_of_the_whole(kind: str) -> None:
    """Cut in the prompt or in the response, few tokens or many wanted."""
    tokenizer, rng = trained(*KINDS[kind]), np.random.default_rng(1)
    longest, sizes = longest_token(tokenizer), [(0, 900), (900, 0), (800, 30), (30, 800), (3, 2), (0, 0), (400, 400)]
    sides = [(text(rng, before), text(rng, after)) for before, after in sizes * 4]
    lengths = [int(n) for n in rng.integers(1, 120, len(sides))]
    found = end_rows(sides, tokenizer, lengths, longest, list)
    for (whole, _), end, length in zip(token_rows(sides, tokenizer), found, lengths, strict=True):
        assert end[-length:] == whole[-length:]
        assert len(end) == len(whole) if len(whole) < length else len(end) <= len(whole)


def test_what_is_tokenised_is_bounded_by_what_is_wanted_whatever_the_text() -> None:
    """Letters of a token each, or end tokens only, which count for nothing: at most the longest token for each."""
    tokenizer, seen = make_tokenizer(), []

    def counting(texts: list[str], **options: Any) -> Any:
        seen.append(sum(map(len, texts)))
        return tokenizer(texts, **options)

    scorer = Scorer(
        "plain", counting, [], 20, lambda rows: np.zeros(len(rows)), {}, (1,), longest=longest_token(tokenizer)
    )
    assert scorer.longest == 4
    assert scorer.encode([""], ["abc" * 10**6]) == [tokenizer("abc" * 7)["input_ids"][-20:]]
    assert scorer.encode(["abc" * 10**6], ["</s>" * 10**6]) == [[]]
    assert sum(seen) <= 2 * 2 * 4 * (20 + MARGIN)
    assert scorer.encode(["abc" * 10**6], ["</s>"]) == [tokenizer("abc" * 7)["input_ids"][-20:]]


@pytest.mark.parametrize(
    ("side", "chars", "cut"),
    [
        (("ab cd", " ef"), 8, ("ab cd", " ef")),
        (("ab cd", " ef"), 7, (" cd", " ef")),
        (("ab cd", " ef"), 6, (" cd", " ef")),
        (("abcdef", "gh"), 4, ("ef", "gh")),  # no word begins there
        (("ab", "cdef gh"), 6, ("", " gh")),
        (("ab", "cdefgh"), 6, ("", "cdefgh")),
        (("", "abc d e"), 3, ("", " e")),
        (("", "a" * 50 + " " + "b" * 40), 90, ("", "a" * 49 + " " + "b" * 40)),  # it is too far
    ],
)
def test_a_cut_text_begins_with_a_word_where_one_begins(side: tuple, chars: int, cut: tuple) -> None:
    assert cut_sides(side, chars) == cut
