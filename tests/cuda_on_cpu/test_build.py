"""What may be built, and with which texts replaced."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from tests.cuda_on_cpu.cases import CUDA, KERNELS
from tests.cuda_on_cpu.emulator import Mode, Run, build

SOURCE = """
#include "value.cuh"
__global__ void fill(int* out) { out[threadIdx.x] = kValue + MORE; }
extern "C" cudaError_t run(int* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  return cudaLaunchKernelEx(&config, fill, out);
}
"""
HEADER = "#include <cuda_runtime.h>\nconstexpr int kValue = 3;\n"


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "fill.cu").write_text(SOURCE)
    (tmp_path / "inc").mkdir()
    (tmp_path / "inc" / "value.cuh").write_text(HEADER)
    return tmp_path


def filled(sources, more: int = 0, replace=()) -> int:
    library = build(
        [sources / "fill.cu"],
        include=[sources / "inc"],
        defines={"MORE": more},
        replace=replace,
        checked=False,
    )
    out = torch.zeros(32, dtype=torch.int32)
    Run(library, Mode(), writes={"out": out}).call("run", out)
    return int(out[0])


def test_what_is_built_follows_the_sources(sources):
    assert filled(sources) == 3
    assert filled(sources, more=4) == 7
    assert filled(sources, replace=[("value.cuh", "= 3", "= 5")]) == 5
    assert filled(sources) == 3
    (sources / "inc" / "value.cuh").write_text(HEADER.replace("3", "8"))
    assert filled(sources) == 8


@pytest.mark.parametrize(
    ("file", "old", "message"),
    [
        ("value.cuh", "absent", "once in value.cuh, got it 0 times"),
        ("value.cuh", "u", "once in value.cuh, got it 4 times"),
        ("other.cuh", "3", "expected one file other.cuh"),
    ],
)
def test_a_text_to_be_replaced_occurs_once(sources, file, old, message):
    with pytest.raises(ValueError, match=message):
        filled(sources, replace=[(file, old, "")])


def test_static_shared_memory_is_refused(sources):
    fault = ("fill.cu", "{ out[", "{ __shared__ int cell[4]; out[")
    with pytest.raises(RuntimeError, match="static __shared__ memory is not emulated"):
        filled(sources, replace=[fault])


def test_errors_of_the_compiler_are_shown(sources):
    with pytest.raises(RuntimeError, match=r"fill\.cu:3:.*kOther.*was not declared"):
        filled(sources, replace=[("fill.cu", "kValue", "kOther")])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("name", ["product.cu", "row_sums.cu", "probes.cu"])
def test_nvcc_takes_the_same_sources(name, tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_80", f"-I{CUDA}", "-Werror=all-warnings", "-ptx"]
    command += [str(KERNELS / name), "-o", str(tmp_path / "out.ptx")]
    subprocess.run(command, check=True)
