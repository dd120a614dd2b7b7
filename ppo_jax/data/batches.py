"""Token rows -> padded batches that are addressed by the step.

`batches[step]` is a pure function of (rows, seed, step), so the step is the whole state of the data pipeline: a
resumed run sees the rows that the interrupted one would have seen. Every epoch has an order of its own and every
batch is full: one that reaches the end of an epoch goes on with the next. There is no last step.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from ppo_jax.types import Prompts

if TYPE_CHECKING:
    import grain

Batch = TypeVar("Batch")
Rows = Sequence[Sequence[int]]


class PairBatch(NamedTuple):
    """Right-padded. `index` is the row's place in the data."""

    chosen: Int[np.ndarray, "B S"]
    chosen_mask: Bool[np.ndarray, "B S"]
    rejected: Int[np.ndarray, "B S"]
    rejected_mask: Bool[np.ndarray, "B S"]
    margin: Float[np.ndarray, " B"]
    index: Int[np.ndarray, " B"]  # type: ignore[assignment]  # hides tuple.index


class SFTBatch(NamedTuple):
    """Right-padded. `loss_mask` is True on the tokens to be predicted from those before them: response and EOS."""

    tokens: Int[np.ndarray, "B S"]
    mask: Bool[np.ndarray, "B S"]
    loss_mask: Bool[np.ndarray, "B S"]
    index: Int[np.ndarray, " B"]  # type: ignore[assignment]  # hides tuple.index


class Mixture(NamedTuple):
    """How several files are mixed: of `batch_size` x n rows each gets its share, up to one row, at every n."""

    members: Sequence[int]  # of each row, the number of its file
    weights: Sequence[float]  # of each file


def left_pad(rows: Rows, length: int, pad_id: int) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Put rows of token ids at the right end of `length` slots; the mask is True on them.

    Raises:
      ValueError: a row is longer than `length`.
    """
    return _pad(rows, length, pad_id, left=True)


def right_pad(rows: Rows, length: int, pad_id: int) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    """Put rows of token ids at the left end of `length` slots; the mask is True on them. As `left_pad`."""
    return _pad(rows, length, pad_id, left=False)


def prompt_batches(
    rows: Rows, batch_size: int, seed: int, pad_id: int, length: int | None = None, mix: Mixture | None = None
) -> "grain.MapDataset[Prompts]":
    """Batch prompts, left-padded; `Prompts.index` is the row's place in `rows`. The arrays are numpy's.

    Args:
      length: P, the number of prompt slots; the longest row by default. The same in every batch, so that nothing
        is compiled twice.
      mix: the shares of the files that the rows are of; each is gone through in epochs of its own. None: rows of all
        files count alike.

    Raises:
      ValueError: there are fewer rows than `batch_size`, or a row does not fit; or a file of `mix` has no row left.
    """
    tokens, mask = left_pad(rows, length or max(map(len, rows), default=0), pad_id)

    def batch(index: Int[np.ndarray, " B"]) -> Prompts:
        return Prompts(tokens[index], mask[index], index)  # type: ignore[arg-type]  # numpy until it is on the device

    return _by_step(len(rows), batch_size, seed, "prompts", batch, mix)


def pair_batches(
    chosen: Rows,
    rejected: Rows,
    margins: Sequence[float],
    batch_size: int,
    seed: int,
    pad_id: int,
    mix: Mixture | None = None,
) -> "grain.MapDataset[PairBatch]":
    """Batch preferences, padded to the longest row. Raises: as `prompt_batches`."""
    both = [max(len(a), len(b)) for a, b in zip(chosen, rejected, strict=True)]
    margin = np.asarray(margins, np.float32)
    if margin.shape != (len(both),):
        raise ValueError(f"{len(margin)} margins for {len(both)} pairs")
    length = max(both, default=0)

    def batch(index: Int[np.ndarray, " B"]) -> PairBatch:
        better, worse = (right_pad([side[i] for i in index], length, pad_id) for side in (chosen, rejected))
        return PairBatch(*better, *worse, margin[index], index)

    return _by_step(len(both), batch_size, seed, "pairs", batch, mix)


def sft_batches(
    rows: Rows,
    starts: Sequence[int],
    batch_size: int,
    seed: int,
    pad_id: int,
    masks: Sequence[Sequence[bool]] | None = None,
    mix: Mixture | None = None,
) -> "grain.MapDataset[SFTBatch]":
    """Batch demonstrations, rows[i][starts[i]:] being the response. Other arguments and errors as `prompt_batches`.

    Args:
      masks: where they are given, the tokens of rows[i] that are learnt, in place of starts[i].
    """
    # Nothing stands before the first token, so it cannot be predicted.
    first = np.asarray([max(start, 1) for _, start in zip(rows, starts, strict=True)], np.int32)
    length = max(map(len, rows), default=0)

    def batch(index: Int[np.ndarray, " B"]) -> SFTBatch:
        tokens, mask = right_pad([rows[i] for i in index], length, pad_id)
        loss_mask = mask & (np.arange(tokens.shape[1]) >= first[index, None])
        if masks is not None:
            for place, i in enumerate(index):
                loss_mask[place, : len(rows[i])] &= np.asarray(masks[i], bool)
        return SFTBatch(tokens, mask, loss_mask, index)

    return _by_step(len(rows), batch_size, seed, "demonstrations", batch, mix)


def _pad(rows: Rows, length: int, pad_id: int, left: bool) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} tokens, there is room for {length}")
        slots = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, slots], mask[i, slots] = row, True
    return tokens, mask


def _by_step(
    rows: int,
    batch_size: int,
    seed: int,
    what: str,
    batch: Callable[[Int[np.ndarray, " B"]], Batch],
    mix: Mixture | None,
) -> "grain.MapDataset[Batch]":
    """Make the endless data set whose entry `step` is `batch(the rows of that step)`."""
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size={batch_size} but there are {rows} {what}; it must be from 1 to their number")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 to 2**32 - 1")
    import grain  # half a second, needed by those only who train

    if mix is None:
        order = grain.MapDataset.source(range(rows)).seed(seed).shuffle().repeat()
    else:
        parts = [[i for i, member in enumerate(mix.members) if member == number] for number in range(len(mix.weights))]
        for number, part in enumerate(parts, start=1):
            if not part:
                raise ValueError(f"of file {number} of {len(parts)} there are no {what} left to mix in")
        epochs = [
            grain.MapDataset.source(part).seed((seed + number) % 2**32).shuffle().repeat()
            for number, part in enumerate(parts)
        ]
        order = grain.MapDataset.mix(epochs, mix.weights)
    return order.batch(batch_size).map(lambda index: batch(np.asarray(index, np.int32)))
