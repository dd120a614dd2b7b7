"""Prompt and answer as one row of tokens: the seam, worked out by hand on tokenizers of several kinds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.data import PairRecord, SFTRecord, encode_pairs, encode_prompts, encode_sft
from ppo_jax.data.encode import encode_choices, encode_ratings
from ppo_jax.data.records import ChoiceRecord, RatingRecord
from ppo_jax.data.tokens import continuation, token_rows, tokenise
from ppo_jax.rewards.loading import Scorer
from tests.data.subwords import KINDS, make_subwords, pieces
from tests.data.tokenizer import make_tokenizer

TOKENIZERS = {kind: make_subwords(kind) for kind in KINDS} | {"characters": make_tokenizer()}
ASK = [{"role": "user", "content": "a"}]


def seam(kind: str, before: str, after: str) -> tuple[list[str], list[str]]:
    """The pieces on both sides of the seam."""
    tokenizer = TOKENIZERS[kind]
    ((row, start),) = token_rows([(before, after)], tokenizer)
    return pieces(tokenizer, row[:start]), pieces(tokenizer, row[start:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_the_whole_text_where_they_do_not_cross_the_seam(kind: str) -> None:
    front = ["the"] if kind == "bytes" else ["_the"]
    assert seam(kind, "the", " river is") == (front, ["_river", "_is"])
    assert seam(kind, "the", "\nri") == (front, ["/", "ri"])


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_token_would_cross_it_the_prompt_keeps_its_own(kind: str) -> None:
    """ "the ri" is [the][ri] and "the river" is [the][river]: the policy can only go on behind [ri], by [ver]."""
    front = ["the"] if kind == "bytes" else ["_the"]
    assert seam(kind, "the ri", "ver is") == ([*front, "_ri"], ["ver", "_is"])
    assert seam(kind, "the ", "river") == ([*front, "_"], ["ri", "ver"])  # no "_river": its blank is the prompt's


@pytest.mark.parametrize("kind", ["blank", "first"])
def test_no_blank_is_put_before_an_answer(kind: str) -> None:
    """What tokenising it apart did: "the ri" + "ver" became "the ri ver"."""
    tokenizer = TOKENIZERS[kind]
    assert pieces(tokenizer, tokenise(["ver"], tokenizer)[0]) == ["_", "ver"]
    assert pieces(tokenizer, continuation("ver", tokenizer)) == ["ver"]
    assert pieces(tokenizer, continuation(" is", tokenizer)) == ["_is"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_behind_a_template_that_ends_in_a_line_break(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    row = encode_sft([SFTRecord(ASK, "ri", "f:1")], tokenizer, 99)
    assert pieces(tokenizer, row.rows[0][row.starts[0] - 1 :]) == ["/", "ri", "</s>"]


@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.text("theriv \n", max_size=7),
    st.text("theriv s\n", max_size=7),
)
def test_a_row_says_the_text_and_begins_with_the_prompt(kind: str, before: str, after: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ((row, start),) = token_rows([(before, after)], tokenizer)
    assert row[:start] == tokenise([before], tokenizer)[0]
    assert tokenizer.decode(row) == tokenizer.decode(tokenise([before + after], tokenizer)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages_make_the_same_row(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    eos = tokenizer.eos_token_id
    for prompt, response in (("the ri", "ver"), ("the", " river"), (ASK, "ri")):
        asked = encode_prompts([prompt], tokenizer, 99).rows[0]
        sft = encode_sft([SFTRecord(prompt, response, "")], tokenizer, 99)
        bare = sft.rows[0][:-1]
        assert sft.rows[0][-1] == eos and bare[: sft.starts[0]] == asked
        for end in (True, False):
            pair = encode_pairs([PairRecord(prompt, response, "a", 0.0, "")], tokenizer, 99, eos=end)
            assert pair.chosen[0] == bare + [eos] * end and pair.starts[0][0] == len(asked)
        assert encode_ratings([RatingRecord(prompt, response, 1.0, "")], tokenizer, 99).rows == [bare]
        assert encode_choices([ChoiceRecord(prompt, [response, "a"], 0, "")], tokenizer, 99).groups[0][0] == bare
        if isinstance(prompt, str):
            scorer = Scorer("", tokenizer, [], 99, lambda rows: rows, {}, (eos,))
            assert scorer.encode([prompt], [response]) == [bare]
