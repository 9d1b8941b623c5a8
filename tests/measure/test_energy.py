"""The energy meter, on a made-up sysfs tree and a made-up NVML."""

from __future__ import annotations

import json
import sys
import threading
import types
from pathlib import Path

import pytest

from neq_kernels.measure import energy
from neq_kernels.measure.energy import NO_COUNTER, EnergyMeter
from neq_kernels.measure.energy_counters import CounterError, RaplPackage, rapl_packages

RANGE_UJ = 262_143_328_850


class NVMLError(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_choice_of_the_environment(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


class FakeNvml(types.SimpleNamespace):
    """``energy`` in millijoules per GPU; an exception instead of a number is raised. ``mig`` has
    those in MIG mode. GPU 1 has the UUID GPU-10b, and the MIG instance MIG-1a."""

    NVMLError = NVMLError

    def __init__(self, energy, init_error=None, mig=(), names=()):
        super().__init__(energy=list(energy), init_error=init_error, mig=mig, names=names)

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}0b".encode()

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "MIG-1a":
            raise NVMLError("Not Found")
        return "a part of 1"

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part):
        return int(part[-1])

    def nvmlDeviceGetIndex(self, handle):
        return handle

    def nvmlDeviceGetMigMode(self, handle):
        if not self.mig:
            raise NVMLError("Not Supported")
        return [int(handle in self.mig), 0]

    def nvmlInit(self):
        if self.init_error:
            raise self.init_error

    def nvmlDeviceGetCount(self):
        return len(self.energy)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        if self.names:
            return self.names[handle]
        return b"Test GPU" if handle % 2 else "Test GPU"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        value = self.energy[handle]
        if isinstance(value, Exception):
            raise value
        return value


NO_DRIVER = FakeNvml([], init_error=NVMLError("Driver Not Loaded"))


