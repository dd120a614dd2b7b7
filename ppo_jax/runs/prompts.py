"""From prompt records to what a run trains on: held-out rows apart, token rows, and room for responses."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ppo_jax.data import DatasetOptions, PromptRecord, TooLong, encode_prompts, render
from ppo_jax.data.batches import Mixture
from ppo_jax.data.forms import Stage
from ppo_jax.data.llamafactory import rows as by_template
from ppo_jax.data.llamafactory.encoding import Encoder
from ppo_jax.data.reading import read_records
from ppo_jax.data.records import Record, identities
from ppo_jax.models.pretrained import Model


class Split(NamedTuple):
    """Records to train on, and those that it is measured on."""

    training: list[Any]
    measured: list[Any]  # of which no prompt and no text is among the training ones, if `kind` is "held-out"
    kind: Literal["held-out", "training"]  # what they are; "training": there are too few to hold any out
    notice: str  # what the user has to be told; "" where as many are held out as were asked for
    found: tuple[str, ...] = ()  # what was read: of each file how many records, of which form


class PromptSet(NamedTuple):
    """Prompts as token rows and as text, with whatever else the user gave for each."""

    rows: Sequence[Sequence[int]]
    texts: Sequence[str]
    metadata: Sequence[dict[str, Any]]
    kept: Sequence[int] = ()  # rows[i] is of record kept[i] of those that were encoded


def read_split(
    stage: Stage, path: Path, options: DatasetOptions, held_out: int, seed: int, what: str = "prompts"
) -> Split:
    """Read the records of a stage from its file, and those mixed with it, and hold some out as the options say.

    Args:
      held_out: how many, where the options name neither a fraction nor a file.
      what: what the records are called in messages.
    """
    files = [read_records(stage, name, options, member) for member, name in enumerate((path, *options.more))]
    records, found = [record for file in files for record in file.records], tuple(file.notice for file in files)
    if options.held_out_file is not None:
        apart = read_records(stage, options.held_out_file, options)
        return _keep_apart(records, apart.records, options.held_out_file, what)._replace(found=(*found, apart.notice))
    if options.held_out_fraction is not None:
        count = min(max(round(options.held_out_fraction * len(records)), 1), len(records) - 1)
        return split_held_out(records, count, seed, what, most=count)._replace(found=found)
    return split_held_out(records, held_out, seed, what)._replace(found=found)


def _keep_apart(records: list[Record], measured: list[Record], path: Path, what: str) -> Split:
    """Measure on the records of a file, but for those that share a prompt or a text with training ones."""
    known = set().union(*map(identities, records))
    unseen = [record for record in measured if not identities(record) & known]
    if not unseen:
        raise ValueError(f"{path}: each of its {what} shares a prompt or a text with the training data; give others")
    both = len(measured) - len(unseen)
    notice = f"{path}: {both} of {len(measured)} {what} are among the training ones and are left out" if both else ""
    return Split(records, unseen, "held-out", notice)


def make_mixture(options: DatasetOptions, records: Sequence[Any], kept: Sequence[int]) -> Mixture | None:
    """Make the shares of the files in training, where the options weigh them; rows are those of records[kept[i]]."""
    return Mixture([records[i].member for i in kept], options.weights) if options.weights else None


def split_held_out(
    records: Sequence[Record], count: int, seed: int, what: str = "prompts", most: int | None = None
) -> Split:
    """Hold `count` random records out, at most a fifth; where that is none, it is measured on the training ones.

    Records that share a prompt or a text (`data.records.identities`) stay on one side, so none is in both.

    Args:
      what: what the records are called in messages.
      most: hold out at most this many, in place of a fifth.
    """
    if count < 0:
        raise ValueError(f"--held-out {count} must not be negative")
    groups = group_alike([identities(record) for record in records])
    room = min(count, len(records) // 5) if most is None else most
    chosen: set[int] = set()
    for number in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) + len(groups[number]) <= room:
            chosen.update(groups[number])
    told = ""
    if len(chosen) < count:
        alike = f", {len(groups)} of them different," if len(groups) < len(records) else ""
        told = f"--held-out {count}: of {len(records)} {what}{alike} {len(chosen) or 'none'} can be held out. "
    if not chosen:
        return Split(list(records), list(records), "training", f"{told}Evaluations are of the training {what}")
    apart = [[record for i, record in enumerate(records) if (i in chosen) is held] for held in (False, True)]
    return Split(apart[0], apart[1], "held-out", told.rstrip())


def group_alike(keys: Sequence[Iterable[str]]) -> list[list[int]]:
    """Sort places into groups that share keys, directly or through others, by their first one."""
    first: dict[str, int] = {}
    leader = list(range(len(keys)))

    def find(place: int) -> int:
        while leader[place] != place:
            leader[place] = place = leader[leader[place]]
        return place

    for place, names in enumerate(keys):
        for name in names:
            a, b = sorted((find(first.setdefault(name, place)), find(place)))
            leader[b] = a
    groups: dict[int, list[int]] = {}
    for place in range(len(keys)):
        groups.setdefault(find(place), []).append(place)
    return list(groups.values())


def too_few_rows(option: str, batch_size: int, rows: int, path: Path) -> str:
    """Say that a batch has more rows than there are."""
    return f"{option} {batch_size}, but {path} leaves only {rows} to train on; lower it or give more data"


def encode_prompt_set(
    records: Sequence[PromptRecord], model: Model, max_length: int, too_long: TooLong, encoder: Encoder | None = None
) -> tuple[PromptSet, int]:
    """Encode prompts as token rows and as the text of those tokens; and count those that were too long.

    Args:
      encoder: a template of LLaMA-Factory, in place of the tokenizer's own.

    Of a prompt that "truncate_left" cut, the text is cut too: rewards that read text score what the policy read.
    """
    where = [record.where for record in records]
    if encoder is not None:
        found = by_template.encode_prompts(records, encoder, max_length, too_long)
        written = [str(model.tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in found.rows]
        return PromptSet(found.rows, written, [records[i].metadata for i in found.kept], found.kept), found.too_long
    encoded = encode_prompts([record.prompt for record in records], model.tokenizer, max_length, too_long, where)
    kept = [records[i] for i in encoded.kept]
    texts = [render(record.prompt, model.tokenizer, record.where) for record in kept]
    if too_long == "truncate_left" and encoded.too_long:
        pairs = zip(encoded.rows, texts, strict=True)
        texts = [text if len(row) < max_length else _tail(row, text, model) for row, text in pairs]
    return PromptSet(encoded.rows, texts, [record.metadata for record in kept], encoded.kept), encoded.too_long


def _tail(row: Sequence[int], text: str, model: Model) -> str:
    """Find the end of `text` that its last tokens, in `row`, stand for; all of it where `row` holds them all."""
    fast = getattr(model.tokenizer, "is_fast", False)
    found = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
    ids = list(found["input_ids"])
    if list(row[-len(ids) :]) == ids:
        return text
    own = row[1:] if row[0] == model.tokenizer.bos_token_id else row  # BOS, which stays in front
    return text[found["offset_mapping"][-len(own)][0] :] if fast else model.decode(np.asarray(own))


def describe_unknown(model: Model, rows: Iterable[Sequence[int]]) -> str:
    """Say what share of tokens stands for words that the tokenizer does not know; "" for less than a tenth.

    The first thousand rows are looked at. A byte-level tokenizer may name such a token, but never gives it.
    """
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    name = model.tokenizer.unk_token if backend is None else getattr(backend.model, "unk_token", None)
    if name is None:
        return ""
    # Where that token also begins or ends a text, as it may in a toy, both ends are left out.
    ends = {model.tokenizer.bos_token_id, *model.stop_ids}
    unknown, seen = model.tokenizer.convert_tokens_to_ids(name), [list(row) for row in islice(rows, 1000) if len(row)]
    inner = [token for row in seen for token in row[row[0] in ends : len(row) - (row[-1] in ends)]]
    share = inner.count(unknown) / max(len(inner), 1)
    if share < 0.1:
        return ""
    return f"{share:.0%} of the tokens are {name!r}, which stands for words that this model's tokenizer does not know"


def check_room(
    model: Model, rows: Sequence[Sequence[int]], response: int = 0, option: str = "--sampling.response-length"
) -> None:
    """Raise ValueError unless the longest row and `response` more tokens fit into the model's positions.

    The message says which option to lower: where rows get responses, of the length that `option` gives, --max-prompt
    limits them, or that option must be lowered first; rows without are limited by --max-length.
    """
    longest, room = max(map(len, rows)), model.config.max_positions
    if longest + response <= room:
        return
    more, limit, left = "", "--max-length", room - response
    if response:
        more, limit = f" and {response} of response", "--max-prompt"
    advice = f'Lower {limit} to {left} and choose --too-long "truncate_left" or "drop"'
    if response and left < 2:  # no prompt is so short
        advice = f"Lower {option} to {max(room - longest, room // 2)}"
    raise ValueError(
        f"the longest text has {longest} tokens; these{more} do not fit into the {room} positions of {model.name}. "
        + advice
    )
