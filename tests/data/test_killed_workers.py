"""A data worker that the kernel kills costs a line, not the run: others read the same batches."""

import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mirl.data import workers
from mirl.data.decode import BadImage
from mirl.data.loading import Batch, Views, collate
from mirl.data.workers import Batches
from mirl.errors import UserError

COUNT = 24
KEYS = [[(0, i), (0, i + 1)] for i in range(0, COUNT, 2)]


class Source:
    """Numbered images; those in `deadly` end the process that reads them, as often as `left` in shared memory says."""

    def __init__(self, deadly=(), times=0, how=signal.SIGKILL):
        self.deadly, self.how = set(deadly), how
        self.left = multiprocessing.Value("i", times)

    def __len__(self):
        return COUNT

    def name_of(self, index):
        return f"image[{index}]"

    def read(self, index):
        if index in self.deadly and self.left.value > 0:
            self.left.value -= 1
            os.kill(os.getpid(), self.how)
        if index == 5:
            raise BadImage("is empty (0 bytes)")
        return torch.full((3, 4, 4), index, dtype=torch.uint8)


def view(image):
    return image + torch.randint(50, image.shape, dtype=torch.uint8)


def batches(source, *, count=2, told=None):
    views = Views(source, torch.arange(COUNT).numpy(), view, key=(3,), substitute=True)
    return Batches(views, iter(KEYS), workers=count, pin=False, told=(told if told is not None else []).append)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let PyTorch look after its workers more often than every five seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def assert_same(found, expected):
    assert len(found) == len(expected) == len(KEYS)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices)
        assert one.bad == other.bad


def test_batches_are_the_same_after_a_kill_and_it_is_told():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    told = []
    expected = list(batches(Source(), count=0))
    assert_same(list(batches(Source(deadly=[9, 14], times=2), told=told)), expected)
    line = "a data worker was killed (SIGKILL, as the kernel does when memory runs out)"
    assert set(told) == {f"{line}; new workers go on with the same batches"}
    assert torch.equal(torch.get_rng_state(), state)  # what is random outside must not depend on kills
    assert collate(expected).bad == (("image[5]", "is empty (0 bytes)"),)


def test_a_kill_while_the_run_computes_is_no_error_there():
    told, found = [], []
    for batch in batches(Source(), told=told):
        found.append(batch)
        if len(found) == 3:
            victim = multiprocessing.active_children()[0]
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            for _ in range(1000):  # PyTorch would raise here, from its handler of SIGCHLD
                torch.zeros(1)
    assert_same(found, list(batches(Source(), count=0)))
    assert len(told) == 1


def test_workers_that_are_killed_again_and_again_stop_with_the_remedy():
    told = []
    with pytest.raises(UserError) as caught:
        list(batches(Source(deadly=[9], times=100), told=told))
    assert str(caught.value) == (
        "a data worker was killed (SIGKILL, as the kernel does when memory runs out), 3 times in 10 minutes; what was "
        "saved is kept: free memory or give fewer --workers than 2, and add --resume; mirl doctor finds huge images"
    )
    assert len(told) == 2
    assert not multiprocessing.active_children()


def test_kills_long_apart_do_not_add_up(monkeypatch):
    monkeypatch.setattr(workers, "WITHIN", 0.0)
    assert_same(list(batches(Source(deadly=[9], times=4))), list(batches(Source(), count=0)))


def test_other_errors_of_workers_are_not_taken_for_a_kill():
    class Broken(Views):
        def __getitem__(self, key) -> Batch:
            raise RuntimeError("a mistake in the code")

    views = Broken(Source(), torch.arange(COUNT).numpy(), view)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        list(Batches(views, KEYS, workers=1, pin=False))
