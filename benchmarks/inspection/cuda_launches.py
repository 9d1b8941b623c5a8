"""What the CUDA C++ kernels are compiled to, and how their launchers launch them; without a GPU.

The sources of ``csrc/cuda`` are compiled with the flags that setup.py has for them, and the
launchers called on top of a runtime that writes launches down. Whatever a launcher looks at on the
host is made up from the names of its parameters in ``launchers.h``, in every combination.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.files import ROOT
from benchmarks.inspection.compile import extract_cubins

KERNELS = ROOT / "csrc" / "cuda"
RECORDER = Path(__file__).parent / "recorded_launches.cpp"

FLAG = (0, 1)


@dataclass(frozen=True)
class Numbers:
    """An array on the host."""

    name: str
    of: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


_SIDE, _CHANNELS = 28, 1024
_NCHW = Numbers("nchw", (_CHANNELS * _SIDE**2, _SIDE**2, _SIDE, 1))
_NHWC = Numbers("nhwc", (_CHANNELS * _SIDE**2, 1, _SIDE * _CHANNELS, _CHANNELS))
_GEOMETRIES = tuple(
    Numbers(f"{side}x{side}/{stride}", (*[_SIDE] * 4, side, side, stride, stride, 1, 1, 1, 1))
    for side in (3, 5, 7, 2)
    for stride in (1, 2)
)
# Arguments that decide which kernel is launched, or how; of a pointer, bytes behind an aligned
# address. Other pointers are to memory that holds ones, other numbers are OTHER.
VALUES: dict[str, tuple[object, ...]] = {
    "dtype": (1, 2, 0),  # neq_float16, neq_bfloat16, neq_float32
    "from": (0, 1, 2),
    "most": (8, 16, 32, 512),
    "packed": FLAG,
    "transposed": FLAG,
    "c": (1024, 128, 64, 32),
    "taps": (1, 9),
    "geometry": _GEOMETRIES,
    "sizes": tuple(Numbers(f"width {w}", (_SIDE, w, _SIDE, w, 1, 1)) for w in (28, 24)),
    "dy_strides": (_NCHW, _NHWC),
    "x_strides": (_NCHW, _NHWC),
    "rows": (8,),
    "with_momentum": FLAG,
    "nesterov": FLAG,
    "amsgrad": FLAG,
    "images": (16,),
    "blocks": (8,),
    "number_of_parts": (8,),
}
OTHER = 4096
DTYPES = ("float32", "float16", "bfloat16")
_TYPES: dict[str, Any] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}
_TYPES |= {"double": ctypes.c_double, "float": ctypes.c_float}


@dataclass(frozen=True)
class CudaLaunch:
    """A kernel as it was launched.

    Attributes:
        kernel: its name in the cubin.
        threads, shared: per block; bytes of dynamic shared memory.
        launcher: the function of ``launchers.h``.
        dtype: of its elements.
        arguments: those of ``VALUES`` that it was first called with so, in words.
    """

    kernel: str
    threads: int
    shared: int
    launcher: str
    dtype: str
    arguments: str


@dataclass(frozen=True)
class Program:
    """All kernels, compiled for one target: the cubins by source, the first errors of sources that
    nvcc refuses, and how the others' kernels are launched."""

    cubins: Mapping[str, bytes]
    errors: Mapping[str, str]
    launches: Sequence[CudaLaunch]


