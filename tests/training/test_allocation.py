"""A training on a CPU keeps the memory that its tensors free; its data workers do not."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, numpy
from mirl.training.allocation import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        numpy.ones(2**24, numpy.float32)  # 64 MiB: 16,384 pages, or 32 huge ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
{preparation}
for _ in range(8):  # a small tensor may take the beginning of what was freed, and the heap grows
    faults()
print(faults())
"""


def faults(preparation: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(preparation=preparation)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_freed_memory_is_used_again_without_the_kernel():
    by_default = faults("")
    assert by_default >= 4 * 32
    assert faults("assert keep_freed_memory()") < by_default / 10
    workers = faults("assert keep_freed_memory() and keep_freed_memory(largest=2**25, spare=2**26)")
    assert workers > by_default / 2
