"""The CUDA C++ kernels, compiled for GPUs that are not there, and what is found wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.inspection import cuda_kernels, cuda_launches, gpu_kernels
from benchmarks.inspection.compile import inspect_cubin
from benchmarks.inspection.cuda_launches import declared, readable

pytestmark = pytest.mark.skipif(
    cuda_launches.unavailable() is not None, reason=str(cuda_launches.unavailable())
)

HEADER = """
#include <cstdint>
extern "C" {
// int neq_not_this(int32_t dtype);
int neq_cuda_pack(int32_t dtype, const void* rows, float* sums, int32_t transposed, void* stream);
int neq_cuda_linear_wgrad(int32_t dtype, const int64_t* strides, int32_t most, int64_t c,
                          double lr, void* stream);
int64_t neq_cuda_pack_rows();
}
"""
# Named for what is wrong with them.
PLANTED = """
#include "launchers.h"
#include <cuda_runtime.h>

template <class T>
__global__ void __launch_bounds__(1024) spills(const float* from, float* to, int turns) {
  float sums[96] = {};
  for (int turn = 0; turn < turns; ++turn) {
    for (int i = 0; i < 96; ++i) sums[i] += from[turn * i] * sums[(i + 7) % 96];
  }
  for (int i = 0; i < 96; ++i) to[threadIdx.x * 96 + i] = sums[i];
}

