"""Padding by hand; batches as a function of the step."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_jax.data import left_pad, pair_batches, prompt_batches, right_pad, sft_batches
from ppo_jax.data.batches import Mixture

PAD = 9
ROWS = [[10 + i] * (1 + i % 3) for i in range(7)]  # row i holds the id 10 + i, one to three times


def test_padding() -> None:
    tokens, mask = left_pad([[1, 2], [PAD, 3, 4]], 4, PAD)
    np.testing.assert_array_equal(tokens, [[PAD, PAD, 1, 2], [PAD, PAD, 3, 4]])
    # The mask is of places: a pad id inside a row is a token like any other.
    np.testing.assert_array_equal(mask, [[0, 0, 1, 1], [0, 1, 1, 1]])
    tokens, mask = right_pad([[1, 2], [PAD, 3, 4]], 4, PAD)
    np.testing.assert_array_equal(tokens, [[1, 2, PAD, PAD], [PAD, 3, 4, PAD]])
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 1, 1, 0]])
    with pytest.raises(ValueError, match="row 1 has 3 tokens, there is room for 2"):
        left_pad([[1], [1, 2, 3]], 2, PAD)


@given(rows=st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=4), extra=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_padding_keeps_every_token(rows: list[list[int]], extra: int) -> None:
    length = max(map(len, rows), default=0) + extra
    for pad in (left_pad, right_pad):
        tokens, mask = pad(rows, length, PAD)
        assert tokens.shape == mask.shape == (len(rows), length)
        assert [list(row[on]) for row, on in zip(tokens, mask, strict=True)] == rows
        assert np.all(tokens[~mask] == PAD)


@given(size=st.integers(1, 12), batch_size=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_every_epoch_has_every_prompt_once(size: int, batch_size: int, seed: int) -> None:
    rows = [[i, i] for i in range(size)]
    if batch_size > size:
        with pytest.raises(ValueError, match=f"batch_size={batch_size} but there are {size} prompts"):
            prompt_batches(rows, batch_size, seed, PAD)
        return
    batches = prompt_batches(rows, batch_size, seed, PAD)
    epochs = 3
    seen = np.concatenate([batches[step].index for step in range(-(-epochs * size // batch_size))])
    for epoch in range(epochs):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_prompt_batches() -> None:
    batches = prompt_batches(ROWS, 4, 0, PAD)
    for step in range(6):
        batch = batches[step]
        assert batch.tokens.shape == (4, 3) and batch.tokens.dtype == np.int32 and batch.index.dtype == np.int32
        for tokens, mask, index in zip(*batch[:3], strict=True):
            assert list(tokens[mask]) == ROWS[index] and mask[-1]
    assert prompt_batches(ROWS, 4, 0, PAD, length=5)[0].tokens.shape == (4, 5)
    with pytest.raises(ValueError, match="row 2 has 3 tokens, there is room for 2"):
        prompt_batches(ROWS, 4, 0, PAD, length=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        prompt_batches(ROWS, 0, 0, PAD)
    with pytest.raises(ValueError, match="seed=-1 must be"):
        prompt_batches(ROWS, 4, -1, PAD)


def test_the_step_is_the_whole_cursor() -> None:
    first, again = prompt_batches(ROWS, 3, 5, PAD), prompt_batches(ROWS, 3, 5, PAD)
    steps = range(10)
    expected = [first[step].index.tolist() for step in steps]
    # A fresh pipeline read in another order, and far ahead, gives the same batches.
    assert again[1_000_000].index.tolist() == first[1_000_000].index.tolist()
    assert [again[step].index.tolist() for step in reversed(steps)] == expected[::-1]


def test_orders_differ_between_epochs_and_seeds() -> None:
    rows = [[i] for i in range(50)]
    epochs = [tuple(prompt_batches(rows, 50, seed, PAD)[epoch].index) for seed in (0, 1) for epoch in range(4)]
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert tuple(range(50)) not in epochs


def test_pair_batches() -> None:
    rejected = [[20 + i] * (4 - i % 3) for i in range(7)]
    margins = [0.5 * i for i in range(7)]
    batches = pair_batches(ROWS, rejected, margins, 2, 0, PAD)
    for step in range(12):
        batch = batches[step]
        assert batch.chosen.shape == batch.rejected.shape == (2, 4)  # the longest row of all
        for row, index in enumerate(batch.index):
            assert list(batch.chosen[row][batch.chosen_mask[row]]) == ROWS[index]
            assert list(batch.rejected[row][batch.rejected_mask[row]]) == rejected[index]
            assert batch.margin[row] == margins[index]
    with pytest.raises(ValueError, match="6 margins for 7 pairs"):
        pair_batches(ROWS, rejected, margins[:-1], 2, 0, PAD)
    with pytest.raises(ValueError, match="batch_size=8 but there are 7 pairs"):
        pair_batches(ROWS, rejected, margins, 8, 0, PAD)


def test_sft_batches() -> None:
    rows, starts = [[5, 6, 7, 8], [3, 4]], [2, 0]
    batch = sft_batches(rows, starts, 2, 0, PAD)[0]
    order = np.argsort(batch.index)
    np.testing.assert_array_equal(batch.tokens[order], [[5, 6, 7, 8], [3, 4, PAD, PAD]])
    np.testing.assert_array_equal(batch.mask[order], [[1, 1, 1, 1], [1, 1, 0, 0]])
    # Row 0: its response. Row 1: all of it but the first token, which nothing precedes; never the pads.
    np.testing.assert_array_equal(batch.loss_mask[order], [[0, 0, 1, 1], [0, 1, 0, 0]])


# -- several files -----------------------------------------------------------------------------------------------------


def _mixed(weights: list[float], sizes: list[int], batch_size: int, seed: int = 0):
    members = [number for number, size in enumerate(sizes) for _ in range(size)]
    rows = [[2 + member] for member in members]
    mix = Mixture(members, weights)
    return members, prompt_batches(rows, batch_size, seed, 0, mix=mix), rows, mix


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0, 0.5]), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 3),
)
@settings(max_examples=10, deadline=None)
def test_each_file_gets_its_share_of_every_batch(files: list[tuple[float, int]], seed: int) -> None:
    """Of the first n rows each file has its share to within a row for each file, at every batch's end."""
    weights, sizes = [weight for weight, _ in files], [size for _, size in files]
    members, batches, rows, _ = _mixed(weights, sizes, batch_size=1, seed=seed)
    counts = np.zeros(len(files))
    for step in range(60):
        index = int(batches[step].index[0])
        counts[members[index]] += 1
        assert batches[step].tokens[0, 0] == rows[index][0]
        shares = np.asarray(weights) / sum(weights) * (step + 1)
        assert np.all(np.abs(counts - shares) < len(files) + 1e-6)


