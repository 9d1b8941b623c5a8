"""The CUDA C++ kernels' rows of ``benchmarks.inspection.gpu_kernels``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.records import Row
from benchmarks.inspection.compile import inspect_cubin, kernels_in
from benchmarks.inspection.cuda_launches import (
    KERNELS,
    CudaLaunch,
    compiled,
    nvcc_version,
    readable,
)
from benchmarks.inspection.gate import judged

TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100")
JOBS = ("finish", "pack", "linear", "conv", "depthwise", "sgd", "adam")
PRODUCTS = ("linear", "conv")
HALF = ("float16", "bfloat16")
_NEEDS = re.compile(r"requires \.target (sm_\d+)")


def rows(targets: Sequence[str], folder: Path = KERNELS) -> Iterator[Row]:
    """One row per kernel and target. A kernel fails that no launcher launches; a source that uses
    what only later GPUs have is said to need them, and does not fail.

    Raises:
        RuntimeError: there is no CUDA toolkit.
    """
    about = {"language": "cuda", "compiler": f"nvcc {nvcc_version()}"}
    for target in targets:
        program = compiled(target, folder)
        for source, error in program.errors.items():
            row = {"kernel": f"cuda.{source}", "target": target} | about
            needs = _NEEDS.search(error)
            yield row | ({"needs": needs[1], "fails": ""} if needs else {"error": error})
        cubin_of = {k: cubin for cubin in program.cubins.values() for k in kernels_in(cubin)}
        for launch in program.launches:
            yield about | _row(launch, cubin_of[launch.kernel], target)
        for kernel in cubin_of.keys() - {launch.kernel for launch in program.launches}:
            row = {"kernel": _short(kernel), "tile": _instance(kernel), "target": target} | about
            yield row | {"fails": "never launched"}


def job_of(launcher: str) -> str:
    """What a launcher is for, in the words of the cases of ``inspection.gpu_kernels``."""
    return next((job for job in JOBS if job in launcher), launcher.removeprefix("neq_cuda_"))


def _row(launch: CudaLaunch, cubin: bytes, target: str) -> Row:
    job = job_of(launch.launcher)
    found = inspect_cubin(cubin, -(-launch.threads // 32), launch.shared, launch.kernel)
    # On sm_75 the lanes multiply by themselves.
    needs = target != "sm_75" and job in PRODUCTS and launch.dtype in HALF
    return {
        "kernel": _short(launch.kernel),
        "case": f"{job} {launch.arguments}".rstrip(),
        "job": job,
        "tile": _instance(launch.kernel),
        "dtype": launch.dtype,
        "target": target,
        **judged(found, target, needs_tensor_core=needs),
    }


def _short(kernel: str) -> str:
    return f"cuda.{readable(kernel).partition('<')[0]}"


def _instance(kernel: str) -> str:
    """The template's arguments but types of elements, which ``dtype`` says."""
    inside = readable(kernel).partition("<")[2].replace("true", "1").replace("false", "0")
    return " ".join(word for word in re.findall(r"\w+", inside) if word not in _ELEMENTS)


_ELEMENTS = ("float", "half", "bfloat16")
