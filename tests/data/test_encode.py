"""Token rows, worked out by hand on a tokenizer with one token per character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax.data import PairRecord, SFTRecord, encode_pairs, encode_prompts, encode_sft, render
from tests.data.tokenizer import BOS, EOS, ids, make_tokenizer

CHAT = [{"role": "user", "content": "hi"}]
# What the template of the test tokenizer makes of CHAT: one turn, then the head of the answer.
CHAT_IDS = [BOS, *ids("user: hi"), EOS, BOS, *ids("assistant: ")]


def test_render() -> None:
    assert render(CHAT, make_tokenizer()) == "<s>user: hi</s><s>assistant: "
    assert render(CHAT, make_tokenizer(), add_generation_prompt=False) == "<s>user: hi</s>"
    assert render("hi", make_tokenizer(chat=False)) == "hi"
    with pytest.raises(ValueError, match="p.jsonl:3: these are chat messages, but the tokenizer has no chat template"):
        render(CHAT, make_tokenizer(chat=False), "p.jsonl:3")
    with pytest.raises(ValueError, match="p.jsonl:3: .* refuses these messages: no system messages"):
        render([{"role": "system", "content": "a"}], make_tokenizer(), "p.jsonl:3")


@pytest.mark.parametrize("bos", [False, True])
def test_prompts(bos: bool) -> None:
    encoded = encode_prompts(["ab", CHAT], make_tokenizer(bos), 100)
    # Plain text gets the tokenizer's BOS; a rendered chat has its own and gets no second one.
    assert encoded.rows == [[BOS] * bos + ids("ab"), CHAT_IDS]
    assert (encoded.kept, encoded.too_long) == ([0, 1], 0)


def test_too_long_prompts() -> None:
    texts, tokenizer = ["abc", "abcd", "abcdef", "a"], make_tokenizer(bos=True)
    with pytest.raises(ValueError) as error:
        encode_prompts(texts, tokenizer, 4, where=["p:1", "p:2", "p:3", "p:4"])
    assert "2 of 4 texts are longer than 4 tokens; the longest has 7 (p:3)" in str(error.value)

    cut = encode_prompts(texts, tokenizer, 4, "truncate_left")
    assert cut.rows == [[BOS, *ids(text)] for text in ("abc", "bcd", "def", "a")]
    assert (cut.kept, cut.too_long) == ([0, 1, 2, 3], 2)

    without_bos = encode_prompts(texts, make_tokenizer(), 3, "truncate_left")
    assert without_bos.rows == [ids(text) for text in ("abc", "bcd", "def", "a")]

    dropped = encode_prompts(texts, tokenizer, 4, "drop")
    assert dropped.rows == [[BOS, *ids("abc")], [BOS, *ids("a")]]
    assert (dropped.kept, dropped.too_long) == ([0, 3], 2)
    with pytest.raises(ValueError, match="no text is left: all 1 are longer than 4"):
        encode_prompts(["abcdef"], tokenizer, 4, "drop")
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        encode_prompts(texts, tokenizer, 1)
    with pytest.raises(ValueError, match="prompt 1: the prompt has no tokens"):
        encode_prompts(["a", ""], tokenizer, 4)


def test_sft() -> None:
    records = [
        SFTRecord("ab", " c", "f:1"),
        SFTRecord(CHAT, "c", "f:2"),
        SFTRecord(None, "abc", "f:3"),
    ]
    encoded = encode_sft(records, make_tokenizer(bos=True), 100)
    assert encoded.rows == [[BOS, *ids("ab c"), EOS], [*CHAT_IDS, *ids("c"), EOS], [BOS, *ids("abc"), EOS]]
    assert [row[start:] for row, start in zip(encoded.rows, encoded.starts, strict=True)] == [
        [*ids(" c"), EOS],
        [*ids("c"), EOS],
        [*ids("abc"), EOS],
    ]


def test_sft_continues_a_prompt_of_the_rollout() -> None:
    # The row begins with exactly what `encode_prompts` gives the policy to continue.
    tokenizer = make_tokenizer(bos=True)
    for prompt in ("ab", CHAT):
        sft = encode_sft([SFTRecord(prompt, "c", "f:1")], tokenizer, 100)
        assert sft.rows[0][: sft.starts[0]] == encode_prompts([prompt], tokenizer, 100).rows[0]


def test_too_long_sft() -> None:
    records, tokenizer = [SFTRecord("abcd", "ef", "f:1"), SFTRecord("a", "b", "f:2")], make_tokenizer(bos=True)
    with pytest.raises(ValueError, match=r"1 of 2 texts are longer than 6 tokens; the longest has 8 \(f:1\)"):
        encode_sft(records, tokenizer, 6)
    cut = encode_sft(records, tokenizer, 6, "truncate_left")
    assert cut.rows == [[BOS, *ids("cdef"), EOS], [BOS, *ids("ab"), EOS]]
    assert (cut.starts, cut.too_long) == ([3, 2], 1)  # the response stays whole: "ef" and EOS start at 3
    with pytest.raises(ValueError, match="f:1: the response alone has 3 tokens, there is room for 2"):
        encode_sft(records, tokenizer, 3, "truncate_left")
    dropped = encode_sft(records, tokenizer, 6, "drop")
    assert (dropped.rows, dropped.starts, dropped.kept, dropped.too_long) == ([[BOS, *ids("ab"), EOS]], [2], [1], 1)


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_that_spells_bos_or_eos_gets_no_second_one(bos: bool) -> None:
    tokenizer, front = make_tokenizer(bos), [BOS] * bos
    assert encode_prompts(["<s>ab", "ab"], make_tokenizer(bos=True), 9).rows == [[BOS, *ids("ab")]] * 2
    plain = encode_sft([SFTRecord("a", "b", "f:1"), SFTRecord(None, "ab", "f:2")], tokenizer, 9)
    spelt = encode_sft([SFTRecord("<s>" * bos + "a", "b</s>", "f:1"), SFTRecord(None, "<s>" * bos + "ab</s>", "f:2")],
                       tokenizer, 9)  # fmt: skip
    assert spelt == plain and plain.rows == [[*front, *ids("ab"), EOS]] * 2
    in_chat = encode_sft([SFTRecord(CHAT, "c</s></s>", "f:1")], tokenizer, 99)
    assert in_chat.rows == [[*CHAT_IDS, *ids("c"), EOS]]
    for end, tail in ((True, [EOS]), (False, [])):
        pairs = encode_pairs([PairRecord("a", "b</s>", "c", 0.0, "f:1")], tokenizer, 9, eos=end)
        assert (pairs.chosen, pairs.rejected) == ([[*front, *ids("ab"), *tail]], [[*front, *ids("ac"), *tail]])
    # An EOS that the prompt ends with is the prompt's, and so is one within an answer the answer's.
    row = encode_sft([SFTRecord("a</s>", "</s>", "f:1"), SFTRecord("a", "b</s>c", "f:2")], tokenizer, 9).rows
    assert row == [[*front, *ids("a"), EOS, EOS], [*front, *ids("ab"), EOS, *ids("c"), EOS]]


def test_no_eos() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        encode_sft([SFTRecord("a", "b", "f:1")], tokenizer, 10)


def test_pairs() -> None:
    answer = [{"role": "assistant", "content": "b"}]
    records = [
        PairRecord("a", "b", "cd", 0.0, "f:1"),
        PairRecord(None, "b", "c", 1.5, "f:2"),
        PairRecord(CHAT, "b", "c", 0.0, "f:3"),
        PairRecord(CHAT, answer, answer, 0.0, "f:4"),
        PairRecord(None, [*CHAT, *answer], [*CHAT, *answer], 0.0, "f:5"),
    ]
    encoded = encode_pairs(records, make_tokenizer(bos=True), 100)
    in_chat = [*CHAT_IDS, *ids("b"), EOS]  # the three ways to write this conversation are one
    assert encoded.chosen == [[BOS, *ids("ab"), EOS], [BOS, *ids("b"), EOS], in_chat, in_chat, in_chat]
    assert encoded.rejected[:2] == [[BOS, *ids("acd"), EOS], [BOS, *ids("c"), EOS]]
    assert encoded.margins == [0.0, 1.5, 0.0, 0.0, 0.0]
    bare = encode_pairs(records[:2], make_tokenizer(bos=True), 100, eos=False)
    assert bare.chosen == [[BOS, *ids("ab")], [BOS, *ids("b")]]


def test_too_long_pairs() -> None:
    # The first is too long by its rejected answer only.
    records = [PairRecord("ab", "c", "cdef", 1.0, "f:1"), PairRecord("a", "b", "c", 2.0, "f:2")]
    dropped = encode_pairs(records, make_tokenizer(), 5, "drop")
    assert (dropped.margins, dropped.kept, dropped.too_long) == ([2.0], [1], 1)
    cut = encode_pairs(records, make_tokenizer(), 5, "truncate_left")
    # The prompt goes from both, though the chosen answer would leave room for it.
    assert cut.chosen[0] == [*ids("c"), EOS] and cut.rejected[0] == [*ids("cdef"), EOS]
    assert list(cut.starts) == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"1 of 2 .* the longest has 7 \(f:1\)"):
        encode_pairs(records, make_tokenizer(), 5)


@given(
    st.integers(0, 6), st.integers(1, 6), st.integers(1, 6), st.integers(3, 9), st.sampled_from([False, True]),
    st.sampled_from(["text", "chat"]),
)  # fmt: skip
def test_a_pair_that_is_cut_has_one_prompt(prompt: int, chosen: int, rejected: int, room: int, bos: bool, kind: str):
    """The end of the prompt, the same of both; each answer whole, or the end of it where it has no room by itself."""
    tokenizer, answers = make_tokenizer(bos), ("x" * chosen, "y" * rejected)
    asked = "abcdef"[:prompt] or None
    if kind == "chat":
        asked = [{"role": "user", "content": asked or "a"}]
    record = PairRecord(asked, *answers, 0.0, "f:1")
    cut = encode_pairs([record], tokenizer, room, "truncate_left", eos=False)
    whole = encode_pairs([record], tokenizer, 999, eos=False)
    sides = (cut.chosen[0], cut.rejected[0]), (whole.chosen[0], whole.rejected[0]), cut.starts[0], whole.starts[0]
    fronts = []
    for row, full, start, first, answer in zip(*sides, answers, strict=True):
        assert len(row) <= room
        front = [BOS] * (bos and full[0] == BOS)
        if start < 0:  # the answer has no room
            assert len(answer) + len(front) > room and row == [*front, *ids(answer)[-(room - len(front)) :]]
            continue
        assert row[start:] == ids(answer) and row[: len(front)] == front
        assert row[len(front) : start] == full[first - (start - len(front)) : first]
        fronts.append(row[:start])
    assert len(fronts) < 2 or fronts[0] == fronts[1]
    longest = max(map(len, (whole.chosen[0], whole.rejected[0])))
    assert max(map(len, (cut.chosen[0], cut.rejected[0]))) == min(longest, room)  # no more goes than has to
