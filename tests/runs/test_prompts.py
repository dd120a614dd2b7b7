"""Which records are held out: none that shares a prompt or a text with a training one, and what is said of too few."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ppo_jax.cli.demo.language import model
from ppo_jax.cli.sft import SFTSettings, split_demonstrations
from ppo_jax.data import DatasetOptions, PairRecord, PromptRecord, SFTRecord
from ppo_jax.data.records import ChoiceRecord, RatingRecord, identities
from ppo_jax.runs.prompts import describe_unknown, group_alike, make_mixture, read_split, split_held_out

ASK = [{"role": "user", "content": "a"}]
ANSWER = [{"role": "assistant", "content": "b"}]


def prompts(*texts: str) -> list[PromptRecord]:
    return [PromptRecord(text, {"line": i}, f"f:{i}") for i, text in enumerate(texts)]


def test_held_out_records_are_apart() -> None:
    for count, number in [(0, 64), (4, 64), (5, 64), (40, 64), (400, 64), (400, 0)]:
        records = prompts(*map(str, range(count)))
        split = split_held_out(records, number, seed=1)
        expected = min(number, count // 5)
        assert (split.kind == "held-out") == bool(expected)
        if expected:
            assert len(split.measured) == expected
            assert sorted([*split.training, *split.measured], key=lambda r: int(r.prompt)) == records
        else:
            assert split.training == split.measured == records
    hundred = prompts(*map(str, range(100)))
    assert split_held_out(hundred, 10, 1).measured != split_held_out(hundred, 10, 2).measured


def test_rows_that_all_differ_are_held_out_as_ever() -> None:
    """A run that was begun before prompts were compared goes on with the same rows."""
    records = prompts(*map(str, range(50)))
    chosen = sorted(np.random.default_rng(3).permutation(50)[:7].tolist())
    assert [int(r.prompt) for r in split_held_out(records, 7, 3).measured] == chosen


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.integers(0, 12), st.integers(0, 5))
def test_no_prompt_is_on_both_sides(texts: list[str], count: int, seed: int) -> None:
    records = prompts(*texts)
    split = split_held_out(records, count, seed)
    if split.kind == "training":
        assert split.training == split.measured == records and "of the training prompts" in split.notice
        return
    assert not {r.prompt for r in split.training} & {r.prompt for r in split.measured}
    assert len(split.training) + len(split.measured) == len(records)
    assert 0 < len(split.measured) <= min(count, len(records) // 5)
    assert bool(split.notice) == (len(split.measured) < count)


def test_what_is_said_of_too_few() -> None:
    assert split_held_out(prompts(*map(str, range(10))), 2, 0).notice == ""
    few = split_held_out(prompts(*map(str, range(10))), 5, 0)
    assert few.notice == "--held-out 5: of 10 prompts 2 can be held out."
    same = split_held_out(prompts(*"aaaaabbbbb"), 5, 0, "pairs")
    assert same.notice == (
        "--held-out 5: of 10 pairs, 2 of them different, none can be held out. Evaluations are of the training pairs"
    )


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (SFTRecord("a", "b", ""), SFTRecord("a", "c", ""), True),  # one prompt
        (SFTRecord("a", "b", ""), SFTRecord("ab", "b", ""), False),
        (SFTRecord("a", "bc", ""), SFTRecord("ab", "c", ""), True),  # one text
        (SFTRecord(None, "ab", ""), SFTRecord("a", "b", ""), True),
        (SFTRecord(None, "ab", ""), SFTRecord(None, "a", ""), False),
        (PairRecord(None, "a", "b", 0.0, ""), PairRecord(None, "c", "a", 1.0, ""), True),
        (PairRecord(None, [*ASK, *ANSWER], [*ASK, *ANSWER], 0.0, ""), PairRecord(ASK, ANSWER, ANSWER, 0.0, ""), True),
        (RatingRecord(None, "a", 1.0, ""), RatingRecord(None, "a", 2.0, ""), True),
        (RatingRecord(ASK, "a", 1.0, ""), RatingRecord(None, "a", 2.0, ""), False),
        (ChoiceRecord("p", ["a", "b"], 0, ""), ChoiceRecord("p", ["c", "d"], 1, ""), True),
    ],
)
def test_what_makes_two_records_one(one: SFTRecord, other: SFTRecord, alike: bool) -> None:
    assert bool(identities(one) & identities(other)) == alike


def test_groups_join_through_others() -> None:
    assert group_alike(["a", "b", "c", "ab", "d", "c"]) == [[0, 1, 3], [2, 5], [4]]
    assert group_alike([]) == []


def test_all_turns_of_conversations_that_begin_alike_are_on_one_side(tmp_path: Path) -> None:
    """Of a conversation that is held out, an answer whose prompt is trained on is not measured."""

    def say(role: str, text: str) -> dict:
        return {"role": role, "content": text}

    lines = [
        {"messages": [say("user", "hi"), say("assistant", "ho"), say("user", str(i)), say("assistant", "ok")]}
        for i in range(20)
    ]
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = split_demonstrations(SFTSettings("m", file, held_out=4))
    every = split_demonstrations(SFTSettings("m", file, held_out=4, turns="all"))
    assert len(last.training) == 16 and len(every.training) == 32
    assert every.measured == last.measured and len(every.measured) == 4  # each without its "hi"
    assert not set().union(*map(identities, every.training)) & set().union(*map(identities, every.measured))


# -- as the options say ------------------------------------------------------------------------------------------------


def _write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_a_fraction_is_held_out(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *map(str, range(10)))
    split = read_split("prompts", path, DatasetOptions(held_out_fraction=0.5), 64, 0)
    assert (len(split.training), len(split.measured), split.kind, split.notice) == (5, 5, "held-out", "")
    assert split.found == (f"{path}: 10 prompts, ppo_jax form",)
    assert len(read_split("prompts", path, DatasetOptions(held_out_fraction=0.01), 64, 0).measured) == 1


def test_a_file_is_held_out_but_for_what_is_trained_on(tmp_path: Path) -> None:
    path, apart = _write(tmp_path / "a.jsonl", "a", "b"), _write(tmp_path / "b.jsonl", "b", "c")
    split = read_split("prompts", path, DatasetOptions(held_out_file=apart), 64, 0)
    assert [r.prompt for r in split.training] == ["a", "b"] and [r.prompt for r in split.measured] == ["c"]
    assert split.kind == "held-out" and "1 of 2 prompts are among the training ones and are left out" in split.notice
    with pytest.raises(ValueError, match="each of its prompts shares a prompt or a text"):
        read_split("prompts", path, DatasetOptions(held_out_file=path), 64, 0)


def test_several_files_are_read_one_behind_the_other(tmp_path: Path) -> None:
    one, two = _write(tmp_path / "a.jsonl", *"abcd"), _write(tmp_path / "b.jsonl", *"efgh")
    options = DatasetOptions(more=(two,), weights=(3.0, 1.0), max_samples=3)
    split = read_split("prompts", one, options, 0, 0)
    assert [(r.prompt, r.member) for r in split.training] == [(t, 0) for t in "abc"] + [(t, 1) for t in "efg"]
    mix = make_mixture(options, split.training, [0, 2, 5])
    assert mix is not None and mix.members == [0, 0, 1] and mix.weights == (3.0, 1.0)
    assert make_mixture(DatasetOptions(more=(two,)), split.training, [0]) is None


def test_words_that_the_tokenizer_does_not_know_are_said() -> None:
    toy = model(0)  # knows two dozen words; all others are its end token
    rows = toy.tokenizer(["the film is great", "tell me about the film now"], add_special_tokens=False)["input_ids"]
    assert describe_unknown(toy, rows[:1]) == ""
    end = toy.tokenizer.convert_ids_to_tokens(toy.stop_ids[0])
    assert describe_unknown(toy, rows).startswith(f"25% of the tokens are {end!r}")  # 2 of 4 + 4
    assert describe_unknown(toy, [[*rows[0], toy.stop_ids[0]]]) == ""  # the end of a text
    bytewise = Tokenizer(models.BPE({"</s>": 0, "a": 1}, []))
    named = PreTrainedTokenizerFast(tokenizer_object=bytewise, unk_token="</s>", eos_token="</s>")
    assert describe_unknown(toy._replace(tokenizer=named), [[1, 0, 1, 0, 1]]) == ""  # ends of several answers
