"""Freed memory stays with the process while an engine scores on a CPU.

A layer's temporaries are large, short-lived and always the same, and torch takes them from malloc.
Left to itself, glibc gives them back to the system at every layer and takes them again at the next:
blocks from 128 KiB up are mapped, and unmapped when freed, and free memory at the end of a heap is
returned when it exceeds 128 KiB. Both thresholds rise by themselves when a mapped block is freed,
to its size and to twice its size, but only as far as the largest block seen: the temporaries of one
layer, freed together, exceed twice the largest of them, so the trimming never ends. Nor does a
block above 32 MiB raise them. A page that comes back is zeroed by the kernel at its first touch: a
quarter of the time at width 256.

`keep_for` raises the thresholds above what a layer takes (`mallopt(3)`):

* `M_MMAP_THRESHOLD`: blocks up to 1 GiB come from the heap;
* `M_TRIM_THRESHOLD`: the free end of a heap is not returned;
* `M_TOP_PAD`: heaps of threads other than the first are made of parts of 64 MiB, and a part that is
  free goes back whatever the trim threshold is, unless this much is to be left over.

So a process holds what its largest layer took, until the last engine is closed: then all free
memory is returned (`malloc_trim(3)`). The thresholds cannot be read, and setting one ends their
rising by themselves, so they cannot be put back to the letter: they are left where glibc itself
arrives after a block of 32 MiB was freed.

Nothing is done, and the reason is said, where malloc is not glibc's and where the environment sets
a threshold: what the user decided stands.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of `malloc.h`."""

MIB = 1 << 20
KEEPING = {
    M_MMAP_THRESHOLD: 1 << 30,
    M_TRIM_THRESHOLD: (1 << 31) - 1,  # the largest that mallopt takes
    M_TOP_PAD: 64 * MIB,
}
RELEASED = {
    M_MMAP_THRESHOLD: 32 * MIB,
    M_TRIM_THRESHOLD: 64 * MIB,
    M_TOP_PAD: MIB // 8,  # the default
}
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_VARIABLES += ("MALLOC_MMAP_MAX_",)
_TUNABLES = re.compile(r"glibc\.malloc\.(mmap_threshold|trim_threshold|top_pad|mmap_max)\b")

_lock = threading.RLock()  # a collector may release inside of keep_for
_holders = 0


def keep_for(owner: object) -> tuple[str, Callable[[], Any]]:
    """Keep freed memory as long as the owner lives, or until the returned function is called.

    Returns:
        What was done, or why nothing was, in words; and the function that ends it, which may be
        called twice.
    """
    reason = reason_against(os.environ)
    if reason is not None:
        return f"malloc is left as it is: {reason}", lambda: None
    global _holders
    with _lock:
        _holders += 1
        _set(KEEPING)
    end = weakref.finalize(owner, _release)
    end.atexit = False
    return f"freed blocks up to {KEEPING[M_MMAP_THRESHOLD] // MIB} MiB are kept", end


def reason_against(environment: Mapping[str, str]) -> str | None:
    """Why this process's malloc is to be left alone; None where its thresholds may be set."""
    if platform.libc_ver()[0] != "glibc":
        return "it is not glibc's"
    for name in _VARIABLES:
        if name in environment:
            return f"{name} is set"
    if _TUNABLES.search(environment.get("GLIBC_TUNABLES", "")):
        return "GLIBC_TUNABLES sets it"
    if _address(ctypes.CDLL(None)) != _address(_glibc()):
        return "another allocator stands in glibc's place"
    return None


def _release() -> None:
    global _holders
    with _lock:
        _holders -= 1
        if _holders == 0:
            _set(RELEASED)
            _glibc().malloc_trim(0)


def _set(thresholds: Mapping[int, int]) -> None:
    for name, value in thresholds.items():
        _glibc().mallopt(name, value)


def _glibc() -> ctypes.CDLL:
    return ctypes.CDLL("libc.so.6")


def _address(library: ctypes.CDLL) -> int | None:
    """Where the malloc that a library finds first is."""
    return ctypes.cast(library.malloc, ctypes.c_void_p).value
