"""The GPU's kernel benchmark on CPU tensors and a made-up clock: gate, faults, time, rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.deadline import Deadline
from benchmarks.common.gpu_device import OUT_OF_MEMORY, DeviceLost
from benchmarks.kernels import comparison, gpu, layer_shapes, peers
from benchmarks.kernels.gpu import GpuKernelOptions
from benchmarks.kernels.layer_shapes import Shape
from neq_kernels.backends.problem import KernelChoice, Strategy
from neq_kernels.dispatch.selection import selector
from tests.support.backends import cpu
from tests.support.fake_gpu import TickingClock, lab
from tests.support.small_problems import CONV, LINEAR, SHAPE

OPTIONS = GpuKernelOptions(shares=(1.0, 0.5), seconds=1e-3)


def rows(shape=SHAPE, options=OPTIONS, deadline=None, where=None, check=lambda: None):
    deadline = deadline or Deadline.after(100.0)
    return list(gpu.measure(shape, options, where or lab(), deadline, check))


def named(rows, share):
    return {row["provider"]: row for row in rows if row["share"] == share}


def test_every_provider_beside_dense_and_the_peer():
    found = rows()
    half = named(found, 0.5)
    ours = {"neq", "neq dense", "neq pack", "neq custom", "neq aten"}
    assert set(half) == {"dense", "index_select"} | ours
    assert set(named(found, 1.0)) == {"dense", "index_select", "neq", "neq custom"}
    for name, row in half.items():
        assert row["seconds_p20"] <= row["seconds_median"] <= row["seconds_p80"]
        assert ("over_dense_median" in row) == (name != "dense")
        assert ("over_index_select_median" in row) == (name != "index_select")
        assert ("strategy" in row) == (name == "neq")
        assert row["error_over_dense"] <= comparison.MOST_ERROR
        assert (row["active"], row["channels"], row["dtype"]) == (6, 12, "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", [CONV, LINEAR], ids=["conv", "linear"])
def test_in_every_precision_what_is_right_passes(problem, dtype):
    where = lab(backend="aten" if dtype == torch.bfloat16 else "cpu")
    found = rows(Shape("net", "layer", problem._replace(dtype=dtype)), where=where)
    assert [row for row in found if "wrong" in row or "error" in row] == []
    assert {row["dtype"] for row in found} == {str(dtype).removeprefix("torch.")}


def spoiled(monkeypatch, strategy, spoil):
    """The backend's gradients by one strategy, changed before anybody sees them."""
    right = cpu.conv_backward

    def wrong(*args, choice, **kwargs):
        grads = right(*args, choice=choice, **kwargs)
        told = choice.strategy is strategy
        return (grads[0], spoil(grads[1]), grads[2]) if told else grads

    monkeypatch.setattr(cpu, "conv_backward", wrong)


def leaks(gradient):
    """A frozen row gets a gradient."""
    rows = gradient.flatten(1).abs().sum(1)
    gradient[int(rows.argmin())] += 0.1 * gradient.abs().max()
    return gradient


