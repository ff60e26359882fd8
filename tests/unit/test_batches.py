"""Examples in rows of their own and in rows that they share, read back as a network sees them.

Run: pytest tests/unit/test_batches.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cooperllm.batches import batch_of
from cooperllm.completion import Encoded, packed

PAD = 99


def examples_of(lengths):
    """Tokens that say which example they are of; all but the first are targets."""
    rows = [100 * (1 + number) + np.arange(length) for number, length in enumerate(lengths)]
    return Encoded(token_ids=rows, labels=np.full(len(rows), -1), starts=np.ones(len(rows), np.int64))


lengths_of_examples = st.lists(st.integers(2, 30), min_size=1, max_size=12)


@given(lengths_of_examples)
def test_every_example_is_in_one_row_and_no_row_is_longer_than_the_longest(lengths):
    rows = packed(lengths)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    filled = [sum(lengths[position] for position in row) for row in rows]
    assert max(filled) == max(lengths)
    for late, row in enumerate(rows):  # first fit: not even its shortest would find room in a row before
        assert all(filled[early] + min(lengths[position] for position in row) > max(lengths) for early in range(late))


@given(lengths_of_examples)
def test_in_shared_rows_examples_are_whole_with_positions_of_their_own_and_targets_in_the_same_order(lengths):
    examples, indices = examples_of(lengths), range(len(lengths))
    alone = batch_of(examples, indices, [[position] for position in indices], PAD)
    shared = batch_of(examples, indices, packed(lengths), PAD)
    assert alone.positions is None
    assert torch.equal(shared.labels, alone.labels)
    for batch in (alone, shared):
        ids = batch.token_ids.flatten()
        assert torch.equal(ids[batch.places + 1], batch.labels)
        assert torch.equal(ids[batch.mask.flatten() > 0].sort().values, torch.from_numpy(np.sort(np.concatenate(examples.token_ids))))
        assert (ids[batch.mask.flatten() == 0] == PAD).all()
    if shared.positions is not None:
        assert torch.equal(shared.positions[shared.mask > 0], shared.token_ids[shared.mask > 0] % 100)
        assert not shared.positions[shared.mask == 0].any()


def test_equally_long_examples_keep_their_order():
    assert packed([2, 4, 2, 2]) == [[1], [0, 2], [3]]


@pytest.mark.parametrize("lengths", [[7], [7, 7]])
def test_where_nothing_can_be_shared_a_batch_is_the_one_that_it_always_was(lengths):
    batch = batch_of(examples_of(lengths), range(len(lengths)), packed(lengths), PAD)
    assert batch.positions is None
    assert len(batch.given) == 3
