"""What a figure was measured with."""

from __future__ import annotations

import pytest

from neq_kernels import machine

AVX512 = "avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu sse2 avx2 fma bmi2\n", "x86-avx2"),
        ("flags\t\t: fpu avx2\n", "other"),
        (f"flags\t\t: avx2 fma {AVX512}\n", "x86-avx512"),
        (f"flags\t\t: avx2 fma {AVX512} amx_tile amx_int8\n", "x86-avx512"),
        (f"flags\t\t: avx2 fma {AVX512} avx512_bf16 amx_tile amx_bf16\n", "x86-avx512-amx"),
        ("flags\t\t: avx2 fma avx512f\n", "x86-avx2"),
        ("Features\t: fp asimd bf16 sve\n", "other"),
        ("", "other"),
        (None, "other"),
    ],
)
def test_class_of_the_cpu(cpuinfo, expected, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(f"processor\t: 0\nmodel name\t: A CPU: 3 GHz\n{cpuinfo}\nflags\t: none\n")
    monkeypatch.setattr(machine, "CPUINFO", path)
    assert machine.cpu_class() == expected
    about = machine.machine()
    assert about.cpu_class == expected in machine.CPU_CLASSES
    assert about.cpu == "A CPU: 3 GHz" or cpuinfo is None