FAULTS = {
    "a percent": lambda g: 1.01 * g,
    "rows exchanged": lambda g: g.roll(1, 0),
    "a frozen row": leaks,
    "NaN": lambda g: g.index_fill(0, torch.tensor([3]), torch.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_not_timed(monkeypatch, fault):
    spoiled(monkeypatch, Strategy.PACK, FAULTS[fault])
    half = named(rows(options=GpuKernelOptions(shares=(0.5,), seconds=1e-3)), 0.5)
    assert "times the dense error" in half["neq pack"]["wrong"]
    assert not any("seconds" in key or "over_" in key for key in half["neq pack"])
    assert "seconds_median" in half["neq dense"]
    assert "seconds_median" in half["dense"]


def test_a_wrong_peer_is_not_timed_either(monkeypatch):
    provider = peers.PROVIDERS["index_select"]
    half_right = lambda *args: (0.9 * provider.wgrad(*args)[0], None)  # noqa: E731
    wrong = peers.Provider("index_select", half_right)
    monkeypatch.setitem(peers.PROVIDERS, "index_select", wrong)
    half = named(rows(), 0.5)
    assert "wrong" in half["index_select"]
    assert "over_index_select_median" not in half["neq"]
    assert "over_dense_median" in half["neq"]


def test_backends_whose_tests_failed_are_not_timed():
    half = named(rows(options=GpuKernelOptions((0.5,), 1e-3, failed=("cpu",))), 0.5)
    for name in ("neq", "neq custom", "neq pack", "neq dense"):
        assert half[name]["error"] == "not timed: tests of cpu failed"
        assert "over_dense_median" not in half[name]
    assert "over_dense_median" in half["neq aten"]


def test_out_of_memory_and_faults_are_rows(monkeypatch):
    def full(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    spoiled(monkeypatch, Strategy.CUSTOM, full)
    half = named(rows(), 0.5)
    assert half["neq custom"]["error"] == OUT_OF_MEMORY
    assert "seconds_median" in half["neq pack"]

    def no_operands(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu.trial, "operands", no_operands)
    found = rows()
    assert [row["error"] for row in found] == [OUT_OF_MEMORY] * 2
    assert [row["share"] for row in found] == [1.0, 0.5]


def test_a_device_that_does_not_answer_any_more_ends_it(monkeypatch):
    clock = TickingClock()

    def fault(gradient):
        clock.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    spoiled(monkeypatch, Strategy.CUSTOM, fault)
    with pytest.raises(DeviceLost, match=r"^RuntimeError: CUDA error: an illegal memory access"):
        rows(where=lab(clock))


def test_cells_without_time_are_named():
    now = [0.0]
    deadline = Deadline.after(10.0, lambda: now[0])

    def check():
        now[0] += 9.0

    found = rows(options=GpuKernelOptions((1.0, 0.5, 0.25), 1e-3), deadline=deadline, check=check)
    assert {row["share"] for row in found if "seconds_median" in row} == {1.0}
    assert [row["share"] for row in found if row.get("left_out")] == [0.5, 0.25]


def test_tf32_is_a_rounding_where_it_is_allowed(monkeypatch):
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    try:
        for value, rounding in (("tf32", 2**-10), ("ieee", torch.finfo(torch.float32).eps)):
            setting.fp32_precision = value
            assert gpu._rounding(CONV) == rounding
            half = CONV._replace(dtype=torch.bfloat16)
            assert gpu._rounding(half) == torch.finfo(torch.bfloat16).eps
    finally:
        setting.fp32_precision = before


def test_the_layers_of_a_gpu():
    found = layer_shapes.gpu_shapes()
    keys = [(s.network, s.layer, s.layout, s.problem.dtype) for s in found]
    assert len(set(keys)) == len(keys)
    assert {s.network for s in found} == {"transformer", "resnet50", "vit_b_16", "convnext_tiny"}
    assert {s.layout for s in found} == {"rows", "nchw", "nhwc"}
    assert {s.problem.dtype for s in found} == {torch.bfloat16, torch.float32}
    assert any(s.problem.is_depthwise for s in found)
    assert max(s.problem.neurons for s in found if s.problem.geometry is None) >= 4096


def test_every_way_of_running_the_own_kernel_has_a_name(monkeypatch):
    """Here the CPU's kernel, which has but one, is asked for two."""
    names = [
        KernelChoice(Strategy.DENSE),
        KernelChoice(Strategy.CUSTOM),
        KernelChoice(Strategy.CUSTOM, (16, 64)),
    ]
    right = cpu.conv_backward

    def without_settings(*args, choice, **kwargs):
        if choice.settings:
            raise ValueError("settings: there are none")
        return right(*args, choice=choice, **kwargs)

    monkeypatch.setattr(cpu, "conv_backward", without_settings)
    ways = dict.fromkeys(names, cpu)
    monkeypatch.setattr(selector, "candidates", lambda *_: ways)
    half = named(rows(), 0.5)
    assert {"neq dense", "neq custom", "neq custom 16x64"} <= set(half)
    assert "settings" in half["neq custom 16x64"]["error"]
    assert "error" not in half["neq custom"]
