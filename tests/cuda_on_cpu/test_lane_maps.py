"""Fragments are where NVIDIA's CuTe says that they are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.cases import CUDA, KERNELS
from tests.cuda_on_cpu.emulator import MODES, Run, build


def package_folder(module: str, package: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"the package {package} is missing: pip install --no-deps {package}")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="module")
def cute(tmp_path_factory) -> dict[str, Tensor]:
    """By fragment the elements of every lane, (32, elements of a lane)."""
    cuda = package_folder("nvidia.cu13", "nvidia-cuda-runtime") / "include"
    for header, package in (
        ("crt/host_defines.h", "nvidia-cuda-crt"),
        ("cccl/cuda/std/utility", "nvidia-cuda-cccl"),
    ):
        if not (cuda / header).exists():
            pytest.fail(f"{header} is missing: pip install --no-deps {package}")
    cutlass = package_folder("cutlass_library", "nvidia-cutlass") / "source" / "include"
    program = tmp_path_factory.mktemp("cute") / "lane_maps"
    include = [f"-I{folder}" for folder in (cutlass, cuda, cuda / "cccl")]
    source = str(KERNELS / "cute_lane_maps.cpp")
    subprocess.run(["g++", "-std=c++17", "-w", *include, source, "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], check=True, capture_output=True).stdout
    return {name: torch.tensor(map_).view(32, -1) for name, map_ in json.loads(printed).items()}


@pytest.fixture(scope="module", params=[True, False], ids=["checked", "fast"])
def fragments(request):
    return build([KERNELS / "fragments.cu"], include=[CUDA], checked=request.param)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_ldmatrix(cute, fragments, mode):
    rows = torch.arange(32 * 8, dtype=torch.int16)
    names = [f"ldmatrix_{kind}" for kind in ("x2", "x2_trans", "x4", "x4_trans")]
    loaded = {name: torch.full(cute[name].shape, -1, dtype=torch.int16) for name in names}
    Run(fragments, mode, {"rows": rows}, loaded).call("run_load_fragments", rows, *loaded.values())
    for name in names:
        assert torch.equal(loaded[name].long(), cute[name]), name


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_mma(cute, fragments, mode, name, dtype):
    a, b, d = (torch.randint(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
    # Elements are numbered m + 16 k, n + 8 k and m + 16 n.
    in_a = a.t().flatten()[cute[f"{name}_a"]].to(dtype)
    in_b = b.flatten()[cute[f"{name}_b"]].to(dtype)
    in_d = d.t().flatten()[cute[f"{name}_d"]].float()
    run = Run(fragments, mode, {"a": in_a, "b": in_b}, {"d": in_d})
    run.call(f"run_multiply_{name}", in_a, in_b, in_d)
    expected = (a @ b + d).t().flatten()[cute[f"{name}_d"]]
    assert torch.equal(in_d.long(), expected)


def test_a_wrong_map_is_found(cute, fragments):
    """The comparisons above can fail: lanes of one fragment in another order."""
    shifted = {**cute, "half_a": cute["half_a"].roll(1, dims=0)}
    with pytest.raises(AssertionError):
        test_mma(shifted, fragments, MODES[0], "half", torch.float16)
    shifted = {**cute, "ldmatrix_x4_trans": cute["ldmatrix_x4"]}
    with pytest.raises(AssertionError):
        test_ldmatrix(shifted, fragments, MODES[0])