def test_a_mixture_goes_through_every_file_in_epochs_of_its_own() -> None:
    """By the step alone: a later one first, and again, gives what it gave."""
    members, batches, _, _ = _mixed([3.0, 1.0], [6, 2], batch_size=4)
    seen = [[int(i) for i in batches[step].index] for step in range(6)]
    assert [int(i) for i in batches[4].index] == seen[4]
    for number, size in ((0, 6), (1, 2)):
        order = [i for batch in seen for i in batch if members[i] == number]
        epochs = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        assert all(sorted(epoch) == [i for i, m in enumerate(members) if m == number] for epoch in epochs)
    assert all(sum(members[i] for i in batch) == 1 for batch in seen)  # 3 to 1 in every batch of 4


def test_a_file_without_rows_cannot_be_mixed_in() -> None:
    with pytest.raises(ValueError, match="of file 2 of 2 there are no prompts left"):
        prompt_batches([[1], [2]], 1, 0, 0, mix=Mixture([0, 0], [1.0, 1.0]))


def test_masks_say_what_is_learnt() -> None:
    batch = sft_batches([[5, 6, 7], [8, 9]], [1, 1], 2, 0, 0, masks=[[False, True, False], [False, True]])[0]
    for row, index in zip(batch.loss_mask, batch.index, strict=True):
        assert row.tolist() == [False, True, False], index
