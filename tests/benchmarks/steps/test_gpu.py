"""Steps and joules of the GPU's benchmark, on CPU tensors and a made-up counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import neq_kernels as neq
from benchmarks.common import gpu_device
from benchmarks.common.deadline import Deadline
from benchmarks.common.records import Record
from benchmarks.common.workloads import GPU_WORKLOADS, random_masks, set_masks
from benchmarks.gpu_session import report
from benchmarks.steps import comparison, gpu, gpu_energy, peers
from benchmarks.steps.correctness import BFLOAT16, FLOAT32, differences
from neq_kernels.dispatch.selection import selector
from neq_kernels.measure import EnergyMeter, bandwidth
from neq_kernels.measure.energy import NO_COUNTER, DeviceEnergy, EnergyReading
from tests.support import fake_gpu
from tests.support.fake_gpu import FakeNvml, TickingClock
from tests.support.step_workloads import TINY

WORKLOAD = replace(TINY["tiny"], layouts=("nhwc",), autocast=torch.bfloat16)


def test_each_of_our_backends_serves_its_own_steps(tmp_path, monkeypatch):
    served = []

    def measure(workload, backend, *rest):
        served.append((backend, selector.backends_for("cpu")[0]))
        return iter(())

    monkeypatch.setattr(gpu, "measure", measure)
    with Record(tmp_path, gpu.NAME, {}) as record:
        options = gpu.GpuStepOptions()
        gpu.run((WORKLOAD,), options, fake_gpu.lab(), Deadline.after(1.0), record)
    assert served == [("cpu", "cpu"), ("aten", "aten")]


def contest_rows(workload):
    options = gpu.GpuStepOptions((0.5,), 1e-3, 2)
    deadline = Deadline.after(100.0)
    return list(gpu.measure(workload, "cpu", options, fake_gpu.lab(), deadline, lambda: None))


def test_a_model_that_does_not_fit_is_a_row():
    def full(num_classes):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    (row,) = contest_rows(replace(WORKLOAD, build=full))
    assert row["error"] == gpu_device.OUT_OF_MEMORY
    assert (row["model"], row["r"]) == ("tiny", 0.5)


def test_a_step_with_a_wrong_gradient_is_not_timed(monkeypatch):
    def wrong_masks(model, masks, r):
        first = next(iter(masks))
        set_masks(model, {**masks, first: (masks[first] + 1) % 8})

    wrong = comparison.Provider("neq", comparison.OURS.build, wrong_masks)
    monkeypatch.setattr(comparison, "PROVIDERS", (*comparison.PROVIDERS[:2], wrong))
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 2**16)
    rows = contest_rows(WORKLOAD)
    assert [row["provider"] for row in rows] == ["neq"]
    assert rows[0]["error"].startswith("0.weight: ")
    assert not any("speedup" in key for key in rows[0])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_peer_1_and_ours_are_right_under_autocast(autocast):
    workload = replace(WORKLOAD, autocast=autocast)
    models = {"dense": workload.model("nhwc"), "neq": neq.convert(workload.model("nhwc"))}
    models["peer1"] = peers.convert(workload.model("nhwc"))
    masks = random_masks(models["neq"], 0.5)
    set_masks(models["neq"], masks)
    peers.set_active(models["peer1"], masks)
    batch = workload.batches("nhwc", 1)[0]
    tolerance = comparison.tolerance_of(workload)
    assert tolerance == (FLOAT32 if autocast is None else BFLOAT16)
    assert differences(models, masks, batch, workload.loss, tolerance=tolerance) == {}
    models["neq"][8].weight.register_hook(lambda grad: 1.1 * grad)
    assert set(differences(models, masks, batch, workload.loss, tolerance=tolerance)) == {"neq"}


def test_the_peer_saves_what_autocast_would_save():
    kept = []
    model = peers.convert(WORKLOAD.model("nhwc"))
    peers.set_active(model, random_masks(neq.convert(WORKLOAD.model("nhwc")), 0.5))
    x = WORKLOAD.batches("nhwc", 1)[0][0]
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model[0](x)
    assert {t.dtype for t in kept if t.is_floating_point()} == {torch.bfloat16}


def energy(tmp_path, nvml, options=None, failed=(), left=100.0):
    meter = EnergyMeter(gpus=[0] if nvml else None, powercap=tmp_path / "none", nvml=nvml or NONE)
    options = options or gpu_energy.EnergyOptions((0.5,), 5e-3, 2, tuple(failed))
    with Record(tmp_path, gpu_energy.NAME, {}) as record:
        right = gpu_energy.run(
            (WORKLOAD,), options, fake_gpu.lab(), meter, Deadline.after(left), record
        )
    return right, record.rows


class NoDriver(FakeNvml):
    def nvmlInit(self):
        raise self.NVMLError("Driver Not Loaded")


NONE = NoDriver()


def test_without_a_counter_there_are_no_joules(tmp_path):
    right, rows = energy(tmp_path, None)
    assert right
    assert [row["no_counter"] for row in rows] == [NO_COUNTER]
    assert "Driver Not Loaded" in rows[0]["reasons"]
    text = "".join(report._energy(rows, tmp_path))
    assert "no energy counter on this machine" in text


def test_joules_are_per_step(tmp_path, monkeypatch):
    """Every step of an optimizer draws half a joule, whoever's it is."""
    nvml = FakeNvml()
    nvml.per_reading = 0

    def draws(*_):
        nvml.millijoules += 500

    handle = register_optimizer_step_post_hook(draws)
    try:
        right, rows = energy(tmp_path, nvml)
    finally:
        handle.remove()
    assert right
    assert [row["provider"] for row in rows] == ["dense", "neq"]
    for row in rows:
        assert row["joules_per_step_median"] == pytest.approx(0.5)
        assert row["watts"] == pytest.approx(0.5 / row["seconds_per_step"], rel=1e-2)
        assert row["steps"] >= gpu_energy.WARMUP
        assert row["source"] == f"NVML GPU 0 ({fake_gpu.NAME})"
    assert rows[1]["over_dense_median"] == pytest.approx(1.0)


