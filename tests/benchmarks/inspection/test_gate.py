"""How many warps reside on a multiprocessor."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from benchmarks.inspection import compile
from benchmarks.inspection.dense_product import product
from benchmarks.inspection.gate import MULTIPROCESSORS, occupancy, resident_warps
from neq_kernels.backends.triton.tiles import Tiles

KIB = 1024


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "resident"),
    [
        # A warp of 64 registers takes 2048; 8 warps in each partition's 16384.
        ("sm_80", 64, 0, 8, 32),
        # 65 registers take what 72 do, 2304: 7 warps per partition, 28: three blocks of 8.
        ("sm_80", 65, 0, 8, 24),
        ("sm_80", 72, 0, 8, 24),
        # 255 registers take what 256 do, 8192: 2 warps per partition, 8.
        ("sm_90", 255, 0, 8, 8),
        ("sm_90", 255, 0, 16, 0),
        # No more than 16 warps per partition, and no more than 32 blocks.
        ("sm_80", 32, 0, 4, 64),
        ("sm_80", 16, 0, 4, 64),
        ("sm_80", 16, 0, 1, 32),
        # 40 KiB and the system's 1 KiB, four times in 164 KiB; one byte more takes 128 more.
        ("sm_80", 16, 40 * KIB, 4, 16),
        ("sm_80", 16, 40 * KIB + 1, 4, 12),
        # 8 warps per partition, and 64 KiB.
        ("sm_75", 64, 0, 4, 32),
        ("sm_75", 65, 0, 4, 28),
        ("sm_75", 32, 64 * KIB, 8, 8),
        ("sm_75", 32, 64 * KIB + 1, 8, 0),
        # 163 KiB are the most on sm_80, 227 KiB from sm_90 on.
        ("sm_80", 16, 163 * KIB, 4, 4),
        ("sm_80", 16, 163 * KIB + 1, 4, 0),
        ("sm_90", 16, 227 * KIB, 8, 8),
        ("sm_90", 16, 227 * KIB + 1, 8, 0),
        # 49 KiB four times in 228 KiB.
        ("sm_90", 32, 48 * KIB, 8, 32),
        ("sm_100", 32, 48 * KIB, 8, 32),
        # 512 registers per lane: 8 times 64, and 7 times the 72 that 65 take.
        ("gfx942", 64, 0, 4, 32),
        ("gfx942", 65, 0, 4, 28),
        ("gfx942", 512, 0, 4, 4),
        ("gfx942", 168, 0, 8, 8),
        # 64 KiB, in units of 512 bytes.
        ("gfx942", 32, 16 * KIB, 4, 16),
        ("gfx942", 32, 16 * KIB + 1, 4, 12),
        ("gfx942", 32, 64 * KIB + 1, 4, 0),
        # 1536 registers per lane: 16 times 96, and 12 times the 120 that 97 take.
        ("gfx1100", 96, 0, 4, 64),
        ("gfx1100", 97, 0, 4, 48),
        ("gfx1100", 256, 0, 4, 20),
        # 128 KiB of two compute units, in units of 1024 bytes; a block has at most 64 KiB.
        ("gfx1100", 32, 32 * KIB, 4, 16),
        ("gfx1100", 32, 32 * KIB + 1, 4, 12),
        ("gfx1100", 32, 64 * KIB, 8, 16),
        ("gfx1100", 32, 64 * KIB + 1, 8, 0),
    ],
)
def test_what_limits_resident_warps(target, registers, shared, warps, resident):
    assert resident_warps(target, registers, shared, warps) == resident


def test_occupancy_is_a_share_of_all_warps():
    assert occupancy("sm_80", 64, 0, 8) == 0.5
    assert occupancy("gfx942", 65, 0, 4) == 0.875
    assert occupancy("gfx1100", 97, 0, 4) == 0.75
    assert all(occupancy(target, 1, 0, 4) == 1 for target in MULTIPROCESSORS)


HEADER = Path(triton.__file__).parent / "backends" / "nvidia" / "include" / "cuda_occupancy.h"
CALCULATOR = """
#include <cuda_occupancy.h>

extern "C" int blocks(int major, int shared_per_sm, int registers, int shared, int threads) {
  cudaOccDeviceProp device;
  const int reserved = major == 7 ? 0 : 1024;
  device.computeMajor = major;
  device.computeMinor = major == 7 ? 5 : 0;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = major == 7 ? 1024 : 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerMultiprocessor = shared_per_sm;
  device.sharedMemPerBlockOptin = shared_per_sm - reserved;
  device.reservedSharedMemPerBlock = reserved;
  device.numSms = 1;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = registers;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared_per_sm - reserved;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  cudaOccResult result;
  return cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)
             ? -1
             : result.activeBlocksPerMultiprocessor;
}
"""


@pytest.fixture(scope="module")
def nvidias_calculator(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None or not HEADER.exists():
        pytest.skip("no C++ compiler, or a Triton without cuda_occupancy.h")
    source = tmp_path_factory.mktemp("occupancy") / "calculator.cpp"
    source.write_text(CALCULATOR)
    library = source.with_suffix(".so")
    include = f"-I{HEADER.parent}"
    subprocess.run([compiler, "-shared", "-fPIC", include, source, "-o", library], check=True)
    return ctypes.CDLL(str(library)).blocks


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_100"])
def test_nvidias_own_calculator_agrees(target, nvidias_calculator):
    major, shared_per_sm = int(target[3:]) // 10, MULTIPROCESSORS[target].shared
    shared = [0, 1, 1024, 4000, 34816, 50_000, 100_000, 163 * KIB, 163 * KIB + 1, 227 * KIB]
    for registers, size, warps in itertools.product(range(1, 256), shared, (1, 2, 4, 8, 16, 32)):
        blocks = nvidias_calculator(major, shared_per_sm, registers, size, 32 * warps)
        assert resident_warps(target, registers, size, warps) == blocks * warps


@pytest.mark.parametrize("target", ["gfx942", "gfx1100"])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_amds_compiler_agrees(target, block):
    dy, x = (torch.empty(512, 256, dtype=torch.float16, device="meta") for _ in range(2))
    with compile.recorded() as launches:
        product(dy, x, Tiles(block, block, 16, 4, 1), "ieee")
    assembly = compile.build(launches[0], compile.TARGETS[target]).asm["amdgcn"]
    registers = compile.inspect_assembly(assembly, 4, 0).registers
    waves_per_partition = int(re.search(r"; Occupancy: (\d+)", assembly)[1])
    assert resident_warps(target, registers, 0, 4) == 4 * waves_per_partition
