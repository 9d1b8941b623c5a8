"""Times of products of matrices on GPUs that are not there, from ``nvidia-matmul-heuristics``.

NVIDIA's package models what limits a kernel. It crashes when its objects are destroyed, so every
set of questions goes to a process of its own, which leaves without destroying anything. Run as a
module this file is that process: questions come as JSON on its input.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from importlib import metadata
from typing import Any, NamedTuple

PACKAGE = "nvidia-matmul-heuristics"
_MODULE = "nvMatmulHeuristics"
# Kernels that a library would choose among; the best of them counts.
CANDIDATES = 16
# Types of the operands, of the sum and of the result, in the package's letters.
PRECISIONS = {"fp16": "HSH", "bf16": "TST"}
_METRICS = ("COMPUTE_S", "LOAD_S", "STORE_S", "STATIC_LATENCIES_S")


class Gemm(NamedTuple):
    """A product ``[m, k] x [k, n]``, by the library's kernels (``GENERIC``) or own ones
    (``TRITON``)."""

    m: int
    n: int
    k: int
    kernels: str = "GENERIC"


@dataclass(frozen=True)
class Kernel:
    """What the package expects of one kernel, in seconds: ``latency`` is what it costs whatever the
    sizes are. It takes ``max(compute, load) + store + latency``."""

    compute: float
    load: float
    store: float
    latency: float


Answers = Mapping[Gemm, tuple[Kernel, ...]]


def unavailable() -> str | None:
    """None where predictions can be had, else what is missing."""
    if importlib.util.find_spec(_MODULE) is None:
        return f"predictions need the package {PACKAGE}: pip install {PACKAGE}"
    return None


def version() -> str:
    """The package and its version."""
    return f"{PACKAGE} {metadata.version(PACKAGE)}"


def ask(gpu: str, dtype: str, gemms: Iterable[Gemm]) -> Answers:
    """The expected kernels of every product.

    Args:
        gpu: in the package's words, ``H100_SXM``.
        dtype: ``bf16`` or ``fp16``.

    Raises:
        ValueError: an unknown dtype.
        RuntimeError: the package is missing, fails, or has no answer.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype: expected one of {', '.join(PRECISIONS)}, got {dtype!r}")
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    asked = list(dict.fromkeys(gemms))
    question = {"gpu": gpu, "precision": PRECISIONS[dtype], "gemms": asked}
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"{PACKAGE}: exit status {done.returncode}, it said: {last}")
    answers = {
        gemm: tuple(Kernel(*seconds) for seconds in kernels)
        for gemm, kernels in zip(asked, json.loads(done.stdout), strict=True)
    }
    for gemm, kernels in answers.items():
        if not kernels or not all(sum(astuple(kernel)) > 0 for kernel in kernels):
            raise RuntimeError(f"{PACKAGE}: expected a time for {gemm} on {gpu}, got none")
    return answers


class _Model:
    def __init__(self, package: Any, target: str, gpu: str, precision: str) -> None:
        self._package = package
        self._precision = precision
        kind = package.NvMatmulHeuristicsTarget[target]
        self._api = package.NvMatmulHeuristicsInterface(kind, precision=precision)
        self._backend = self._api.createBackend(kind)
        self._gpu = self._api.createHardwareDescriptor()
        self._api.setHardwarePredefinedGpu(self._gpu, package.NvMatmulHeuristicsNvidiaGpu[gpu])

    def kernels(self, m: int, n: int, k: int) -> list[Kernel]:
        """Of the product and of its transpose: a library may compute either."""
        layout = self._package.NvMatmulHeuristicsMatmulLayout.TN_ROW_MAJOR
        found = []
        for rows, columns in dict.fromkeys([(m, n), (n, m)]):
            problem = self._api.makeNvMatmulHeuristicsProblem(rows, columns, k, layout)
            for each in self._api.get(problem, CANDIDATES, self._gpu):
                kernel = each["nvmmhKernelConfiguration"]
                found.append(Kernel(*(self._metric(problem, kernel, name) for name in _METRICS)))
        return found

    def _metric(self, problem: Any, kernel: Any, name: str) -> float:
        # The package's own method for this hands a number over where a backend is expected.
        estimate = self._api.nvMatmulHeuristicsEstimateSiliconMetricEx
        return float(
            estimate(
                self._api.handle,
                self._precision.encode(),
                self._backend,
                ctypes.byref(problem),
                ctypes.byref(kernel),
                ctypes.c_int(self._package.NvMatmulHeuristicsSiliconMetric[name]),
                self._gpu,
            )
        )


def main() -> None:
    question = json.load(sys.stdin)
    package = importlib.import_module(_MODULE)
    models: dict[str, _Model] = {}
    answers = []
    for *sizes, target in question["gemms"]:
        if target not in models:
            models[target] = _Model(package, target, question["gpu"], question["precision"])
        answers.append([astuple(kernel) for kernel in models[target].kernels(*sizes)])
    print(json.dumps(answers), flush=True)
    os._exit(0)  # while the models live: what they destroy crashes


if __name__ == "__main__":
    main()