def zone(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path / "energy_uj"


def meter(root: Path, nvml=NO_DRIVER, **options) -> EnergyMeter:
    return EnergyMeter(powercap=root, nvml=nvml, **options)


def test_a_machine_without_sensors_says_so(tmp_path):
    with meter(tmp_path) as nothing:
        pass
    assert nothing.reading.joules is None
    assert nothing.reading.source == NO_COUNTER == "no energy counter on this machine"
    assert nothing.reading.devices == ()
    assert nothing.counters == ()
    reasons = [str(missing) for missing in nothing.missing]
    assert reasons == [
        "NVML: no NVIDIA driver (Driver Not Loaded)",
        f"RAPL: no intel-rapl package under {tmp_path}",
    ]


def test_packages_are_summed_and_nothing_is_counted_twice(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    inside = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:0:1", "dram", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    with meter(tmp_path) as both:
        first.write_text("3000000")
        second.write_text("5500000")
        for other in inside:
            other.write_text("77000000")
    assert both.joules == pytest.approx(2.5)
    assert both.source == "RAPL package-0, RAPL package-1"
    assert [d.joules for d in both.reading.devices] == pytest.approx([2.0, 0.5])
    assert both.reading.seconds > 0


def test_gpus_are_summed_in_joules(tmp_path):
    nvml = FakeNvml([1000, 2000, 3000])
    with meter(tmp_path, nvml) as every:
        nvml.energy = [2500, 2000, 3250]
    assert every.joules == pytest.approx(1.75)
    assert every.source == ("NVML GPU 0 (Test GPU), NVML GPU 1 (Test GPU), NVML GPU 2 (Test GPU)")
    with meter(tmp_path, nvml, gpus=[2, 2]) as one:
        nvml.energy = [9999, 9999, 3350]
    assert one.joules == pytest.approx(0.1)
    assert one.source == "NVML GPU 2 (Test GPU)"


@pytest.mark.parametrize(
    ("visible", "counted"),
    [
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 2 , 2,1", [2, 1]),
        ("1,7,0", [1]),
        ("1,-1,0", [1]),
        ("GPU-10b,GPU-0", [1, 0]),
        ("GPU-,0", []),  # fits more than one
        ("MIG-1a", [1]),
        ("MIG-unknown,0", []),
        ("MIG-GPU-10b/3/0", [1]),
        ("", []),
        ("-1", []),
        ("none", []),
    ],
)
def test_only_the_gpus_that_cuda_shows_this_process_are_counted(
    tmp_path, monkeypatch, visible, counted
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml([0, 0, 0])
    with meter(tmp_path, nvml) as some:
        nvml.energy = [1000, 10_000, 100_000]
    assert some.joules == (sum([1, 10, 100][i] for i in counted) if counted else None)
    assert [name[:10] for name in some.counters] == [f"NVML GPU {i}" for i in counted]
    if not counted:
        reason = f"NVML: CUDA_VISIBLE_DEVICES={visible} leaves no GPU"
        assert str(some.missing[0]) == reason
    # Whoever gives numbers means nvidia-smi's.
    assert meter(tmp_path, nvml, gpus=[0]).counters == ("NVML GPU 0 (Test GPU)",)


def test_what_a_counter_holds_besides_is_said(tmp_path):
    names = ["NVIDIA A100", "NVIDIA H100", "NVIDIA GH200 480GB"]
    with meter(tmp_path, FakeNvml([0, 0, 0], mig=[1], names=names)) as all_of_them:
        pass
    assert all_of_them.source == (
        "NVML GPU 0 (NVIDIA A100), "
        "NVML GPU 1 (NVIDIA H100, all of its MIG instances together), "
        "NVML GPU 2 (NVIDIA GH200 480GB, perhaps the whole module with its processor)"
    )


def test_gpus_and_packages_together(tmp_path):
    nvml = FakeNvml([0])
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with meter(tmp_path, nvml) as both:
        nvml.energy = [4000]
        file.write_text("1500000")
    assert both.joules == pytest.approx(5.5)


def test_a_counter_that_wraps_once(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    with meter(tmp_path) as wrapped:
        file.write_text("1000000")
    assert wrapped.joules == pytest.approx(3.0)


def test_a_counter_that_wraps_many_times_is_followed_by_the_thread(tmp_path, monkeypatch):
    laps = [10.0, 60.0, 10.0, 60.0, 10.0, 60.0]
    lap_ends = threading.Event()

    def read(self):
        value = laps.pop(0) if len(laps) > 1 else laps[0]
        if len(laps) == 1:
            lap_ends.set()
        return value

    zone(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=100_000_000)
    monkeypatch.setattr(RaplPackage, "read", read)
    monkeypatch.setattr(energy, "MAX_PACKAGE_WATTS", 1e6)
    running = meter(tmp_path)  # takes one reading
    with running:
        assert lap_ends.wait(timeout=60)
    # 60 at the start, then 10 60 10 60, each fall a lap of 100.
    assert running.joules == pytest.approx(50 + 50 + 50 + 50)


def test_without_a_range_no_thread_is_needed_and_a_restart_is_a_loss(tmp_path):
    nvml = FakeNvml([5000])
    threads = threading.active_count()
    with meter(tmp_path, nvml) as running:
        assert threading.active_count() == threads
        nvml.energy = [10]
    assert running.joules is None
    assert "its counter started again" in running.source


@pytest.fixture
def only_root(monkeypatch):
    """Reading ``energy_uj`` is denied, as for a user on a recent kernel."""
    read_text = Path.read_text

    def denied(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)


def test_permission_denied_is_said_in_words(tmp_path, only_root):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with meter(tmp_path) as denied:
        pass
    reason = f"permission denied, only root may read {file}"
    assert denied.joules is None
    assert denied.source == f"no readable energy counter (RAPL package-0: {reason})"
    assert [d.reason for d in denied.reading.devices] == [reason]


def test_a_partial_sum_says_what_is_not_in_it(tmp_path, only_root):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    nvml = FakeNvml([0, NVMLError("Not Supported")])
    with meter(tmp_path, nvml) as partial:
        nvml.energy[0] = 1000
    assert partial.joules == pytest.approx(1.0)
    counted, not_counted = partial.source.split("; not counted: ")
    assert counted == "NVML GPU 0 (Test GPU)"
    assert "NVML GPU 1 (Test GPU): no total energy counter (Not Supported)" in not_counted
    assert "RAPL package-0: permission denied" in not_counted


def test_a_counter_that_goes_missing_midway_gives_no_figure(tmp_path):
    nvml = FakeNvml([0])
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with meter(tmp_path, nvml) as running:
        nvml.energy = [1000]
        file.unlink()
    assert running.joules is None
    assert running.source.startswith("RAPL package-0 was lost: cannot read")
    assert {d.name: d.joules for d in running.reading.devices} == {
        "NVML GPU 0 (Test GPU)": 1.0,
        "RAPL package-0": None,
    }


def test_a_gpu_that_falls_off_the_bus_gives_no_figure(tmp_path):
    nvml = FakeNvml([0, 0])
    with meter(tmp_path, nvml) as running:
        nvml.energy = [1000, NVMLError("GPU is lost")]
    assert running.joules is None
    assert "GPU is lost" in running.source


@pytest.mark.parametrize("content", ["", "no number"])
def test_a_garbled_counter_is_reported(tmp_path, content):
    zone(tmp_path, "intel-rapl:0", "package-0", 0).write_text(content)
    counters, (missing,) = rapl_packages(tmp_path)
    assert counters == []
    assert missing.present
    assert "cannot read" in missing.reason


def test_nvml_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    missing = EnergyMeter(powercap=tmp_path).missing
    assert "NVML: nvidia-ml-py is not installed" in map(str, missing)


def test_a_gpu_that_is_not_there_raises(tmp_path):
    with pytest.raises(ValueError, match="gpus: expected numbers below 2, got 2"):
        meter(tmp_path, FakeNvml([0, 0]), gpus=[2])


def test_windows_follow_each_other_and_do_not_overlap(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    again = meter(tmp_path)
    with pytest.raises(RuntimeError, match="reading: expected a finished window"):
        _ = again.reading
    with pytest.raises(RuntimeError, match="stop: this meter is not running"):
        again.stop()
    for end in (1, 2):
        again.start()
        with pytest.raises(RuntimeError, match="start: this meter is already running"):
            again.start()
        file.write_text(str(end * 1_000_000))
        assert again.stop().joules == pytest.approx(1.0)


def test_a_window_left_by_an_exception_is_closed(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    threads = threading.active_count()
    failing = meter(tmp_path)
    with pytest.raises(RuntimeError, match="planted"), failing:
        raise RuntimeError("planted")
    assert failing.reading.joules == 0
    assert threading.active_count() == threads


def test_readings_are_json(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with meter(tmp_path) as running:
        pass
    saved = json.loads(json.dumps(running.reading.to_dict()))
    assert saved["devices"] == [{"name": "RAPL package-0", "joules": 0.0, "reason": ""}]


def test_counter_errors_are_not_swallowed_elsewhere(tmp_path):
    with pytest.raises(CounterError, match="cannot read"):
        RaplPackage("RAPL package-0", tmp_path / "energy_uj", None).read()
