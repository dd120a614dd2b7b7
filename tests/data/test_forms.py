"""The forms of others, in rows written by hand: what becomes of each, what is skipped, and what is said of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from ppo_jax.data.options import DatasetOptions
from ppo_jax.data.reading import read_records

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WORSE, SYSTEM = {"role": "assistant", "content": "b"}, {"role": "system", "content": "s"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
HH = "\n\nHuman: q\n\nAssistant: "
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(folder: Path, stage: Any, *rows: dict[str, Any], **options: Any) -> Any:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(stage, path, DatasetOptions(**options))


@pytest.mark.parametrize(
    ("row", "form", "prompt", "response"),
    [
        ({"instruction": "i", "output": "o"}, "Alpaca", [{**ASK, "content": "i"}], "o"),
        ({"instruction": "i", "input": "", "output": "o"}, "Alpaca", [{**ASK, "content": "i"}], "o"),
        (
            {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["q", "a"]]},
            "Alpaca",
            [SYSTEM, ASK, ANSWER, {**ASK, "content": "i\nn"}],
            "o",
        ),
        ({"conversations": [HUMAN, GPT], "system": "s"}, "ShareGPT", [SYSTEM, ASK], "a"),
        ({"conversations": [ASK, ANSWER]}, "OpenAI messages", [ASK], "a"),
        ({"messages": [SYSTEM, ASK, ANSWER]}, "OpenAI messages", [SYSTEM, ASK], "a"),
        ({"prompt": "p", "completion": "c"}, "TRL", "p", "c"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "TRL", [ASK], "a"),
        ({"text": "t"}, "ppo_jax", None, "t"),
    ],
)
def test_demonstrations(tmp_path: Path, row: Any, form: str, prompt: Any, response: str) -> None:
    found = read(tmp_path, "demonstrations", row)
    assert found.notice.endswith(f"data.jsonl: 1 demonstrations, {form} form")
    assert [(r.prompt, r.response) for r in found.records] == [(prompt, response)]


def test_tools_come_from_every_form_alike(tmp_path: Path) -> None:
    called = {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": 1}})}
    sharegpt = {"conversations": [HUMAN, called, {"from": "observation", "value": "r"}, GPT],
                "tools": json.dumps([TOOLS[0]["function"]])}  # fmt: skip
    text = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    openai = {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [text]},
                           {"role": "tool", "content": "r"}, ANSWER], "tools": TOOLS}  # fmt: skip
    ours = [{"role": "tools", "tools": TOOLS}, ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "r"}]  # fmt: skip
    for row in (sharegpt, openai):
        (record,) = read(tmp_path, "demonstrations", row).records
        assert (record.prompt, record.response) == (ours, "a")
    (last,) = read(tmp_path, "demonstrations", {"conversations": [HUMAN, called], "tools": TOOLS}).records
    assert (last.prompt, last.response) == (ours[:2], ours[2])  # a call is an answer too, a message


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"chosen": HH + "a", "rejected": HH + "b"}, "HH-RLHF"),
        (
            {"prompt": "q", "prompt_id": "1", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE], "score_chosen": 5},
            "UltraFeedback",
        ),
        ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [WORSE]}, "OpenAI messages"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}, "OpenAI messages"),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, "Alpaca"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "b"}}, "ShareGPT"),
    ],
)
def test_pairs_of_every_form_say_the_same(tmp_path: Path, row: Any, form: str) -> None:
    found = read(tmp_path, "preference pairs", row)
    assert found.notice.endswith(f"1 preference pairs, {form} form")
    (pair,) = found.records
    sides = [
        [*(pair.prompt or []), *(side if isinstance(side, list) else [{**ANSWER, "content": side}])]
        for side in (pair.chosen, pair.rejected)
    ]
    assert sides == [[ASK, ANSWER], [ASK, WORSE]]


def test_prompts_keep_the_answer_beside_them(tmp_path: Path) -> None:
    found = read(
        tmp_path, "prompts", {"instruction": "q", "output": "a"}, {"conversations": [HUMAN, GPT]},
        {"prompt": [ASK], "completion": [ANSWER]}, {"chosen": HH + "a", "rejected": HH + "b"}, {"instruction": "q"},
    )  # fmt: skip
    assert [r.prompt for r in found.records] == [[ASK]] * 5
    assert [r.metadata for r in found.records] == [{"answer": "a"}] * 4 + [{}]


def test_ratings(tmp_path: Path) -> None:
    scored = [{"response": text, "overall_score": score} for text, score in (("a", 4.5), ("", 1), ("b", 2))]
    found = read(
        tmp_path, "ratings", {"prompt": "q", "completion": "a", "label": True},
        {"messages": [ASK, ANSWER], "label": False}, {"conversations": [HUMAN, GPT], "kto_tag": True},
        {"instruction": "q", "completions": scored},
    )  # fmt: skip
    assert [(r.prompt, r.response, r.rating) for r in found.records] == [
        ("q", "a", 1.0), ([ASK], "a", 0.0), ([ASK], "a", 1.0), ([ASK], "a", 4.5), ([ASK], "b", 2.0)
    ]  # fmt: skip
    assert "5 ratings, 3 rows in KTO form, 1 rows in UltraFeedback form" in found.notice


def test_what_is_skipped_is_counted_with_its_reason(tmp_path: Path) -> None:
    gpt = {"conversations": [HUMAN, GPT]}
    found = read(
        tmp_path, "demonstrations", gpt, {"conversations": [HUMAN]}, {"conversations": [HUMAN, GPT, HUMAN]},
        {"conversations": [HUMAN, {**GPT, "value": " "}]}, gpt,
    )  # fmt: skip
    assert found.notice.endswith(
        "2 demonstrations, ShareGPT form, 3 skipped: the last turn is no answer (2, first at line 2); "
        "a turn is empty (1, first at line 4)"
    )
    with pytest.raises(ValueError, match=r"data.jsonl: of its rows none can be used: \"output\" is empty"):
        read(tmp_path, "demonstrations", {"instruction": "i", "output": ""})


def test_columns(tmp_path: Path) -> None:
    row = {"q": "q", "a": "a", "id": 7}
    found = read(tmp_path, "demonstrations", row, columns=("prompt=q", "response=a"))
    assert [(r.prompt, r.response) for r in found.records] == [("q", "a")]
    alpaca = {"instruction": "q", "output": "a", "id": 7}
    assert "Alpaca" in read(tmp_path, "demonstrations", alpaca, columns=("instruction", "output")).notice
    with pytest.raises(ValueError, match=r"data.jsonl:1: .*--dataset.columns prompt=question: this row has no such"):
        read(tmp_path, "demonstrations", row, columns=("prompt=question", "response=a"))
    with pytest.raises(ValueError, match='--dataset.columns: .*data.jsonl has no column "x"; it has: a, id, q'):
        read(tmp_path, "prompts", row, columns=("prompt=q", "metadata=x"))


@pytest.mark.parametrize(
    ("stage", "row", "message"),
    [
        ("demonstrations", {"instruction": "i", "output": "o", "id": 1},
         'unknown field "id"; Alpaca form has "instruction" and "output" (optional input, system, history). To leave '
         "other fields out, name those to be read: --dataset.columns instruction output"),
        ("demonstrations", {"instruction": 3, "output": "o"}, '"instruction" must be text (Alpaca form), got 3'),
        ("demonstrations", {"instruction": "i", "output": "o", "history": ["a"]},
         '"history[0]" must be [question, answer]'),
        ("demonstrations", {"conversations": [{"from": "bot", "value": "x"}]},
         "\"conversations[0].from\" is 'bot'; allowed"),
        ("demonstrations", {"conversations": [{**HUMAN, "x": 1}, GPT]}, 'conversations[0]: unknown field "x"'),
        ("demonstrations", {"conversations": [HUMAN, GPT], "tools": "{"}, '"tools" is text, but no JSON'),
        ("demonstrations", {"conversations": "x"}, '"conversations" must be'),
        ("demonstrations", {"chosen": "a", "rejected": "b"},
         "These are preference pairs (ppo_jax form), for `ppo-jax dpo` and `ppo-jax reward --pairs`"),
        ("demonstrations", {"prompt": "p", "completion": "c", "label": True},
         "These are ratings (KTO form), for `ppo-jax reward --ratings`"),
        ("preference pairs", {"prompt": "p", "completion": "c", "label": True},
         "(KTO form), for `ppo-jax reward --ratings`"),
        ("prompts", {"instruction": "i", "chosen": "a", "rejected": "b"}, "These are preference pairs (Alpaca form)"),
        ("preference pairs", {"conversations": [HUMAN], "chosen": GPT, "rejected": HUMAN}, 'an answer is of "gpt"'),
        ("preference pairs", {"prompt": "z", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]},
         '"chosen" must begin with the text of "prompt"'),
        ("ratings", {"instruction": "i", "completions": [{"response": "r"}]}, '"completions[0].overall_score" must be'),
        ("demonstrations", {"text": "t", "tools": TOOLS}, '"tools" are for chat messages'),
    ],
)  # fmt: skip
def test_wrong_rows(tmp_path: Path, stage: Any, row: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, stage, row)
    assert "data.jsonl:1: " in str(error.value) and message in str(error.value)
    assert str(error.value).count("These are") <= 1


def test_a_form_that_was_asked_for_is_the_only_one(tmp_path: Path) -> None:
    transcript = {"chosen": HH + "a", "rejected": HH + "b"}
    (pair,) = read(tmp_path, "preference pairs", transcript, form="ppo_jax").records
    assert pair.chosen == HH + "a"
    with pytest.raises(ValueError, match="data.jsonl:1: not of the form alpaca; it has"):
        read(tmp_path, "preference pairs", transcript, form="alpaca")
    with pytest.raises(ValueError, match="no prompts of the form kto; of these there are: ppo_jax"):
        read(tmp_path, "prompts", {"prompt": "p"}, form="kto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("=x",)}, "must be NAME or NAME=COLUMN"),
        ({"columns": ("a", "a=b")}, "more than once"),
        ({"max_samples": 0}, "at least 1"),
        ({"weights": (1.0,), "more": (Path("a"),)}, "1 weights for 2 files"),
        ({"weights": (0.0,)}, "must be positive"),
        ({"held_out_fraction": 1.0}, "between 0 and 1"),
        ({"held_out_fraction": 0.5, "held_out_file": Path("a")}, "exclude one another"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetOptions(**options)