__global__ void fine(float* to) {
  extern __shared__ float tile[];
  tile[threadIdx.x] = to[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void is_forgotten(float* to) { *to = 1; }

template <int kNeurons>
__global__ void product(const float* a, float* to, int turns) {
  float sum = 0;
  for (int turn = 0; turn < turns; ++turn) sum += a[turn] * kNeurons;
  to[threadIdx.x] = sum;
}

template <class Kernel, class... Arguments>
int run(Kernel kernel, unsigned threads, int shared, Arguments... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

extern "C" int neq_cuda_pack(int32_t dtype, const void* rows, float* sums, int32_t transposed,
                             void*) {
  if (dtype != 0) return cudaErrorInvalidValue;
  if (transposed) return run(spills<float>, 1024, 0, static_cast<const float*>(rows), sums, 3);
  fine<<<2, 64, 256>>>(sums);
  return run(fine, 64, 200 << 10, sums);
}

extern "C" int neq_cuda_linear_wgrad(int32_t, const int64_t* strides, int32_t most, int64_t c,
                                     double, void*) {
  if (strides[2] != 1 || c != 128) return cudaErrorInvalidValue;
  const float* none = nullptr;
  float* to = nullptr;
  return most == 8 ? run(product<8>, 128, 0, none, to, 5) : run(product<16>, 32, 0, none, to, 5);
}
"""
NEEDS_SM_80 = """
__global__ void copies(void* to, const void* from) {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    for name, text in (
        ("launchers.h", HEADER),
        ("planted.cu", PLANTED),
        ("later.cu", NEEDS_SM_80),
        ("broken.cu", "__global__ void broken() { undefined(); }"),
    ):
        (folder / name).write_text(text)
    return folder


def by_kernel(rows):
    found = {}
    for row in rows:
        found.setdefault(row["kernel"].removeprefix("cuda."), []).append(row)
    return found


@pytest.fixture(scope="module")
def found(planted):
    return by_kernel(cuda_kernels.rows(["sm_80"], planted))


def test_spills_fail(found):
    (row,) = found["spills"]
    assert row["spills"] > 0
    assert row["fails"] == "spills"


def test_launches_are_what_the_launchers_make(found, planted):
    little, much = found["fine"]
    assert (little["warps"], little["shared"], little["fails"]) == (2, 256, "")
    assert (much["warps"], much["shared"], much["fails"]) == (2, 200 << 10, "does not fit")
    assert little["case"] == "pack"
    assert found["spills"][0]["case"] == "pack transposed"
    assert found["spills"][0]["warps"] == 32
    (larger,) = [
        row for row in cuda_kernels.rows(["sm_90"], planted) if row.get("shared") == 200 << 10
    ]
    assert larger["fails"] == ""


def test_a_half_precision_product_without_a_tensor_core_fails(found):
    rows = {(row["tile"], row["dtype"]): row for row in found["product"]}
    assert rows["8", "float16"]["fails"] == "no tensor core"
    assert rows["8", "float16"]["case"] == "linear most=8 c=128"
    assert rows["16", "float16"]["warps"] == 1


def test_a_kernel_that_nobody_launches_fails(found):
    (row,) = found["is_forgotten"]
    assert row["fails"] == "never launched"


def test_what_nvcc_refuses_fails(found):
    (row,) = found["broken"]
    assert row["error"] == 'identifier "undefined" is undefined'


def test_what_later_gpus_alone_can_do_is_said_and_does_not_fail(planted):
    (row,) = by_kernel(cuda_kernels.rows(["sm_75"], planted))["later"]
    assert (row["needs"], row["fails"]) == ("sm_80", "")


def test_parameters_by_name():
    assert declared(HEADER)["neq_cuda_linear_wgrad"] == [
        ("int32_t", "dtype"),
        ("const int64_t*", "strides"),
        ("int32_t", "most"),
        ("int64_t", "c"),
        ("double", "lr"),
        ("void*", "stream"),
    ]
    assert list(declared(HEADER)) == ["neq_cuda_pack", "neq_cuda_linear_wgrad"]


def test_names_for_readers():
    mangled = "_ZN3neq4cuda13finish_kernelI6__halfS2_EEvNS0_6FinishIT_T0_EE"
    assert readable(mangled) == "finish_kernel<half, half>"


# --- the project's own ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own():
    return list(cuda_kernels.rows(["sm_80"]))


def test_no_kernel_fails(own):
    """Neither spills, nor is there a block that does not fit, a product of half precision without
    tensor cores, a kernel that is never launched or a source that nvcc refuses."""
    assert [row for row in own if row.get("error") or row.get("needs") or row["fails"]] == []


def test_all_jobs_and_dtypes_are_there(own):
    jobs = {(row.get("job"), row.get("dtype")) for row in own}
    of_every_dtype = {(job, dtype) for job in cuda_kernels.JOBS for dtype in cuda_launches.DTYPES}
    assert of_every_dtype <= jobs


def test_products_copy_asynchronously_and_multiply_in_tensor_cores(own):
    products = [row for row in own if row.get("job") in cuda_kernels.PRODUCTS]
    assert min(row["asynchronous"] for row in products) > 0
    half = [row for row in products if row["dtype"] in cuda_kernels.HALF]
    assert min(row["share"] for row in half) > 0
    assert not any(row["tensor_core"] for row in products if row["dtype"] == "float32")


def test_both_languages_stand_side_by_side(own, monkeypatch, tmp_path, capsys):
    names = {"kernel": "linear_wgrad.wgrad_kernel", "case": "linear n=8", "job": "linear"}
    about = {"dtype": "float16", "target": "sm_80", "language": "triton", "compiler": "triton 3"}
    figures = {"registers": 99, "spills": 0, "shared": 1, "loop": 8, "asynchronous": 3}
    triton = names | about | figures | {"occupancy": 0.25, "share": 0.5, "fails": ""}
    languages = {"triton": (lambda _: [triton], ["sm_80"]), "cuda": (lambda _: own, ["sm_80"])}
    monkeypatch.setattr(gpu_kernels, "LANGUAGES", languages)
    arguments = ["--targets", "sm_80", "--out", str(tmp_path), "--languages", "triton", "cuda"]
    gpu_kernels.main(arguments)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if line.startswith("linear  ")]
    assert lines[0] == ["linear", "half", "sm_80", "triton", "1", "99", "0.25", "0.50", "3"]
    assert lines[1][:4] == ["linear", "half", "sm_80", "cuda"]
    assert len(lines) == 2
    assert (tmp_path / "targets.csv").read_text().count("\ncuda.") == len(own)


def test_without_nvcc_the_other_language_is_compiled(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_launches, "unavailable", lambda: "no nvcc found")
    monkeypatch.setattr(gpu_kernels, "rows", lambda _: iter([]))
    arguments = ["--targets", "sm_80", "--out", str(tmp_path)]
    assert gpu_kernels.main(arguments) == 0
    assert "without the kernels in CUDA C++: no nvcc found" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_kernels.main([*arguments, "--languages", "cuda"])
    assert "--languages cuda: no nvcc found" in capsys.readouterr().err


def test_a_cubin_of_the_cache_is_the_launched_one():
    program = cuda_launches.compiled("sm_80")
    launch = program.launches[0]
    (cubin,) = [c for c in program.cubins.values() if launch.kernel.encode() in c]
    found = inspect_cubin(cubin, launch.threads // 32, launch.shared, launch.kernel)
    assert found.shared >= launch.shared
