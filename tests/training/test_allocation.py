"""A training on a CPU keeps the memory that its tensors free; its data workers do not."""

import platform
import subprocess
import sys

import pytest

# Resident memory, not page faults: a kernel with huge pages takes 32 faults for what others take 16,384 for.
COUNT = """
import os, numpy
from mirl.training.allocation import keep_freed_memory
def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
{preparation}
numpy.ones(1)
before = resident()
for _ in range(8):
    numpy.ones(2**24, numpy.float32)
print(resident() - before)
"""


def kept(preparation: str) -> int:
    """MiB that a process still holds after eight tensors of 64 MiB were made and freed one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(preparation=preparation)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_a_training_keeps_what_was_freed_for_its_next_tensors():
    assert kept("") < 8
    assert 56 <= kept("assert keep_freed_memory()") < 2 * 64
    assert kept("assert keep_freed_memory() and keep_freed_memory(largest=2**25, spare=2**26)") < 8
