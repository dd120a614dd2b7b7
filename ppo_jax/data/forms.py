"""The forms in which people keep conversations, preferences and ratings -> our own (`data.records` checks those).

A row has a form when it has its required fields, no others than its optional ones, and values of their kinds. Each form
of a stage is looked for in turn, the narrowest first; a row that has none of them is an error that says what is near.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from ppo_jax.data import converters as to
from ppo_jax.data.lines import show_value
from ppo_jax.data.options import FormName

Row = dict[str, Any]
Stage = Literal["demonstrations", "preference pairs", "prompts", "ratings", "choices"]
TAKEN_BY: dict[Stage, str] = {
    "demonstrations": "`ppo-jax sft`",
    "preference pairs": "`ppo-jax dpo` and `ppo-jax reward --pairs`",
    "prompts": "`ppo-jax ppo` and `generate`",
    "ratings": "`ppo-jax reward --ratings`",
    "choices": "`ppo-jax reward --choices`",
}


class Form(NamedTuple):
    """One way to write a row."""

    name: FormName
    required: Mapping[str, str]  # field: kind of its value
    optional: tuple[str, ...] = ()
    convert: Callable[[Row, str], list[Row]] = to.keep  # raises ValueError, or `Skip` for a row that teaches nothing

    def fits(self, row: Row) -> bool:
        return self.missing(row) == [] and self.extra(row) == [] and self.odd(row) == []

    def missing(self, row: Row) -> list[str]:
        return [field for field in self.required if field not in row]

    def extra(self, row: Row) -> list[str]:
        return [field for field in row if field not in self.required and field not in self.optional]

    def odd(self, row: Row) -> list[str]:
        """The required fields whose values are of another kind."""
        return [field for field, kind in self.required.items() if not KINDS[kind][0](row[field])]


def _is_list_with(key: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and key in item for item in value)

    return check


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _is_dialogue(value: Any) -> bool:
    return _is_list_with("role")(value) and len(value) > 1


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "any": (lambda value: True, "any value"),
    "text": (lambda value: isinstance(value, str), "text"),
    "answer": (lambda value: isinstance(value, str) or _is_list_with("role")(value), "text or a list of messages"),
    "messages": (_is_list_with("role"), 'a list of {"role", "content"}'),
    "dialogue": (_is_dialogue, 'a list of {"role", "content"}, the question first'),
    "turns": (_is_list_with("from"), 'a list of {"from", "value"}'),
    "turn": (lambda value: isinstance(value, dict) and "from" in value, '{"from", "value"}'),
    "transcript": (_is_transcript, 'text of the kind "\\n\\nHuman: ...\\n\\nAssistant: ..."'),
    "label": (lambda value: isinstance(value, bool), "true or false"),
    "completions": (_is_list_with("response"), 'a list of {"response", "overall_score", ...}'),
}
ALPACA = ("input", "system", "history")
SHAREGPT = ("system", "tools")
BINARISED = (
    *("prompt_id", "messages", "score_chosen", "score_rejected", "source"),
    *("chosen-rating", "chosen-model", "rejected-rating", "rejected-model"),
)
FORMS: dict[Stage, tuple[Form, ...]] = {
    "demonstrations": (
        Form("ppo_jax", {"prompt": "answer", "response": "text"}, ("tools",)),
        Form("ppo_jax", {"text": "text"}),
        Form("messages", {"messages": "messages"}, ("tools",)),
        Form("messages", {"conversations": "messages"}, ("tools",), to.conversations_to_messages),
        Form("alpaca", {"instruction": "text", "output": "text"}, ALPACA, to.alpaca_demonstration),
        Form("sharegpt", {"conversations": "turns"}, SHAREGPT, to.sharegpt_demonstration),
        Form("trl", {"prompt": "answer", "completion": "answer"}, ("tools",), to.trl_demonstration),
    ),
    "preference pairs": (
        Form("hh", {"chosen": "transcript", "rejected": "transcript"}, (), to.hh_pair),
        Form(
            "ultrafeedback",
            {"prompt": "text", "chosen": "dialogue", "rejected": "dialogue"},
            BINARISED,
            to.binarised_pair,
        ),
        Form("ppo_jax", {"chosen": "text", "rejected": "text"}, ("prompt", "margin", "tools")),
        Form("messages", {"chosen": "messages", "rejected": "messages"}, ("prompt", "margin", "tools")),
        Form("alpaca", {"instruction": "text", "chosen": "text", "rejected": "text"}, ALPACA, to.alpaca_pair),
        Form(
            "sharegpt",
            {"conversations": "turns", "chosen": "turn", "rejected": "turn"},
            SHAREGPT,
            to.sharegpt_pair,
        ),
    ),
    "prompts": (
        Form("ppo_jax", {"prompt": "answer"}, ("metadata", "tools")),
        Form("messages", {"messages": "messages"}, ("metadata", "tools")),
        Form("alpaca", {"instruction": "text"}, ("output", *ALPACA), to.alpaca_prompt),
        Form("sharegpt", {"conversations": "turns"}, SHAREGPT, to.sharegpt_prompt),
        Form("trl", {"prompt": "answer", "completion": "answer"}, ("tools",), to.trl_prompt),
        Form("hh", {"chosen": "transcript"}, ("rejected",), to.hh_prompt),
    ),
    "ratings": (
        Form("ppo_jax", {"response": "text", "rating": "any"}, ("prompt",)),
        Form("kto", {"prompt": "answer", "completion": "answer", "label": "label"}, (), to.kto_rating),
        Form("kto", {"messages": "messages", "label": "label"}, (), to.kto_conversation),
        Form("kto", {"conversations": "turns", "label": "label"}, ("system",), to.kto_conversation),
        Form("kto", {"conversations": "turns", "kto_tag": "label"}, ("system",), to.kto_conversation),
        Form(
            "ultrafeedback",
            {"instruction": "text", "completions": "completions"},
            ("source", "models", "correct_answers", "incorrect_answers"),
            to.ultrafeedback_ratings,
        ),
    ),
    "choices": (Form("ppo_jax", {"responses": "any", "best": "any"}, ("prompt",)),),
}
TITLES: dict[str, str] = {
    "ppo_jax": "ppo_jax",
    "alpaca": "Alpaca",
    "sharegpt": "ShareGPT",
    "messages": "OpenAI messages",
    "trl": "TRL",
    "hh": "HH-RLHF",
    "ultrafeedback": "UltraFeedback",
    "kto": "KTO",
}


def find_form(row: Row, where: str, stage: Stage, wanted: FormName = "auto") -> Form | None:
    """Find the form of a row; None where it has none, or its own form's: `data.records` says what is wrong with it.

    Raises ValueError for a row that is nearly of a form, or not of the one that is `wanted`.
    """
    forms = [form for form in FORMS[stage] if wanted in ("auto", form.name)]
    if not forms:
        known = dict.fromkeys(form.name for form in FORMS[stage])
        raise ValueError(f"there are no {stage} of the form {wanted}; of these there are: {', '.join(known)}")
    for form in forms:
        if form.fits(row):
            return form
    own = {field for form in FORMS[stage] if form.convert is to.keep for field in (*form.required, *form.optional)}
    near = [form for form in forms if not form.missing(row) and not set(form.required) <= own]
    if near:
        raise ValueError(f"{where}: {_say_near(row, near[0], len(near) == 1)}{find_stage(row, stage)}")
    if wanted not in ("auto", "ppo_jax", "messages"):
        raise ValueError(f"{where}: not of the form {wanted}; it has {_names(row)}. {describe(forms)}")
    return None


def _say_near(row: Row, form: Form, only: bool) -> str:
    """Say what keeps a row that has all required fields of a form from having it."""
    for field in form.odd(row) if only or not form.extra(row) else ():
        return (
            f'"{field}" must be {KINDS[form.required[field]][1]} ({TITLES[form.name]} form), '
            f"got {show_value(row[field])}"
        )
    extra = [show_value(name)[1:-1] for name in form.extra(row)]
    keep = " ".join(name for name in row if name in form.required or name in form.optional)
    return (
        f'unknown field "{extra[0]}"; {describe([form])}. To leave other fields out, name those to be read: '
        f"--dataset.columns {keep}"
    )


def describe(forms: Iterable[Form]) -> str:
    """List forms with their fields."""
    said = []
    for form in forms:
        fields = " and ".join(f'"{field}"' for field in form.required)
        more = f" (optional {', '.join(form.optional)})" if form.optional else ""
        said.append(f"{TITLES[form.name]} form has {fields}{more}")
    return "; ".join(said)


def find_stage(row: Row, stage: Stage) -> str:
    """Say which other stage takes a row, if one does."""
    for other, forms in FORMS.items():
        for form in forms:
            if other != stage and form.fits(row):
                return f". These are {other} ({TITLES[form.name]} form), for {TAKEN_BY[other]}"
    return ""


def advise(row: Row, stage: Stage) -> str:
    """Say what else a row without a form may be: one that another stage takes, or which forms there are."""
    others = dict.fromkeys(TITLES[form.name] for form in FORMS[stage] if form.convert is not to.keep)
    known = f". Forms of others that are read: {', '.join(others)} (docs/data.md)" if others else ""
    return find_stage(row, stage) or f"{known}. --dataset.columns renames fields, or leaves them out"


def _names(row: Row) -> str:
    return ", ".join(f'"{show_value(name)[1:-1]}"' for name in row) or "no fields"
