"""Triton kernels compiled for GPUs that are not there, and what the compiler made of them."""

from __future__ import annotations

import functools
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
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
    """What one launch comes to on one target.

    Attributes:
        registers: per thread (vector registers on AMD).
        spills: instructions that move registers to memory and back (AMD: registers that are).
        shared: bytes of shared memory per program.
        loop: instructions of the innermost loop around the tensor-core instructions, 0 without.
        tensor_core: those of them that use a tensor core.
        asynchronous: instructions of the kernel that copy to shared memory asynchronously.
    """

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


def compile_for(launch: Launch, target: GPUTarget) -> Compiled:
    """Compile one launch.

    Raises:
        Whatever Triton's compiler raises, for example where shared memory does not suffice.
    """
    compiled = triton.compile(_source(launch), target=target, options=dict(launch.options))
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        return _of_amd(compiled.asm["amdgcn"], shared)
    return _of_nvidia(compiled.asm["cubin"], shared)


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


def _of_nvidia(cubin: bytes, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    lines = [line for line in listing.splitlines() if line.strip()]
    loop, tensor_core = _innermost(lines, r"\bBRA\b.*`\((\.L_x_\d+)\)")
    return Compiled(
        int(registers[1]),
        len(re.findall(r"\b(?:LDL|STL)\b", listing)),
        shared,
        loop,
        tensor_core,
        len(_ASYNC_COPY.findall(listing)),
    )


@functools.cache
def _binary(name: str) -> str:
    """NVIDIA's tools come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: this build of Triton has no {name}")
    return str(path)


def _tool(name: str, *arguments: str) -> str:
    command = [_binary(name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- AMD -----------------------------------------------------------------------------------------


def _of_amd(assembly: str, shared: int) -> Compiled:
    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.M)
        assert found is not None, name
        return int(found[1])

    lines = [line for line in assembly.splitlines() if line.strip()]
    loop, tensor_core = _innermost(lines, r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)")
    return Compiled(
        number("vgpr_count"),
        number("vgpr_spill_count") + number("sgpr_spill_count"),
        shared,
        loop,
        tensor_core,
        len(_ASYNC_COPY.findall(assembly)),
    )


# --- both ----------------------------------------------------------------------------------------


def _innermost(lines: Sequence[str], branch: str) -> tuple[int, int]:
    """All instructions and tensor-core ones of the shortest loop that has most of the latter."""
    labels: dict[str, int] = {}
    best = (0, 0)
    for end, line in enumerate(lines):
        named = _LABEL.match(line.strip())
        if named:
            labels[named[1]] = end
        jump = re.search(branch, line)
        if jump is None or jump[1] not in labels:
            continue
        body = [text for text in lines[labels[jump[1]] : end + 1] if _is_instruction(text)]
        products = sum(1 for text in body if _TENSOR_CORE.search(text))
        if products > best[1] or (products == best[1] > 0 and len(body) < best[0]):
            best = (len(body), products)
    return best


def _is_instruction(line: str) -> bool:
    text = line.strip()
    return not (text.startswith((".", ";", "//", "#")) or text.endswith(":"))
