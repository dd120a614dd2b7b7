"""The rows of every stage by a template, and LLaMA-Factory's way of cutting them to a length ("share").

It keeps the beginnings of prompt and answer:

    an answer shorter than half the room stays whole, and the prompt gets what is left
    else a prompt shorter than half the room stays whole, and the answer gets what is left
    else each gets its share:  room * answer / (prompt + answer)  for the answer, rounded down
"""

from collections.abc import Sequence

from ppo_jax.data.encode import EncodedPairs, EncodedPrompts, TooLong, limit_rows
from ppo_jax.data.llamafactory.encoding import Encoder, Pair, read_conversation
from ppo_jax.data.records import PairRecord, PromptRecord, SFTRecord
from ppo_jax.data.turns import EncodedTurns


def share_room(asked: int, answered: int, room: int) -> tuple[int, int]:
    """Compute how many tokens of a prompt and of its answer are kept within `room`."""
    if 2 * answered < room:
        most = room
    elif 2 * asked < room:
        most = room - asked
    else:
        most = int(room * (answered / (asked + answered)))
    kept = min(most, answered)
    return min(max(room - kept, 0), asked), kept


def encode_demonstrations(
    records: Sequence[SFTRecord], encoder: Encoder, max_length: int, too_long: TooLong = "error", last: bool = False
) -> EncodedTurns:
    """Encode each conversation as one row.

    Args:
      too_long: "share" cuts as above, turn by turn; later turns for which no room is left are dropped.
      last: learn the last answer alone; room is then given to the last turns first.

    A row of which nothing is learnt stays. Raises ValueError for one that is too long (unless it is to be cut or
    dropped), and where no row is left that teaches anything.
    """
    rows, masks, lengths = [], [], []
    for record in records:
        pairs = encoder.encode_turns(read_conversation(record.prompt, record.response, record.where))
        lengths.append(sum(len(asked) + len(answered) for asked, answered in pairs) + len(encoder.closing))
        row, mask = _join(pairs, encoder, max_length if too_long == "share" else lengths[-1], last)
        rows.append(row)
        masks.append(mask)
    kept, count = _limit(lengths, max_length, too_long, [record.where for record in records])
    chosen = [masks[i] for i in kept]
    if not any(any(mask[1:]) for mask in chosen):  # nothing stands before the first token
        raise ValueError(f"no answer is left within {max_length} tokens")
    starts = [mask.index(True) if True in mask else len(mask) for mask in chosen]
    return EncodedTurns([rows[i] for i in kept], starts, chosen, kept, count)


def _join(pairs: Sequence[Pair], encoder: Encoder, room: int, last: bool) -> tuple[list[int], list[bool]]:
    """Join turns to a row within `room` tokens, and say which are learnt."""
    closing, pieces = encoder.closing, list[tuple[list[int], list[bool]]]()
    total = len(closing)
    for number, (asked, answered) in enumerate(reversed(pairs) if last else pairs):
        if total >= room:
            break
        before, behind = share_room(len(asked), len(answered), room - total)
        total += before + behind
        learnt = not (last and number)
        pieces.append((asked[:before] + answered[:behind], [False] * before + [learnt] * behind))
    ordered = pieces[::-1] if last else pieces
    row = [token for tokens, _ in ordered for token in tokens]
    mask = [learnt for _, marks in ordered for learnt in marks]
    return [*row, *closing], [*mask, *[True] * len(closing)]


def encode_preferences(
    records: Sequence[PairRecord], encoder: Encoder, max_length: int, too_long: TooLong = "error"
) -> EncodedPairs:
    """Encode prompt + each answer, its end token included. With "share" the longer answer decides what is kept."""
    sides: list[list[tuple[list[int], int]]] = [[], []]
    lengths = []
    for record in records:
        asked, *answers = _encode_sides(record, encoder)
        longest = max(map(len, answers))
        lengths.append(len(asked) + longest)
        before, behind = share_room(len(asked), longest, max_length) if too_long == "share" else (len(asked), longest)
        for side, answer in zip(sides, answers, strict=True):
            side.append((asked[:before] + answer[:behind], before))
    kept, count = _limit(lengths, max_length, too_long, [record.where for record in records])
    chosen, rejected = ([side[i] for i in kept] for side in sides)
    starts = [(a, b) for (_, a), (_, b) in zip(chosen, rejected, strict=True)]
    margins = [records[i].margin for i in kept]
    return EncodedPairs([row for row, _ in chosen], [row for row, _ in rejected], margins, kept, count, starts)


def _encode_sides(record: PairRecord, encoder: Encoder) -> list[list[int]]:
    """Encode (prompt, chosen answer, rejected answer)."""
    found: list[list[int]] = []
    for text in (record.chosen, record.rejected):
        prompt, answer = record.prompt, text
        if isinstance(text, list):
            prompt, answer = [*(record.prompt or []), *text[:-1]], text[-1]  # type: ignore[assignment]
        asked, answered = encoder.encode_last(read_conversation(prompt, answer, record.where))  # type: ignore[arg-type]
        found = [*(found or [asked]), [*answered, *encoder.closing]]
    return found


def encode_prompts(
    records: Sequence[PromptRecord], encoder: Encoder, max_length: int, too_long: TooLong = "error"
) -> EncodedPrompts:
    """Encode prompts. With "share" an answer that stands beside a prompt (`answer` in its metadata) counts as well."""
    rows, lengths = [], []
    for record in records:
        beside = record.metadata.get("answer")
        answer = beside if isinstance(beside, str) or isinstance(beside, dict) and "role" in beside else ""
        asked, answered = encoder.encode_last(read_conversation(record.prompt, answer, record.where))
        lengths.append(len(asked))
        if too_long == "share":
            before, _ = share_room(len(asked), len(answered) + len(encoder.closing), max_length)
            asked = asked[:before]
        rows.append(asked)
    if too_long == "share":
        cut = sum(len(row) < length for row, length in zip(rows, lengths, strict=True))
        return EncodedPrompts(rows, list(range(len(rows))), cut)
    kept, count = _limit(lengths, max_length, too_long, [record.where for record in records])
    return EncodedPrompts([rows[i] for i in kept], kept, count)


def _limit(lengths: list[int], max_length: int, too_long: TooLong, names: list[str]) -> tuple[list[int], int]:
    if too_long == "truncate_left":
        raise ValueError("--too-long truncate_left does not go with --dataset.template.name; choose share, or drop")
    if too_long == "share":
        return list(range(len(lengths))), sum(length > max_length for length in lengths)
    return limit_rows(lengths, max_length, too_long, names)
