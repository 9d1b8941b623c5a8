"""What the CUDA C++ kernels move, counted thread by thread on the CPU.

The operators of ``csrc/cuda/ops.h``, on CPU tensors, cut the work as on an H100; their launches are
run by the tests' emulator, which is imported from the repository's root alone.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

KERNELS = Path(__file__).parents[3] / "csrc" / "cuda"
ALLOCATIONS = Path(__file__).parent / "counted_allocations.h"
# So that the operators can be loaded beside those of another build.
NAMESPACE = "neq_kernels_counted"
SECTOR = 32
H100 = {"multiprocessors": 132, "compute_capability": 90, "shared_limit": 227 * 1024}
DTYPES = {torch.float32: 0, torch.bfloat16: 2}  # of launchers.h
INDICES = ("order", "count", "addresses", "shapes")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Moved:
    """What a launch moves between the multiprocessors and memory, no cache in between.

    Attributes:
        requests: of warps.
        bytes: of the distinct 32-byte sectors of every request.
        asked_bytes: what the lanes ask for.
        index_bytes: those of ``bytes`` that say which neurons are active and where tensors lie.
        sums_bytes: those of ``bytes`` that are sums in parts, which one launch writes and the next
            one reads.
    """

    kernel: str
    grid: tuple[int, ...]
    requests: int
    bytes: int
    asked_bytes: int
    index_bytes: int
    sums_bytes: int

    def __str__(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.grid))}: {self.bytes}"


def unavailable() -> str | None:
    """None where the emulator can be imported, else why it cannot."""
    try:
        found = importlib.util.find_spec("tests.cuda_on_cpu.emulator")
    except ModuleNotFoundError:
        found = None
    if found is not None and Path(found.origin or "").is_relative_to(KERNELS.parents[1]):
        return None
    return "the emulator lies in tests/: run this from the root of a checkout of the repository"


def operators() -> Any:
    """The leaf operators of the backend, counted."""
    _library()
    return getattr(torch.ops, NAMESPACE)


def function(name: str) -> Any:
    """One of ``launchers.h``, for what is asked of the host alone."""
    return getattr(_library().functions, name)


def counted(
    call: Callable[[], Result], reads: Mapping[str, Tensor], writes: Mapping[str, Tensor]
) -> tuple[Result, list[Moved]]:
    """The operators that ``call`` calls, and the launches that they make.

    Args:
        reads, writes: the tensors that they are given: may only be read, or written too.

    Raises:
        EmulationError: a kernel is wrong.
    """
    run = _run(reads, writes)
    try:
        result = call()
    except RuntimeError:
        run.call("neq_counted_nothing")  # the emulator says more of it
        raise
    return result, _moved(run.call("neq_counted_nothing"))


def counted_launcher(
    reads: Mapping[str, Tensor], writes: Mapping[str, Tensor], name: str, *arguments: Any
) -> list[Moved]:
    """One launcher of ``launchers.h``; arguments as for ``tests.cuda_on_cpu.emulator.Run.call``."""
    return _moved(_run(reads, writes).call(name, *arguments))


def _run(reads: Mapping[str, Tensor], writes: Mapping[str, Tensor]) -> Any:
    from tests.cuda_on_cpu.emulator import Device, Mode, Run

    return Run(_library(), Mode(), reads, writes, Device(**H100))


def _moved(launches: list[Any]) -> list[Moved]:
    found = []
    for launch in launches:
        total = launch.total
        every = total.loads + total.stores + total.atomics
        name = re.search(r"\w+_kernel", launch.kernel)
        grid = tuple(size for i, size in enumerate(launch.grid) if i == 0 or size > 1)
        kernel = launch.kernel if name is None else name[0]
        regions = {region: of.moved_bytes for region, of in launch.regions.items()}
        indices = sum(moved for region, moved in regions.items() if region in INDICES)
        sums = sum(moved for region, moved in regions.items() if region.startswith("sums "))
        moved = every.requests, every.moved_bytes, every.bytes, indices, sums
        found.append(Moved(kernel, grid, *moved))
    return found


@functools.cache
def _library() -> Any:
    """All kernels and the operators, every access of kernels checked and counted. Without float16,
    which moves what bfloat16 does.

    Raises:
        RuntimeError: no emulator, or no compiler.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    from tests.cuda_on_cpu.build import build

    impl = "STABLE_TORCH_LIBRARY_IMPL(neq_kernels_cuda, "
    registered = (
        "STABLE_TORCH_LIBRARY(neq_kernels_cuda,",
        f"{impl}NEQ_CUDA_KEY,",
        f"{impl}CompositeExplicitAutograd,",
    )
    library = build(
        sorted([*KERNELS.rglob("*.cu"), *KERNELS.rglob("*.cpp")]),
        defines={"NEQ_CUDA_ON_CPU": 1, "TORCH_TARGET_VERSION": "0x020a000000000000"},
        replace=[
            ("wgrad.cpp", '#include "launchers.h"', ALLOCATIONS.read_text()),
            ("dtypes.cuh", "return call(__half{})", "return cudaErrorInvalidValue"),
            *(("bindings.cpp", r, r.replace("neq_kernels_cuda", NAMESPACE)) for r in registered),
        ],
        flags=[f"-isystem{path}" for path in include_paths()],
        links=[*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"],
    )
    torch.ops.load_library(str(library.path))
    return library
