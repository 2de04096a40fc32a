"""An epoch over shards visits every image once, from few shards at a time, and each process reads few of those."""

import numpy as np
import pytest

from mirl.data.loading import StepSampler, epoch_order
from mirl.data.order import HELD_OUT_SHARDS, WINDOW, ShardOrder, held_out_candidates, sampled_indices
from mirl.tasks.pretrain import split_off_held_out

SIZES = np.random.default_rng(0).integers(20, 60, 5 * WINDOW)
ENDS = np.cumsum(SIZES)
COUNT, BATCH = int(ENDS[-1]), 64


def keys(*, start=0, stop=2 * (COUNT // BATCH), rank=0, world_size=1, ends=ENDS, micro_batch=16, seed=3):
    sampler = StepSampler(
        COUNT, BATCH, micro_batch, seed=seed, start=start, stop=stop, rank=rank, world_size=world_size,
        shards=None if ends is None else ShardOrder(ends),
    )  # fmt: skip
    return [key for batch in sampler for key in batch]


def test_an_epoch_visits_each_sample_once_in_an_order_of_its_own():
    order = ShardOrder(ENDS)
    first, second = (order.epoch(3, epoch, BATCH) for epoch in (0, 1))
    assert np.array_equal(np.sort(first), np.arange(COUNT)) and not np.array_equal(first, second)
    assert np.array_equal(first, order.epoch(3, 0, BATCH))
    assert not np.array_equal(first, order.epoch(4, 0, BATCH))


def test_few_shards_are_open_at_a_time_and_their_images_are_mixed():
    shards = np.searchsorted(ENDS, ShardOrder(ENDS).epoch(3, 0, BATCH), side="right")
    steps = [set(shards[i : i + BATCH]) for i in range(0, COUNT - BATCH, BATCH)]
    assert max(map(len, steps)) <= WINDOW + 2 * BATCH / SIZES.mean() + 1
    assert min(map(len, steps)) > WINDOW / 2  # from the first step to the last
    lives = [np.ptp(np.nonzero(shards == shard)[0]) for shard in range(len(ENDS))]
    assert sum(life < 1.3 * WINDOW * SIZES.mean() for life in lives) >= len(ENDS) - WINDOW  # others go round the end


def test_a_few_shards_are_mixed_wholly():
    order = ShardOrder(np.array([400, 800]))
    shards = order.epoch(0, 0, 8) >= 400
    runs = shards.reshape(-1, 8).mean(1)
    assert 0.4 < runs[:50].mean() < 0.6 and 0.4 < runs[50:].mean() < 0.6


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_one_and_each_reads_its_own_shards(world_size):
    whole = keys()
    shares = [keys(rank=rank, world_size=world_size) for rank in range(world_size)]
    share = BATCH // world_size
    for step in range(len(whole) // BATCH):
        batch = [key for keys in shares for key in keys[step * share : (step + 1) * share]]
        assert batch == whole[step * BATCH : (step + 1) * BATCH]
    first = [key[1] for key in shares[0] if key[0] == 0]
    shards = np.searchsorted(ENDS, first, side="right")
    read = np.unique(shards)
    assert len(read) < len(ENDS) * (1 / world_size + 0.35)


def test_a_resumed_run_reads_what_the_uninterrupted_one_does():
    whole = keys()
    for start in (1, 7, COUNT // BATCH, COUNT // BATCH + 5):
        assert keys(start=start) == whole[start * BATCH :]


def test_without_shards_the_order_is_what_it_was():
    assert [index for _, index in keys(stop=3, ends=None)] == epoch_order(COUNT, 3, 0)[: 3 * BATCH].tolist()
    assert np.array_equal(epoch_order(9, 3, 1), np.random.default_rng((3, 1)).permutation(9))


def test_of_many_shards_a_few_are_held_out_of():
    training, held_out = split_off_held_out(COUNT, ENDS)
    assert np.array_equal(np.sort(np.concatenate([training, held_out])), np.arange(COUNT))
    assert len(held_out) == round(0.02 * COUNT)
    assert len(np.unique(np.searchsorted(ENDS, held_out, side="right"))) <= HELD_OUT_SHARDS
    few = ENDS[:10]
    for found, expected in zip(split_off_held_out(few[-1], few), split_off_held_out(few[-1]), strict=True):
        assert np.array_equal(found, expected)
    assert len(held_out_candidates(ENDS, COUNT)) == COUNT


def test_a_sample_is_of_the_first_shards():
    class Source:
        ends = ENDS

        def __len__(self):
            return COUNT

    assert sampled_indices(Source(), 64)[-1] < ENDS[3]
    assert sampled_indices(range(COUNT), 64)[-1] == COUNT - 1
    Source.ends = np.array([0, 0, 0, 0, 5, 5, 9])  # the first are missing
    assert sampled_indices(Source(), 64).tolist() == list(range(9))


def test_empty_shards_are_passed_over():
    order = ShardOrder(np.array([0, 5, 5, 9, 9]))
    assert np.array_equal(np.sort(order.epoch(0, 0, 4)), np.arange(9))
