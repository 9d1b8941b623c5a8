"""Kernels compiled for GPUs that are not there, and what the compiler made of them."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_POINTERS |= {torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}
_ALIGNED = 16  # bytes of a pointer, or a multiple in an integer, that Triton compiles for

_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma|v_smfmac|v_wmma|v_swmmac)")
_ASYNC_COPY = re.compile(
    r"\b(?:LDGSTS|UTMALDG|UBLKCP|(?:global|buffer)_load_lds|(?:global|buffer)_load_\w+ .*\blds\b)"
)


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return name


@dataclass(frozen=True)
class Compiled:
    """What a kernel comes to on one target.

    Attributes:
        warps: per program.
        registers: per thread (AMD: vector registers, those of accumulation included).
        spills: instructions that move registers to memory and back (AMD: registers that are).
        shared: bytes of shared memory per program.
        loop: instructions of the innermost loop around the tensor-core instructions, 0 without.
        tensor_core: those of them that use a tensor core.
        asynchronous: instructions of the kernel that copy to shared memory asynchronously.
    """

    warps: int
    registers: int
    spills: int
    shared: int
    loop: int
    tensor_core: int
    asynchronous: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches within it are not made but listed; their tensors may be ``meta`` ones."""
    launches: list[Launch] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = self.arg_names
        arguments = dict(zip(names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in names}
        arguments |= {name: value for name, value in kwargs.items() if name in names}
        launches.append(Launch(self, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def build(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """Triton's own result for one launch.

    Raises:
        Whatever Triton's compiler raises, for example where shared memory does not suffice.
    """
    return triton.compile(_source(launch), target=target, options=dict(launch.options))


def compile_for(launch: Launch, target: GPUTarget) -> Compiled:
    """Compile one launch.

    Raises:
        Whatever Triton's compiler raises.
    """
    built = build(launch, target)
    warps, shared = int(built.metadata.num_warps), int(built.metadata.shared)
    if target.backend == "hip":
        return inspect_assembly(built.asm["amdgcn"], warps, shared)
    return inspect_cubin(built.asm["cubin"], warps, shared)


def _source(launch: Launch) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not (parameter.is_constexpr or parameter.do_not_specialize)
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", _ALIGNED]]
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_POINTERS[value.base.dtype][1:]}[{block}]>"
        elif isinstance(value, float) and not parameter.is_constexpr:
            signature[name] = "fp32"
        elif parameter.is_constexpr or (special and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % _ALIGNED == 0:
                attributes[(i,)] = [["tt.divisibility", _ALIGNED]]
    return ASTSource(launch.kernel, signature, constants, attributes)


_LABEL = re.compile(r"^(\.(?:L_x_|LBB\d+_)\d+):")


# --- NVIDIA --------------------------------------------------------------------------------------

_USAGE = re.compile(r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+).*\bSHARED:(?P<shared>\d+)")
_NVIDIA_JUMP = re.compile(
    r"(?P<predicate>@!?U?P\w+\s+)?\b"
    r"(?:EXIT|BRA(?:\.\w+)*\s+(?P<condition>!?U?P\w+,\s*)?`\((?P<to>\.L_x_\d+)\))"
)
# From this architecture on, what the system reserves is counted among what a kernel declares.
_COUNTS_RESERVED, _RESERVED = 90, 1024


def inspect_cubin(
    cubin: bytes, warps: int, dynamic_shared: int = 0, kernel: str | None = None
) -> Compiled:
    """What is in a cubin, whichever compiler made it.

    Args:
        cubin: the content of a ``.cubin`` file.
        warps: per block.
        dynamic_shared: bytes of shared memory per block beside those that the kernel declares.
        kernel: its name as in the cubin, mangled in C++; may be left out where there is but one.

    Raises:
        ValueError: there is no such kernel, or there are several to choose from.
    """
    usage, listing = _usage_and_code(cubin)
    kernels = {each["name"]: each for each in _USAGE.finditer(usage)}
    if (kernel is None and len(kernels) != 1) or (kernel is not None and kernel not in kernels):
        wanted = "one kernel" if kernel is None else f"kernel {kernel}"
        raise ValueError(f"cubin: expected {wanted}, got {', '.join(kernels) or 'none'}")
    used = kernels[kernel or next(iter(kernels))]
    architecture = re.search(r"(?:\.target\s+sm_|\bEF_CUDA_SM)(\d+)", listing)
    assert architecture is not None, listing[:200]
    declared = int(used["shared"])
    if declared and int(architecture[1]) >= _COUNTS_RESERVED:
        declared -= _RESERVED
    lines = _code_of(used["name"], listing)
    loop, tensor_core = _innermost(lines, _NVIDIA_JUMP)
    return Compiled(
        warps,
        int(used["registers"]),
        sum(1 for line in lines if re.search(r"\b(?:LDL|STL)\b", line)),
        declared + dynamic_shared,
        loop,
        tensor_core,
        sum(1 for line in lines if _ASYNC_COPY.search(line)),
    )


def kernels_in(cubin: bytes) -> list[str]:
    """Their names, mangled in C++."""
    return [each["name"] for each in _USAGE.finditer(_usage_and_code(cubin)[0])]


def extract_cubins(file: Path) -> list[bytes]:
    """All that are in an object file or a library."""
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "--extract-elf", "all", str(file.absolute()), folder=folder)
        return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


@functools.lru_cache(maxsize=4)
def _usage_and_code(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        return usage, _tool("nvdisasm", "-c", file.name)


def _code_of(kernel: str, listing: str) -> list[str]:
    """Its section: what follows its label, up to the next section."""
    lines = (line for line in listing.splitlines() if line.strip())
    inside = itertools.dropwhile(lambda line: line != f".text.{kernel}:", lines)
    return list(itertools.takewhile(lambda line: ".section" not in line.split(), inside))


@functools.cache
def _binary(name: str) -> str:
    """NVIDIA's tools come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: this build of Triton has no {name}")
    return str(path)


def _tool(name: str, *arguments: str, folder: str | None = None) -> str:
    command = [_binary(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout


# --- AMD -----------------------------------------------------------------------------------------


_AMD_JUMP = re.compile(r"\bs_(?:(?P<condition>c)?branch\w*\s+(?P<to>\.LBB\d+_\d+)|endpgm)")


def inspect_assembly(assembly: str, warps: int, shared: int) -> Compiled:
    """What is in the assembly of one AMD kernel.

    Args:
        assembly: with its metadata.
        warps, shared: per program; bytes.
    """

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.M)
        assert found is not None, name
        return int(found[1])

    lines = [line for line in assembly.splitlines() if line.strip()]
    loop, tensor_core = _innermost(lines, _AMD_JUMP)
    return Compiled(
        warps,
        number("vgpr_count"),
        number("vgpr_spill_count") + number("sgpr_spill_count"),
        shared,
        loop,
        tensor_core,
        len(_ASYNC_COPY.findall(assembly)),
    )


# --- both ----------------------------------------------------------------------------------------


def _innermost(lines: Sequence[str], jump: re.Pattern[str]) -> tuple[int, int]:
    """All instructions and tensor-core ones of the shortest loop that has most of the latter."""
    best = (0, 0)
    for loop in _loops(*_blocks(lines, jump)):
        products = sum(1 for text in loop if _TENSOR_CORE.search(text))
        if products > best[1] or (products == best[1] > 0 and len(loop) < best[0]):
            best = (len(loop), products)
    return best


def _blocks(lines: Sequence[str], jump: re.Pattern[str]) -> tuple[list[list[str]], list[set[int]]]:
    """Basic blocks and, of each, those that may follow. ``jump`` matches an instruction that leaves
    its place: its group ``to`` names a label or is None, others say that it may not leave."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    ends: dict[int, re.Match[str]] = {}
    for line in lines:
        named = _LABEL.match(line.strip())
        if named:
            if blocks[-1]:
                blocks.append([])
            labels[named[1]] = len(blocks) - 1
        elif _is_instruction(line):
            blocks[-1].append(line)
            leaves = jump.search(line)
            if leaves:
                ends[len(blocks) - 1] = leaves
                blocks.append([])
    following: list[set[int]] = []
    for i in range(len(blocks)):
        end = {"to": "", "condition": "none"} if i not in ends else ends[i].groupdict()
        to = end.pop("to")
        next_ones = {i + 1} if any(end.values()) and i + 1 < len(blocks) else set()
        following.append(next_ones | ({labels[to]} if to in labels else set()))
    return blocks, following


def _loops(blocks: Sequence[list[str]], following: Sequence[set[int]]) -> Iterator[list[str]]:
    """The instructions of every natural loop: what lies between a block and one that jumps back to
    it, wherever the compiler put it. Code that waits often stands at the end of a kernel."""
    before: list[set[int]] = [set() for _ in blocks]
    for i, next_ones in enumerate(following):
        for j in next_ones:
            before[j].add(i)
    everything = set(range(len(blocks)))
    dominators = [{0}] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            common = set.intersection(*(dominators[j] for j in before[i])) if before[i] else set()
            if common | {i} != dominators[i]:
                dominators[i], changed = common | {i}, True
    bodies: dict[int, set[int]] = {}
    for end, next_ones in enumerate(following):
        for head in next_ones & dominators[end]:
            body, waiting = bodies.setdefault(head, {head}), [end]
            while waiting:
                i = waiting.pop()
                if i not in body:
                    body.add(i)
                    waiting += before[i]
    for body in bodies.values():
        yield [text for i in sorted(body) for text in blocks[i]]


def _is_instruction(line: str) -> bool:
    text = line.strip()
    return not (text.startswith((".", ";", "//", "#")) or text.endswith(":"))