def test_a_counter_that_is_lost_is_no_figure(tmp_path):
    class Lost(FakeNvml):
        readings = 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):
            self.readings += 1
            if self.readings > 12:
                raise self.NVMLError("GPU is lost")
            return super().nvmlDeviceGetTotalEnergyConsumption(handle)

    _, rows = energy(tmp_path, Lost())
    assert any("GPU is lost" in row.get("error", "") for row in rows)
    assert not any("over_dense_median" in row for row in rows)


def test_a_sum_without_one_of_the_gpus_is_no_sum():
    def reading(*devices):
        return EnergyReading(1.0, "", 1.0, tuple(DeviceEnergy(*device) for device in devices))

    assert gpu_energy.joules(reading(("NVML GPU 0", 2.0), ("RAPL package-0", 5.0))) == 2.0
    assert gpu_energy.joules(reading(("NVML GPU 0", 2.0), ("NVML GPU 1", 3.0))) == 5.0
    assert gpu_energy.joules(reading(("NVML GPU 0", 2.0), ("NVML GPU 1", None))) is None
    assert gpu_energy.joules(reading(("RAPL package-0", 5.0))) is None


def test_windows_that_do_not_fit_are_left_out(tmp_path):
    options = gpu_energy.EnergyOptions((0.5,), seconds=3.0, windows=3)
    _, rows = energy(tmp_path, FakeNvml(), options, left=17.0)
    assert [row.get("left_out") for row in rows] == [True]


def test_the_gpu_that_pytorch_uses_is_the_one_that_is_counted():
    nvml = FakeNvml()
    assert gpu_device.number_in_nvml("00000000-AAAA-1", nvml) == 1
    assert gpu_device.number_in_nvml("GPU-00000000-aaaa-0", nvml) == 0
    assert gpu_device.number_in_nvml("other", nvml) is None
    assert gpu_device.number_in_nvml("other", NONE) is None
    assert gpu_device.driver(nvml) == "1.2.3"
    assert gpu_device.driver(NONE) == gpu_device.UNKNOWN


def test_the_models_of_a_gpu_run_in_bfloat16_there():
    assert [workload.name for workload in GPU_WORKLOADS] == ["resnet50", "mlp_4x4096", "vit_b_16"]
    assert {workload.device for workload in GPU_WORKLOADS} == {"cuda"}
    assert {workload.autocast for workload in GPU_WORKLOADS} == {torch.bfloat16}
    with torch.device("meta"):
        model = GPU_WORKLOADS[1].build(10, **GPU_WORKLOADS[1].options)
    assert [m.out_features for m in model if isinstance(m, torch.nn.Linear)] == [4096] * 4 + [10]
    assert TickingClock().mark() > 0
