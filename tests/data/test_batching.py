from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from mixlm.data.batching import (
    LengthBucketedBatches,
    Permutation,
    Position,
    collate,
    evaluation_batches,
    training_batches,
)
from mixlm.errors import UserError

REPEATABLE = settings(derandomize=True, max_examples=40, deadline=None)
LENGTHS = np.random.default_rng(0).integers(3, 60, 1000)


def rows_of(micro_batches):
    return [index for micro_batch in micro_batches for _, index in micro_batch]


def epoch_of_steps(batches, position=None):
    """The steps up to the end of the epoch."""
    steps = []
    for after, micro_batches in batches.steps(position):
        steps.append((after, micro_batches))
        if after.step_in_epoch == 0:
            return steps


@REPEATABLE
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_a_permutation_is_a_bijection(size, seed):
    images = Permutation(size, seed)(np.arange(size))
    assert images.dtype == np.int64
    assert (np.sort(images) == np.arange(size)).all()


def test_a_permutation_has_random_access_at_any_size():
    permutation = Permutation(10**12 + 7, (3, 5))
    positions = np.array([[0, 1], [10**12, 10**12 + 6]])
    images = permutation(positions)
    assert images.shape == (2, 2)
    assert ((images >= 0) & (images < 10**12 + 7)).all()
    assert permutation(np.array([10**12]))[0] == images[1, 0]


def test_a_permutation_is_spread_evenly():
    counts = np.zeros((7, 7))
    for seed in range(2000):
        counts[np.arange(7), Permutation(7, seed)(np.arange(7))] += 1
    expected = 2000 / 7
    assert ((counts - expected) ** 2 / expected).sum() < 90  # chi-square of 36 degrees of freedom: p < 1e-6
    shuffled = Permutation(20000, 1)(np.arange(20000))
    assert abs(np.corrcoef(shuffled, np.arange(20000))[0, 1]) < 0.03
    assert abs(np.corrcoef(shuffled[1:], shuffled[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("options", [{"rows_per_step": 24}, {"tokens_per_step": 900}], ids=["rows", "tokens"])
def test_each_row_comes_once_an_epoch(options):
    batches = LengthBucketedBatches(LENGTHS, seed=1, window_steps=8, **options)
    orders = []
    order_of_lengths = set()
    position = None
    for epoch in range(2):
        steps = epoch_of_steps(batches, position)
        position = steps[-1][0]
        assert position == Position(epoch + 1)
        assert all(key_epoch == epoch for _, micro_batches in steps for key_epoch, _ in micro_batches[0])
        rows = [row for _, micro_batches in steps for row in rows_of(micro_batches)]
        assert len(set(rows)) == len(rows)
        assert len(rows) == (1000 // 24 * 24 if "rows_per_step" in options else 1000)
        orders.append(rows)
        longest = [LENGTHS[rows_of(micro_batches)].max() for _, micro_batches in steps[:8]]
        order_of_lengths.add(tuple(np.argsort(longest, kind="stable").tolist()))
    assert orders[0] != orders[1]
    assert len(order_of_lengths) == 2


def test_each_epoch_leaves_other_rows_over():
    batches, left_over, position = LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=24), [], None
    for _ in range(4):
        steps = epoch_of_steps(batches, position)
        position = steps[-1][0]
        left_over.append(set(range(1000)).difference(*(rows_of(micro_batches) for _, micro_batches in steps)))
    assert {len(rows) for rows in left_over} == {1000 % 24} and len(set.union(*left_over)) > 3 * (1000 % 24)


def test_each_window_has_its_batches_in_another_order():
    steps = epoch_of_steps(LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=10, window_steps=10))
    longest = np.array([LENGTHS[rows_of(micro_batches)].max() for _, micro_batches in steps]).reshape(10, 10)
    assert len({tuple(order) for order in np.argsort(longest, kind="stable").tolist()}) == 10


def test_rows_mode_has_a_known_number_of_full_steps():
    batches = LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=24, window_steps=8)
    steps = epoch_of_steps(batches)
    assert len(steps) == batches.steps_per_epoch == 41
    assert {len(rows_of(micro_batches)) for _, micro_batches in steps} == {24}
    shorter = LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=24, window_steps=8, max_steps_per_epoch=13)
    assert shorter.steps_per_epoch == 13
    assert [rows for _, rows in epoch_of_steps(shorter)] == [rows for _, rows in steps[:13]]


