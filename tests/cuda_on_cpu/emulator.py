"""Runs CUDA C++ kernels thread by thread on the CPU, and says what is wrong with them.

:func:`build` compiles the very sources that nvcc compiles. A :class:`Run` executes launchers of the
library in one of the :data:`MODES`: which threads come first, and when asynchronous copies finish,
are open on a GPU, and a kernel has to be right in all modes. Everything is deterministic.

::

    library = build(["csrc/cuda/wgrad/pack.cu"])
    run = Run(library, Mode("random", "at issue", seed=1), reads={"x": x}, writes={"out": out})
    (launch,) = run.call("launch_gather", x, out, n)
    assert launch.total.moved_bytes <= 1.1 * launch.total.least_bytes

In a checked build every access of kernel code is looked at. These stop the launch with an
:class:`EmulationError` that names the line, the block and the thread:

=================== =============================================================================
``kind``            what it is
=================== =============================================================================
``out of bounds``   of every tensor of the run, of the block's dynamic shared memory, and of the
                    thread's own stack; or a write to a tensor that may only be read
``misaligned``      an access that is not aligned to its size
``race``            two threads, at least one write, and no barrier between them. Inside a warp
                    ``__syncwarp`` orders accesses (shuffles do not, as in CUDA). Between blocks
                    a fence before an atomic operation in the one and after a later one on the
                    same address in the other do
``uninitialised``   a read of shared memory that the block has not written
``unfinished copy`` an access to the target of an asynchronous copy that was not waited for
``stale read``      a read by ``__ldg`` or ``load_16_streaming`` of what this launch has written
``divergence``      threads of a block wait at different ``__syncthreads``, or a mask does not name
                    the lane itself or the one it reads from
``deadlock``        nobody can go on: lanes that should meet wait in different calls
``exited lane``     a mask names a lane that has ended
``launch``          the host API refused something
=================== =============================================================================

The last four are found by fast builds too. Those do not survive wild pointers, so a kernel runs
checked first. A checked build also counts what every launch moves, see :class:`Launch`.

Not emulated: blocks run one after the other, so a block that waits for another one never ends;
weak memory order (a race is reported instead); bank conflicts; caches; the rounding inside tensor
cores (products are exact and added in float); the bounds of arrays on a thread's own stack; static
shared memory, clusters, wgmma, TMA and everything else that the project's kernels do not use.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from tests.cuda_on_cpu.build import Library, build
from tests.cuda_on_cpu.traffic.launch import Launch

__all__ = ["MODES", "Device", "EmulationError", "Launch", "Library", "Mode", "Run", "build"]

ORDERS = ("natural", "reversed", "random")


@dataclass(frozen=True)
class Mode:
    """What is left open on a GPU: the order of blocks, of warps and of lanes, and when asynchronous
    copies take place. A warp always runs until all its lanes wait for the block."""

    order: Literal["natural", "reversed", "random"] = "natural"
    copies: Literal["at issue", "at wait"] = "at wait"
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.order}, copies {self.copies}"


MODES = tuple(
    Mode(order, copies) for order, copies in itertools.product(ORDERS, ("at wait", "at issue"))
)


@dataclass(frozen=True)
class Device:
    """What the host API says of the GPU. ``shared_limit`` is the most dynamic shared memory that
    ``cudaFuncSetAttribute`` grants a block, in bytes."""

    multiprocessors: int = 108
    compute_capability: int = 80
    shared_limit: int = 99 * 1024


@dataclass(frozen=True)
class ExecutionContext:
    """A line of a source, and who was there."""

    what: str
    file: str
    line: int
    block: tuple[int, ...] = ()
    thread: tuple[int, ...] = ()

    @property
    def source(self) -> str:
        """The text of the line."""
        try:
            return Path(self.file).read_text().splitlines()[self.line - 1].strip()
        except (OSError, IndexError):
            return "?"

    def __str__(self) -> str:
        who = f"{self.what}, thread {self.thread} of block {self.block}"
        return f"{who}, at {self.file}:{self.line}: {self.source}"


class EmulationError(Exception):
    """A fault in a kernel or its launch; ``kind`` is one of the table above. ``place`` is where it
    was noticed, None if no single thread has done it; ``others`` are the further threads in it."""

    def __init__(
        self,
        kind: str,
        message: str,
        kernel: str = "",
        place: ExecutionContext | None = None,
        others: tuple[ExecutionContext, ...] = (),
    ) -> None:
        lines = [f"{kind}: {message}", f"kernel {kernel}"] if kernel else [f"{kind}: {message}"]
        super().__init__(
            "\n  ".join([*lines, *map(str, [place] if place else []), *map(str, others)])
        )
        self.kind, self.kernel, self.place, self.others = kind, kernel, place, others

    @property
    def lines(self) -> list[int]:
        """The line where it was noticed, and those of the other threads."""
        return [p.line for p in (self.place, *self.others) if p is not None]


@dataclass
class Run:
    """Calls of a library's functions, with the memory that their kernels may access.

    ``reads`` and ``writes`` are tensors by name, on the CPU: those that kernels may only read, and
    those that they may write too; a checked build takes 60 bytes for every element of these.
    Exactly the elements of a tensor may be touched (and what lies between them), not the rest of
    its storage. One run of a library ends where the next begins.
    """

    library: Library
    mode: Mode = Mode()
    reads: Mapping[str, Tensor] = field(default_factory=dict)
    writes: Mapping[str, Tensor] = field(default_factory=dict)
    device: Device = Device()
    launches: list[Launch] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.library.run = self
        functions = self.library.functions
        functions.neq_emu_begin(
            ORDERS.index(self.mode.order),
            ctypes.c_uint64(self.mode.seed),
            int(self.mode.copies == "at issue"),
            self.device.multiprocessors,
            self.device.compute_capability,
            ctypes.c_uint64(self.device.shared_limit),
        )
        self._ranges = sorted(
            (*_extent(name, tensor), name, tensor.element_size(), writable)
            for tensors, writable in ((self.reads, False), (self.writes, True))
            for name, tensor in tensors.items()
            if tensor.numel() > 0
        )
        for (_, end, name, *_), (begin, _, other, *_) in itertools.pairwise(self._ranges):
            if begin < end:
                raise ValueError(f"expected tensors that share no memory, got {name} and {other}")
        for begin, end, name, item, writable in self._ranges:
            functions.neq_emu_add_region(
                name.encode(),
                ctypes.c_void_p(begin),
                ctypes.c_uint64(end - begin),
                ctypes.c_uint64(item),
                int(writable),
            )

    def call(self, function: str, *arguments: Any) -> list[Launch]:
        """Calls ``extern "C" cudaError_t function(...)`` and returns the launches that it made.

        A tensor is passed as its pointer, None as a null pointer, a bool or int as an integer of up
        to 64 bits, a float as ``float``; anything else as an object of ctypes.

        Raises:
            RuntimeError: another run of the library has begun.
            EmulationError: of a kernel, or of the host API, seen by the launcher or not.
        """
        if self.library.run is not self:
            raise RuntimeError("another run of this library has begun")
        functions = self.library.functions
        code = getattr(functions, function)(*map(self._as_argument, arguments))
        result = json.loads(functions.neq_emu_result())
        if result["error"] is not None:
            raise self._error(result["error"])
        if result["code"] != 0 or code != 0:
            name = functions.neq_emu_error_name(result["code"] or code).decode()
            why = f" ({result['refusal']})" if result["refusal"] else ""
            raise EmulationError("launch", f"{function}: {name}{why}")
        made = [Launch.from_json(self.library, launch) for launch in result["launches"]]
        before = len(self.launches)
        self.launches = made
        return made[before:]

    def _as_argument(self, argument: Any) -> Any:
        if argument is None:
            return ctypes.c_void_p(None)
        if isinstance(argument, Tensor):
            if argument.numel() > 0:
                begin, end = _extent("an argument", argument)
                if not any(b <= begin and end <= e for b, e, *_ in self._ranges):
                    raise ValueError(f"expected a tensor of the run, got one of {argument.shape}")
            return ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, int):
            return ctypes.c_int64(argument)
        if isinstance(argument, float):
            return ctypes.c_float(argument)
        return argument

    def _error(self, error: dict[str, Any]) -> EmulationError:
        places = [{"what": "noticed", **error}] if "thread" in error else []
        places += error["others"]
        found = [self._place(place) for place in places]
        return EmulationError(
            error["kind"],
            error["message"],
            self.library.function_name(error["kernel"]),
            found[0] if "thread" in error else None,
            tuple(found["thread" in error :]),
        )

    def _place(self, place: dict[str, Any]) -> ExecutionContext:
        if "pc" in place:
            file, line = self.library.locate([place["pc"]])[0]
        else:
            file, line = place["file"], place["line"]
        return ExecutionContext(
            place["what"], file, line, tuple(place["block"]), tuple(place["thread"])
        )


def _extent(name: str, tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first to behind the last element."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()
