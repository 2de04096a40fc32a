"""What a run sees is a function of (seed, epoch, index): not of workers, processes or interruptions."""

from functools import partial

import numpy as np
import pytest
import torch

from mirl.data.decode import BadImage
from mirl.data.loading import MAX_CONSECUTIVE_BAD, MaskedImages, StepSampler, collate, seeded
from mirl.data.transforms import fixed_view, training_view
from mirl.data.workers import Batches
from mirl.errors import UserError

COUNT, PATCHES, SIZE = 37, 16, (16, 16)


class Squares:
    """Random images by index; those in `bad` cannot be read, those in `small` are smaller than a patch."""

    def __init__(self, bad=(), small=()):
        self.bad, self.small = set(bad), set(small)

    def __len__(self):
        return COUNT

    def name_of(self, index):
        return f"square[{index}]"

    def read(self, index):
        if index in self.bad:
            raise BadImage("is empty (0 bytes)")
        side = 2 if index in self.small else 20
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator)


def images(source=None, members=None, *, seed=0, mask_ratio=0.75):
    members = np.arange(COUNT) if members is None else members
    return MaskedImages(source or Squares(), members, training_view(SIZE, 0.2, True), patches=PATCHES,
                        smallest=(4, 4), substitute=True, mask_ratio=mask_ratio, key=(seed, 0))  # fmt: skip


def sampler(batch=8, micro_batch=8, *, seed=0, start=0, stop=8, rank=0, world_size=1):
    return StepSampler(COUNT, batch, micro_batch, seed=seed, start=start, stop=stop, rank=rank, world_size=world_size)


def read(workers=0, dataset=None, **options):
    return list(Batches(dataset or images(), sampler(**options), workers=workers, pin=False))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.bad == b.bad
        for name in ("indices", "visible", "masked", "images"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_batches(workers):
    torch.manual_seed(5)  # the state outside must not matter
    assert_same(read(workers), read(0))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_shares_of_all_processes_are_the_global_batch(world_size):
    shares = [read(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_same([collate(parts) for parts in zip(*shares, strict=True)], read())


def test_micro_batches_are_the_batch_in_pieces():
    micro = read(micro_batch=3)
    assert [len(batch) for batch in micro[:3]] == [3, 3, 2]
    assert_same([collate(micro[k : k + 3]) for k in range(0, len(micro), 3)], read())


@pytest.mark.parametrize("start", [1, 4, 6])  # in the first epoch, at its end (37 // 8 steps), in the second
def test_a_late_start_reads_the_tail(start):
    assert_same(read(start=start), read()[start:])


def test_an_epoch_visits_no_image_twice_and_epochs_differ():
    first, second = (np.concatenate([b.indices for b in read(start=s, stop=s + 4)]) for s in (0, 4))
    assert len(set(first)) == len(first) == len(set(second)) == 32
    assert not np.array_equal(first, second)


def test_another_epoch_or_seed_is_another_view_and_mask():
    one, other_epoch, other_seed = images()[0, 3], images()[1, 3], images(seed=1)[0, 3]
    for other in (other_epoch, other_seed):
        assert not torch.equal(one.images, other.images)
        assert not torch.equal(one.visible, other.visible)
    assert not torch.equal(read()[0].indices, read(seed=1)[0].indices)


@pytest.mark.parametrize("mask_ratio", [0.1, 0.5, 0.75, 0.93])
def test_masks_partition_the_patches(mask_ratio):
    for batch in read(dataset=images(mask_ratio=mask_ratio)):
        every = torch.cat([batch.visible, batch.masked], 1).sort(1).values
        assert torch.equal(every, torch.arange(PATCHES).expand_as(every))
        assert batch.visible.shape[1] == int(PATCHES * (1 - mask_ratio))


def test_a_bad_image_is_replaced_by_the_next_and_named():
    sample = images(Squares(bad=[3], small=[4]))[0, 3]
    assert [name for name, _ in sample.bad] == ["square[3]", "square[4]"]
    assert "empty" in sample.bad[0][1] and "2x2 px, smaller than a patch (4x4)" in sample.bad[1][1]
    view = partial(fixed_view, size=SIZE)
    good = MaskedImages(
        Squares(), np.arange(COUNT), view, patches=PATCHES, smallest=(4, 4), substitute=True, mask_ratio=0.5, key=(0,)
    )
    bad = MaskedImages(
        Squares(bad=[3, 4]),
        np.arange(COUNT),
        view,
        patches=PATCHES,
        smallest=(4, 4),
        substitute=True,
        mask_ratio=0.5,
        key=(0,),
    )
    assert torch.equal(bad[0, 3].images, good[0, 5].images)
    assert torch.equal(bad[0, 3].masked, good[0, 3].masked)  # the mask belongs to the index, not to the file


def test_the_last_image_is_replaced_by_the_first():
    assert images(Squares(bad=[COUNT - 1]))[0, COUNT - 1].bad == ((f"square[{COUNT - 1}]", "is empty (0 bytes)"),)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_in_a_row_are_one_line(workers):
    members = np.zeros(500, dtype=int)
    with pytest.raises(UserError) as caught:
        read(workers, dataset=images(Squares(bad=[0]), members))
    assert str(caught.value).startswith(f"{MAX_CONSECUTIVE_BAD} images in a row cannot be used, the last: square[0] is")
    assert "\n" not in str(caught.value)


def test_seeded_leaves_the_state_as_it_was():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(1, 2, 3):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected) and not torch.equal(inside, expected)


def test_pieces_are_the_batch_in_order():
    batch = read()[0]
    assert_same([collate(batch.pieces(3))], [batch])
    assert [len(piece) for piece in batch.pieces(3)] == [3, 3, 2]