def test_tokens_mode_keeps_to_its_budget():
    batches = LengthBucketedBatches(LENGTHS, seed=1, tokens_per_step=900, ranks=2, micro_batches=2, window_steps=8)
    for _, micro_batches in epoch_of_steps(batches):
        assert all(micro_batches)
    for _, micro_batches in epoch_of_steps(LengthBucketedBatches(LENGTHS, seed=1, tokens_per_step=900)):
        rows = rows_of(micro_batches)
        assert len(rows) * LENGTHS[rows].max() <= 900
    with pytest.raises(ValueError, match="tokens_per_step"):
        _ = batches.steps_per_epoch


def test_a_budget_of_tokens_below_the_number_of_parts_is_exceeded():
    batches = LengthBucketedBatches(LENGTHS, seed=1, tokens_per_step=10, ranks=3, micro_batches=2)
    for _, micro_batches in epoch_of_steps(batches):
        assert [len(micro_batch) for micro_batch in micro_batches] == [1, 1]


def test_bucketing_saves_padding():
    batches = LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=8)
    tokens = padded = 0
    for _, micro_batches in epoch_of_steps(batches):
        lengths = LENGTHS[rows_of(micro_batches)]
        tokens += lengths.sum()
        padded += len(lengths) * lengths.max()
    assert padded / tokens < 1.03


@pytest.mark.parametrize("options", [{"rows_per_step": 25}, {"tokens_per_step": 900}], ids=["rows", "tokens"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 1), (3, 2), (4, 3)])
def test_the_global_batch_does_not_depend_on_ranks_and_micro_batches(options, ranks, micro_batches):
    whole = islice(LengthBucketedBatches(LENGTHS, seed=3, window_steps=4, **options).steps(), 80)
    # Of a window's last, small batch there may not be enough for everyone.
    whole = [step for _, step in whole if len(rows_of(step)) >= ranks * micro_batches][:60]
    shared = [
        list(
            islice(
                LengthBucketedBatches(
                    LENGTHS,
                    seed=3,
                    window_steps=4,
                    ranks=ranks,
                    rank=rank,
                    micro_batches=micro_batches,
                    **options,
                ).steps(),
                60,
            )
        )
        for rank in range(ranks)
    ]
    for step, global_batch in enumerate(whole):
        parts = [shared[rank][step] for rank in range(ranks)]
        assert len({position for position, _ in parts}) == 1
        assert sorted(rows_of(global_batch)) == sorted(row for _, part in parts for row in rows_of(part))
        for micro_batch in range(micro_batches):
            sizes = [len(part[micro_batch]) for _, part in parts]
            longest = [max(LENGTHS[index] for _, index in part[micro_batch]) for _, part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert max(longest) - min(longest) <= 20


@REPEATABLE
@given(
    done=st.integers(0, 130),
    seed=st.integers(0, 50),
    mode=st.sampled_from([{"rows_per_step": 24}, {"tokens_per_step": 900}]),
    most=st.sampled_from([None, 13]),
)
def test_a_resumed_order_goes_on_as_if_nothing_had_happened(done, seed, mode, most):
    def make():
        return LengthBucketedBatches(LENGTHS, seed=seed, window_steps=8, max_steps_per_epoch=most, **mode)

    steps = list(islice(make().steps(), done + 20))
    position = Position() if done == 0 else steps[done - 1][0]
    position = Position.from_dict(position.to_dict())
    assert list(islice(make().steps(position), 20)) == steps[done:]


def test_an_epoch_that_has_become_shorter_ends_with_the_next_step():
    whole = LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=24, window_steps=8)
    shorter = LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=24, window_steps=8, max_steps_per_epoch=5)
    for done, epoch in ((3, 0), (4, 1), (10, 1)):
        position = list(islice(whole.steps(), done))[-1][0]
        assert next(shorter.steps(position))[0].epoch == epoch