@functools.cache
def setup_py() -> Any:
    """setup.py, which knows where nvcc is and what its flags are."""
    spec = importlib.util.spec_from_file_location("neq_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def nvcc_version() -> str:
    """Such as 13.0.88."""
    nvcc = setup_py().find_nvcc()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return said.rpartition(", V")[2].split()[0]


def unavailable() -> str | None:
    """None where there is a CUDA toolkit, else why there is none."""
    toolkit = setup_py().find_toolkit()
    return toolkit if isinstance(toolkit, str) else None


def compiled(target: str, folder: Path = KERNELS) -> Program:
    """All ``.cu`` files of a folder, for ``sm_80`` and the like; from the cache if nothing changed.

    Raises:
        RuntimeError: there is no CUDA toolkit, or a launcher crashes.
    """
    toolkit = setup_py().find_toolkit()
    if isinstance(toolkit, str):
        raise RuntimeError(toolkit)
    arch = int(target.removeprefix("sm_"))
    command = [*setup_py().nvcc_command(toolkit, [arch]), "-Xcompiler=-fvisibility=default"]
    sources = setup_py().kernel_sources(folder)
    made = _cache() / _key([*folder.rglob("*"), RECORDER, Path(__file__)], command)
    with open(f"{made}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
                work = Path(scratch, "work")
                work.mkdir()
                _compile(sources, folder / "launchers.h", work, command, toolkit.include, arch)
                os.rename(work, made)
    cubins = {each.stem: each.read_bytes() for each in sorted(made.glob("*.cubin"))}
    errors = {each.stem: each.read_text() for each in sorted(made.glob("*.error"))}
    lines = (made / "launches.jsonl").read_text().splitlines()
    return Program(cubins, errors, [CudaLaunch(**json.loads(line)) for line in lines])


def _compile(
    sources: Sequence[Path],
    header: Path,
    work: Path,
    command: Sequence[str],
    include: str,
    arch: int,
) -> None:
    def compile_one(source: Path) -> list[str]:
        target = work / f"{source.stem}.o"
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True
        )
        if done.returncode:
            lines = (done.stderr + done.stdout).splitlines()
            first = next((line for line in lines if "error" in line), "nvcc fails")
            target.with_suffix(".error").write_text(re.sub(r"^.*?error *: *", "", first))
            return []
        for cubin in extract_cubins(target):
            target.with_suffix(".cubin").write_bytes(cubin)
        return [str(target)]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = [each for made in pool.map(compile_one, sources) for each in made]
    # Bsymbolic: PyTorch has CUDA's own runtime in the process.
    link = [setup_py().find_compiler(), "-shared", "-fPIC", "-std=c++17", "-Wl,-Bsymbolic,-z,defs"]
    link += [f"-I{include}", f"-DNEQ_ARCH={arch}", str(RECORDER), *objects]
    library = work / "launchers.so"
    subprocess.run([*link, "-o", str(library)], check=True)
    # In a process of its own: nobody knows what a launcher makes of made-up arguments.
    call = [sys.executable, "-m", "benchmarks.inspection.cuda_launches", str(library), str(header)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"launchers end with {done.returncode}:\n{done.stderr[-2000:]}")
    (work / "launches.jsonl").write_text(done.stdout)


Parameters = list[tuple[str, str]]


def declared(header: str) -> dict[str, Parameters]:
    """Of the functions that return CUDA's error code, type and name of every parameter."""
    code = re.sub(r"//[^\n]*", "", header)
    found: dict[str, Parameters] = {}
    for name, inside in re.findall(r"\bint (neq_\w+)\(([^)]*)\)", code):
        words = [" ".join(parameter.split()) for parameter in inside.split(",")]
        found[name] = [(each.rpartition(" ")[0], each.rpartition(" ")[2]) for each in words]
    return found


def _launches(library: Path, launchers: Mapping[str, Parameters]) -> Iterator[CudaLaunch]:
    """Of all launchers with all combinations of arguments; each kernel, with as many threads and as
    much shared memory, once. A launcher may refuse a combination."""
    functions = ctypes.CDLL(str(library))
    take = functions.neq_take_launches
    take.restype = ctypes.c_char_p
    seen: set[tuple[str, ...]] = set()
    for launcher, parameters in launchers.items():
        call = getattr(functions, launcher, None)
        if call is None:  # of a source that nvcc refuses
            continue
        for arguments in _combinations([name for _, name in parameters]):
            call(*(_argument(kind, arguments.get(name)) for kind, name in parameters))
            for line in take().decode().splitlines():
                kernel, _, threads, shared = line.split()
                if (kernel, threads, shared) not in seen:
                    seen.add((kernel, threads, shared))
                    dtype = DTYPES[int(str(arguments["dtype"]))]
                    words = filter(None, itertools.starmap(_word, arguments.items()))
                    numbers = int(threads), int(shared)
                    yield CudaLaunch(kernel, *numbers, launcher, dtype, " ".join(words))


def _combinations(names: Sequence[str]) -> Iterator[dict[str, object]]:
    varied = [name for name in VALUES if name in names]
    for values in itertools.product(*(VALUES[name] for name in varied)):
        yield dict(zip(varied, values, strict=True))


def _word(name: str, value: object) -> str:
    if name == "dtype" or len(VALUES[name]) == 1:
        return ""
    if VALUES[name] == FLAG:
        return name if value else ""
    if name == "from":
        return f"from {DTYPES[int(str(value))]}"
    return f"{name}={value}"


def _argument(kind: str, value: object) -> object:
    if not kind.endswith("*"):
        return _TYPES[kind](OTHER if value is None else value)
    pointee = _TYPES.get(kind.removeprefix("const ").removesuffix("*"), ctypes.c_int64)
    if isinstance(value, Numbers):
        return (pointee * len(value.of))(*value.of)
    return ctypes.byref(_ones(pointee), int(str(value or 0)))


@functools.cache
def _ones(kind: Any) -> Any:
    return (kind * 64)(*[1] * 64)


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"neq_cuda_targets_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _key(files: Sequence[Path], command: Sequence[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True)
    texts = sorted((path.name, path.read_text()) for path in files if path.is_file())
    return hashlib.sha256(repr((texts, list(command), version.stdout)).encode()).hexdigest()[:32]


@functools.cache
def readable(kernel: str) -> str:
    """A mangled name with its template's arguments, without namespaces and what is called with."""
    filter_ = shutil.which("c++filt") or shutil.which("cu++filt")
    if filter_ is None:
        return kernel
    command = [filter_, "-p", kernel]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\bneq::(\w+::)*|\((bool|int)\)|^void ", "", name)
    return name.replace(" >", ">").replace("__nv_bfloat16", "bfloat16").replace("__half", "half")


if __name__ == "__main__":
    for launch in _launches(Path(sys.argv[1]), declared(Path(sys.argv[2]).read_text())):
        print(json.dumps(asdict(launch)), flush=True)
