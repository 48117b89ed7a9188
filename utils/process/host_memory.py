"""The C library's heap, kept from holding what was freed."""

import contextlib
import ctypes

HEAP_BLOCK = 32 * 1024 * 1024  # bytes; smaller blocks lie on glibc's heap, which hardly ever shrinks


@contextlib.contextmanager
def memory_given_back():
    """While open, freed tensors of any size return to the system at once; for loading and saving.

    glibc keeps freed blocks below a threshold that it raises to 32 MiB by itself. Layers that are gathered and released
    by turns then leave holes: two CPU ranks were seen to hold 2.5 times the weights they had loaded at ZeRO-3.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library has no such threshold
        yield
        return
    mmap_threshold, trim_threshold = -3, -1
    libc.mallopt(mmap_threshold, 128 * 1024)
    try:
        yield
    finally:
        libc.mallopt(mmap_threshold, HEAP_BLOCK)  # where glibc's own rule ends up in training
        libc.mallopt(trim_threshold, 64 * 1024 * 1024)
        libc.malloc_trim(0)