def test_a_run_resumes_on_another_number_of_ranks():
    few = LengthBucketedBatches(LENGTHS, seed=3, tokens_per_step=900, window_steps=4)
    many = LengthBucketedBatches(LENGTHS, seed=3, tokens_per_step=900, window_steps=4, ranks=6)
    steps = list(islice(few.steps(), 100))
    for done in range(60):
        after = [rows_of(step) for _, step in steps[done + 1 :]]
        expected = next(rows for rows in after if len(rows) >= 6)
        assert rows_of(next(many.steps(steps[done][0]))[1]) == expected[::6]


def test_a_last_window_that_more_ranks_cannot_share_is_passed_over():
    """259 rows of 16 tokens: two ranks make 65 steps of 4 rows, the last of 3, for which four are too many."""
    lengths = np.full(259, 16)
    few = LengthBucketedBatches(lengths, seed=0, tokens_per_step=64, ranks=2)
    many = LengthBucketedBatches(lengths, seed=0, tokens_per_step=64, ranks=4)
    position = list(islice(few.steps(), 64))[-1][0]
    assert (position.window, position.batch) == (many.windows, 0)
    after, _ = next(many.steps(position))
    assert after.epoch == position.epoch + 1


def test_the_windows_follow_each_other_in_the_order_of_the_epoch():
    batches = LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=10, window_steps=2)
    steps = [rows_of(micro_batches) for _, micro_batches in epoch_of_steps(batches)]
    order = Permutation(len(LENGTHS), (1, 0))(np.arange(len(LENGTHS))).tolist()
    for window in range(50):
        assert sorted(steps[2 * window] + steps[2 * window + 1]) == sorted(order[20 * window : 20 * window + 20])


def test_too_little_data_is_refused():
    with pytest.raises(UserError, match="the data has 1000 rows and one step needs 1001"):
        LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=1001)
    with pytest.raises(UserError, match="the data has 3 rows and one step needs 8"):
        LengthBucketedBatches(LENGTHS[:3], seed=1, tokens_per_step=500, ranks=4, micro_batches=2)
    with pytest.raises(UserError, match="the data has 0 rows"):
        LengthBucketedBatches(LENGTHS[:0], seed=1, tokens_per_step=500)
    with pytest.raises(UserError, match="use at least 8 rows"):
        LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=7, ranks=4, micro_batches=2)
    with pytest.raises(UserError, match="use at most 41"):
        LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=24, max_steps_per_epoch=42)
    LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=24, max_steps_per_epoch=41)


@pytest.mark.parametrize("position", [Position(0, 0, 99, 99), Position(0, 99, 0, 99), Position(2, 5, 1, 40)])
def test_a_position_of_other_data_is_refused(position):
    batches = LengthBucketedBatches(LENGTHS, seed=1, rows_per_step=24, window_steps=8)
    with pytest.raises(UserError, match="not in this data"):
        next(batches.steps(position))


def test_exactly_one_kind_of_batch_size_is_given():
    for options in ({}, {"rows_per_step": 1, "tokens_per_step": 1}):
        with pytest.raises(ValueError, match="exactly one"):
            LengthBucketedBatches(LENGTHS, seed=1, **options)


