"""Bytes that a training step holds: for backward, and at its peak."""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
NOT_MEASURED = "peak memory is read from /proc: Linux only"


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in one forward; parameters and buffers,
    which are there anyway, are not counted."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # Until here: an address in use cannot be given to another tensor.
    del output
    return sum(saved.values())


def peak_allocated(work: Callable[[], Any]) -> int:
    """The most bytes that tensors allocated while ``work`` runs hold at one time: every allocation
    and release of PyTorch's CPU allocator, in order, from its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def peak_in_child(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int | None:
    """:func:`peak_bytes` of ``prepare(*arguments)`` in a fresh process; both must be importable
    there. None where it cannot be measured."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        threads = torch.get_num_threads()
        return pool.submit(_prepared_peak, threads, prepare, arguments).result()


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """By how much the resident set of this process grows at the most while ``work`` runs, in
    bytes (the high-water mark, less what is resident before). None without /proc."""
    if not STATUS.exists():
        return None
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):  # not permitted: the mark then is that of the whole life
        CLEAR_REFS.write_text(RESET_PEAK)
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _prepared_peak(
    threads: int, prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]
) -> int | None:
    torch.set_num_threads(threads)
    return peak_bytes(prepare(*arguments))


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS}: no line {key}")
