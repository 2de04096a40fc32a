"""How the C library's allocator treats the memory that tensors on a CPU have freed."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's numbers for mallopt


def keep_freed_memory(largest: int = 2**30, spare: int = -1) -> bool:
    """Let this process keep what it frees for its next tensors; return whether that could be arranged (by glibc).

    glibc takes each tensor of over 32 MiB from the kernel and gives it back when it is freed, so that every page is
    cleared and mapped anew. On a virtual machine that was a fifth of a step (docs/performance.md).

    Args:
        largest: bytes of what is kept; larger tensors still come from the kernel.
        spare: bytes that may lie unused at the end of the heap; -1: any number.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, largest) and mallopt(M_TRIM_THRESHOLD, spare))