def test_collate_pads_each_field_in_its_own_way():
    examples = [
        {"input_ids": np.array([1, 2]), "token_type_ids": np.array([1, 1]), "labels": np.array([7, 8]), "order": 1},
        {"input_ids": np.array([3]), "token_type_ids": np.array([1]), "labels": np.array([9]), "order": -100},
    ]
    context = {"context_input_ids": np.array([4, 5, 6]), "context_labels": np.array([4, 5, 6])}
    batch = collate([{**examples[0], **context}, {**examples[1], **context}], pad_token_id=50)
    assert {field: tensor.tolist() for field, tensor in batch.items()} == {
        "input_ids": [[1, 2], [3, 50]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[1, 1], [1, 0]],
        "labels": [[7, 8], [9, -100]],
        "order": [1, -100],
        "context_input_ids": [[4, 5, 6]] * 2,
        "context_attention_mask": [[1, 1, 1]] * 2,
        "context_labels": [[4, 5, 6]] * 2,
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_makes_a_row_of_each_text_of_a_list():
    examples = [
        {"context_input_ids": [np.array([4, 5]), np.array([6])], "number": [1, 2], "order": 7},
        {"context_input_ids": [np.array([7, 8, 9])], "number": [3], "order": 8},
        {"context_input_ids": [np.array([4]), np.array([5])], "number": [4, 5], "order": 9},
    ]
    batch = collate(examples, pad_token_id=50)
    assert {field: tensor.tolist() for field, tensor in batch.items()} == {
        "context_input_ids": [[4, 5, 50], [6, 50, 50], [7, 8, 9], [4, 50, 50], [5, 50, 50]],
        "context_attention_mask": [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]],
        "context_first_rows": [0, 2, 3],
        "number": [1, 2, 3, 4, 5],
        "order": [7, 8, 9],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


class NumberedExamples(Dataset):
    """Examples that tell their key."""

    lengths = LENGTHS

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, key):
        epoch, index = key
        ids = np.full(self.lengths[index], index)
        return {"input_ids": ids, "labels": ids, "epoch": epoch}


def make_batches():
    return LengthBucketedBatches(LENGTHS[:100], seed=1, rows_per_step=12, micro_batches=2, window_steps=4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_follow_the_order_over_epochs_and_from_any_position(num_workers):
    expected = list(islice(make_batches().steps(), 20))
    for done in (0, 11):
        position = expected[done - 1][0] if done else None
        random_state = torch.get_rng_state()
        stream = training_batches(NumberedExamples(), make_batches(), position, 9999, num_workers=num_workers)
        for (after, keys), (found_after, micro_batches) in zip(expected[done:], stream, strict=False):
            assert found_after == after
            assert len(micro_batches) == 2
            found = [
                list(zip(batch["epoch"].tolist(), batch["input_ids"][:, 0].tolist(), strict=True))
                for batch in micro_batches
            ]
            assert found == keys
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("rows", "ranks"), [(8, 1), (7, 3), (1, 2), (1, 3), (1, 4), (64, 4), (5000, 2)])
def test_evaluation_has_every_example_once_and_keeps_the_ranks_together(rows, ranks):
    parts = [list(evaluation_batches(NumberedExamples(), rows, 0, rank, ranks)) for rank in range(ranks)]
    counting = [batch for part in parts for batch, counts in part if counts]
    found = [index for batch in counting for index in batch["input_ids"][:, 0].tolist()]
    assert sorted(found) == list(range(len(LENGTHS)))
    assert len({len(part) for part in parts}) == 1
    assert all(len(batch["input_ids"]) <= rows and not batch["epoch"].any() for part in parts for batch, _ in part)
    longest = [batch["input_ids"].shape[1] for batch, _ in parts[0]]
    assert longest == sorted(longest, reverse=True)


def test_evaluation_of_fewer_examples_than_ranks():
    class Few(NumberedExamples):
        lengths = LENGTHS[:2]

    parts = [list(evaluation_batches(Few(), 4, 0, rank, 3)) for rank in range(3)]
    assert [[counts for _, counts in part] for part in parts] == [[True], [True], [False]]
    assert len(parts[2][0][0]["input_ids"]) == 1
