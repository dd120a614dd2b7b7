"""Ratings and choices: what is read, how it is encoded, and what is refused with file, line and field."""

import json
from pathlib import Path

import pytest

from ppo_jax.data import PairRecord, encode_pairs
from ppo_jax.data.encode import encode_choices, encode_ratings
from ppo_jax.data.reading import read_choices, read_ratings
from tests.data.tokenizer import BOS, ids, make_tokenizer

ASK = [{"role": "user", "content": "hi"}]


def lines(path: Path, *records: dict) -> Path:
    file = path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_ratings_and_choices_are_encoded_as_pairs_are(tmp_path: Path) -> None:
    """One row per response, the very row that `encode_pairs` without EOS makes of it."""
    tokenizer = make_tokenizer(bos=True)
    for prompt in (None, "ab ", ASK):
        extra = {} if prompt is None else {"prompt": prompt}
        rated = read_ratings(
            lines(tmp_path, {"response": "good", "rating": 4} | extra, {"response": "x", "rating": -0.5})
        )
        assert [r.rating for r in rated] == [4, -0.5] and rated[1].where.endswith("data.jsonl:2")
        chosen = read_choices(lines(tmp_path, {"responses": ["good", "bad", "so"], "best": 2} | extra))
        answer = (lambda text: [{"role": "assistant", "content": text}]) if isinstance(prompt, list) else str
        pair = encode_pairs([PairRecord(prompt, answer("good"), answer("bad"), 0.0, "")], tokenizer, 99, eos=False)
        assert encode_ratings(rated, tokenizer, 99).rows[0] == pair.chosen[0]
        found = encode_choices(chosen, tokenizer, 99)
        assert found.groups[0][:2] == [pair.chosen[0], pair.rejected[0]] and found.best == [2]
    assert encode_ratings(rated, tokenizer, 99).ratings == [4, -0.5]


def test_an_answer_that_spells_eos_is_rated_where_it_is_scored_in_use(tmp_path: Path) -> None:
    """PPO reads a response without the token that ended it, so no rated text has one either."""
    tokenizer = make_tokenizer(bos=True)
    rated = read_ratings(lines(tmp_path, {"prompt": "<s>a", "response": "b</s>", "rating": 1}))
    assert encode_ratings(rated, tokenizer, 9).rows == [[BOS, *ids("ab")]]
    chosen = read_choices(lines(tmp_path, {"prompt": "a", "responses": ["b</s>", "c"], "best": 0}))
    assert encode_choices(chosen, tokenizer, 9).groups == [[[BOS, *ids("ab")], [BOS, *ids("ac")]]]


def test_long_texts_are_cut_dropped_or_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    records = read_choices(
        lines(tmp_path, {"responses": ["abc", "abcdef"], "best": 0}, {"responses": ["a", "b"], "best": 1})
    )
    assert encode_choices(records, tokenizer, 4, "drop") == ([[[BOS, *ids("a")], [BOS, *ids("b")]]], [1], 1)
    cut = encode_choices(records, tokenizer, 4, "truncate_left")
    assert cut.groups[0] == [[BOS, *ids("abc")], [BOS, *ids("def")]] and cut.too_long == 1
    asked = read_choices(lines(tmp_path, {"prompt": "xyz", "responses": ["a", "bc", "d"], "best": 0}))
    cut = encode_choices(asked, tokenizer, 5, "truncate_left")
    assert cut.groups == [[[BOS, *ids("yz" + answer)] for answer in ("a", "bc", "d")]]
    records = read_choices(lines(tmp_path, {"responses": ["abc", "abcdef"], "best": 0}))
    with pytest.raises(ValueError, match="longer than 4 tokens"):
        encode_choices(records, tokenizer, 4)
    rated = read_ratings(lines(tmp_path, {"response": "abcdef", "rating": 1}, {"response": "a", "rating": 2}))
    assert encode_ratings(rated, tokenizer, 4, "drop") == ([[BOS, *ids("a")]], [2], 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"response": "a"}, "allowed"),
        ({"response": "a", "rating": "5"}, '"rating" must be a finite number'),
        ({"response": "a", "rating": True}, '"rating" must be a finite number'),
        ({"response": "a", "rating": float("nan")}, "NaN is not a number of JSON"),
        ({"response": "", "rating": 1}, '"response" is empty'),
        ({"response": "a", "rating": 1, "promt": "b"}, 'did you mean "prompt"'),
        ({"response": "a", "rating": 1, "prompt": 3}, '"prompt" must be'),
    ],
)
def test_bad_ratings_name_line_and_field(record: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"data.jsonl:2: .*{message}"):
        read_ratings(lines(tmp_path, {"response": "a", "rating": 1}, record))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"responses": ["a", "b"]}, "allowed"),
        ({"responses": ["a"], "best": 0}, "at least 2 texts"),
        ({"responses": "ab", "best": 0}, "at least 2 texts"),
        ({"responses": ["a", 3], "best": 0}, r'"responses\[1\]" must be text'),
        ({"responses": ["a", "b"], "best": 2}, '"best" must be from 0 to 1, got 2'),
        ({"responses": ["a", "b"], "best": -1}, '"best" must be from 0 to 1'),
        ({"responses": ["a", "b"], "best": False}, '"best" must be from 0 to 1'),
    ],
)
def test_bad_choices_name_line_and_field(record: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"data.jsonl:2: .*{message}"):
        read_choices(lines(tmp_path, {"responses": ["a", "b"], "best": 1}, record))
