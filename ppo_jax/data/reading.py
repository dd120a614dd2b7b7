"""The user's files -> records: any kind of file (`data.sources`), any form (`data.forms`), with what was found said."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.data import forms
from ppo_jax.data.converters import Skip
from ppo_jax.data.disk import parse_json
from ppo_jax.data.forms import Stage
from ppo_jax.data.lines import check_text, read_lines, show_value
from ppo_jax.data.llamafactory import registry
from ppo_jax.data.options import DatasetOptions
from ppo_jax.data.records import (
    ChoiceRecord,
    PairRecord,
    PromptRecord,
    RatingRecord,
    Record,
    SFTRecord,
    make_choice,
    make_demonstration,
    make_pair,
    make_prompt,
    make_rating,
)
from ppo_jax.data.sources import Row, Table, open_table

MAKERS: dict[Stage, Callable[[Row, str], Record]] = {
    "demonstrations": make_demonstration,
    "preference pairs": make_pair,
    "prompts": make_prompt,
    "ratings": make_rating,
    "choices": make_choice,
}
# What CSV has to write as text, since it has nothing else.
_NUMBERS = {"rating", "margin", "best"}
_LABELS = {"label", "kto_tag"}
_JSON = {"messages", "conversations", "responses", "history", "tools", "metadata", "completions"}
_OWN = DatasetOptions()


class Found(NamedTuple):
    """The records of one file, and what was found in it."""

    records: list[Any]
    notice: str  # "312 preference pairs, ShareGPT form, 4 skipped: ..."


class _Counts(NamedTuple):
    forms: Counter[str]
    skipped: Counter[str]
    first: dict[str, str]  # reason: where it was met first

    def skip(self, reason: Skip, where: str) -> None:
        """Count a row that teaches nothing."""
        self.skipped[str(reason)] += 1
        self.first.setdefault(str(reason), where)


def read_records(stage: Stage, path: str | Path, options: DatasetOptions = _OWN, member: int = 0) -> Found:
    """Read the records of one file, as the options say.

    Args:
      member: its number among several.

    Raises:
      ValueError: a row is of no form, or wrong; the message names file, line or row, and field.
      FileNotFoundError: there is no such file.
    """
    counts = _Counts(Counter(), Counter(), {})
    rows = _read_rows(stage, path, options, counts)
    records = [record._replace(member=member) for record in rows]
    if not records:
        raise ValueError(f"{path}: of its rows none can be used: {_say_skipped(counts)}")
    return Found(records, _describe(stage, path, len(records), counts))


def read_prompts(path: str | Path, options: DatasetOptions = _OWN) -> list[PromptRecord]:
    """Read prompts: one text per line of a .txt file, else {"prompt": text} or {"messages": [...]} of any kind of file.

    Optionally "metadata": {...}. Other forms are recognised (`data.forms`).

    Raises:
      ValueError: a row is not that; the message names file, line or row, and field.
      FileNotFoundError: there is no such file.
    """
    return read_records("prompts", path, options).records


def read_pairs(path: str | Path, options: DatasetOptions = _OWN) -> list[PairRecord]:
    """Read preferences, {"chosen": text, "rejected": text} and optionally "prompt" and "margin", or another form.

    Each text is a string or a list of messages; the answers are both the one or both the other. Strings are joined
    as they are, so a space between prompt and answer belongs to one of them.

    Raises: as `read_prompts`.
    """
    return read_records("preference pairs", path, options).records


def read_sft(path: str | Path, options: DatasetOptions = _OWN) -> list[SFTRecord]:
    """Read demonstrations: one text per line of a .txt file, else objects of any kind of file.

    {"prompt": text or messages, "response": text}, {"messages": [...]} (the last one, the assistant's, is the
    response), {"text": text} (all of it is learnt), or another form.

    Raises: as `read_prompts`.
    """
    return read_records("demonstrations", path, options).records


def read_ratings(path: str | Path, options: DatasetOptions = _OWN) -> list[RatingRecord]:
    """Read rated responses, {"response": text, "rating": number} and optionally "prompt", or another form.

    Raises: as `read_prompts`.
    """
    return read_records("ratings", path, options).records


def read_choices(path: str | Path, options: DatasetOptions = _OWN) -> list[ChoiceRecord]:
    """Read best of n, {"responses": [text, ...], "best": place from 0} and optionally "prompt".

    Raises: as `read_prompts`.
    """
    return read_records("choices", path, options).records


# -- rows ------------------------------------------------------------------------------------------------------------


def _read_rows(stage: Stage, path: str | Path, options: DatasetOptions, counts: _Counts) -> Iterator[Any]:
    make = MAKERS[stage]
    if named := registry.split_name(path):
        yield from _read_named(stage, path, registry.read_entry(*named), options, counts)
        return
    if Path(path).suffix == ".txt" and stage in ("prompts", "demonstrations"):
        field = "prompt" if stage == "prompts" else "text"
        for where, line in islice(read_lines(path), options.max_samples):
            counts.forms["plain text"] += 1
            yield make({field: check_text(line, where, field)}, where)
        return
    for where, row in _chosen_columns(open_table(path, options.split), path, options):
        try:
            form = forms.find_form(row, where, stage, options.form)
            own = [row] if form is None else form.convert(row, where)
            records = [make(one, where) for one in own]  # a row without a form is refused here
        except Skip as reason:
            counts.skip(reason, where.removeprefix(f"{path}").lstrip(":, "))
        except ValueError as error:
            raise ValueError(f"{error}{_hint(row, stage, options)}") from error
        else:
            counts.forms[forms.TITLES["ppo_jax" if form is None else form.name]] += 1
            yield from records


def _read_named(
    stage: Stage, path: str | Path, entry: registry.Entry, options: DatasetOptions, counts: _Counts
) -> Iterator[Any]:
    """Read a data set of dataset_info.json, which says itself what its columns are."""
    if options.columns or options.form != "auto":
        raise ValueError(f"{path}: its entry says what form and columns are; leave --dataset.columns and form out")
    for where, make in registry.read_rows(entry, stage, options.max_samples):
        try:
            record = make()
        except Skip as reason:
            counts.skip(reason, where)
        else:
            counts.forms[forms.TITLES[entry.form]] += 1
            yield record


def _hint(row: Row, stage: Stage, options: DatasetOptions) -> str:
    absent = [name for name, _ in options.renamed if name not in row]
    if absent:
        wanted = ", ".join(f"{name}={column}" for name, column in options.renamed if name in absent)
        return f" (--dataset.columns {wanted}: this row has no such column)"
    known = any(form.fits(row) or not form.missing(row) for form in forms.FORMS[stage])
    return "" if known or options.form != "auto" else forms.advise(row, stage)


def _chosen_columns(table: Table, path: str | Path, options: DatasetOptions) -> Iterator[tuple[str, Row]]:
    """Rename and leave out columns, and read the cells of CSV; a column that no row has is an error."""
    renamed, seen = options.renamed, set(table.columns or ())
    if table.columns is not None:
        _check_columns(renamed, seen, path)
    for where, row in islice(table.rows, options.max_samples):
        if renamed:
            seen |= row.keys()
            row = {name: row[column] for name, column in renamed if column in row}
        yield where, {name: read_cell(name, value, where) for name, value in row.items()} if table.texts_only else row
    if renamed:
        _check_columns(renamed, seen, path)


def _check_columns(renamed: Sequence[tuple[str, str]], known: set[str], path: str | Path) -> None:
    for _, column in renamed:
        if column not in known:
            names = ", ".join(show_value(name)[1:-1] for name in sorted(known)[:30])
            raise ValueError(f'--dataset.columns: {path} has no column "{column}"; it has: {names}')


def read_cell(name: str, cell: str, where: str) -> Any:
    """Read a cell of CSV: numbers, labels and lists are written as text there; all else is text."""
    text = cell.strip()
    try:
        if name in _NUMBERS:
            return int(text) if name == "best" else float(text)
        if name in _LABELS:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return parse_json(text) if name in _JSON else cell
    except (ValueError, KeyError) as error:
        kind = "a number" if name in _NUMBERS else "true or false" if name in _LABELS else "JSON"
        raise ValueError(f'{where}: "{name}" must be {kind}, got {show_value(cell)}') from error


# -- words -----------------------------------------------------------------------------------------------------------


def _describe(stage: Stage, path: str | Path, count: int, counts: _Counts) -> str:
    kinds = list(counts.forms)
    form = (
        f"{kinds[0]} form"
        if len(kinds) == 1
        else ", ".join(f"{n} rows in {kind} form" for kind, n in counts.forms.items())
    )
    skipped = f", {counts.skipped.total()} skipped: {_say_skipped(counts)}" if counts.skipped else ""
    return f"{path}: {count} {stage}, {form}{skipped}"


def _say_skipped(counts: _Counts) -> str:
    several = len(counts.skipped) > 1
    return "; ".join(
        f"{reason} ({f'{number}, ' if several else ''}first at {_place(counts.first[reason])})"
        for reason, number in counts.skipped.most_common()
    )


def _place(place: str) -> str:
    return f"line {place}" if place.isdecimal() else place
