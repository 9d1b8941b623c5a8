"""Whether memory that tensors free stays with the process.

By default the C library returns large blocks to the system, which clears every page of them before
it hands them out again. In a training step on the CPU that costs time, about as much with frozen
neurons as without, and it falls on whoever asks for memory next
(``benchmarks.overheads.freed_memory``).
"""

from __future__ import annotations

import ctypes
import sys
from typing import Literal

FreedMemory = Literal["kept", "returned"]
FREED_MEMORY: tuple[FreedMemory, ...] = ("kept", "returned")
# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER, _NONE = -1, 0

_now: FreedMemory = "returned"


def freed_memory() -> FreedMemory:
    """What :func:`keep_freed_memory` has made of it."""
    return _now


def keep_freed_memory() -> None:
    """Keep it, from now on, where the C library is glibc. The same for a whole process:
    ``MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0`` in its environment."""
    global _now
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    if mallopt(_M_TRIM_THRESHOLD, _NEVER) and mallopt(_M_MMAP_MAX, _NONE):
        _now = "kept"
