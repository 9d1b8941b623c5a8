"""Predicted times by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import roofline
from benchmarks.kernels.data_sheets import Gpu
from benchmarks.kernels.roofline import (
    Work,
    counted_ratio,
    expected_sectors,
    needed_bytes,
    needed_part,
)
from neq_kernels.backends.problem import ConvGeometry, Problem

BF16 = torch.bfloat16
FIRST_SHAPES = roofline.bfloat16_shapes()[:3]
# A byte takes a second, so do ten FLOPs.
SLOW = Gpu(1.0, 10.0, 10.0)


def conv(size, k, kernel, stride=1, groups=1, last=True):
    g = ConvGeometry((stride,) * 2, (kernel // 2,) * 2, (1, 1), False, (0, 0), groups)
    return Problem(size, (k, size[1] // groups, kernel, kernel), g, last, BF16)


def test_expected_sectors_of_rows():
    # 16 channels of 2 bytes fill a sector: one of 32 lies in either; two share one 2 * C(16, 2) of
    # C(32, 2) times, which is 240 of 496.
    assert expected_sectors(32, 1, 1) == pytest.approx(1)
    assert expected_sectors(32, 1, 2) == pytest.approx(2 - 240 / 496)
    assert expected_sectors(32, 1, 32) == 2
    # The last 4 of 20 channels have a sector of their custom: needed 4 of 20 times.
    assert expected_sectors(20, 1, 1) == pytest.approx(16 / 20 + 4 / 20)


def test_expected_sectors_of_planes():
    # Planes of 32 bytes: as many sectors as active channels.
    assert expected_sectors(10, 16, 3) == pytest.approx(3)
    # Of 24 pixels: sectors of channel 0, of 0 and 1, of 1; either channel needs two of them.
    assert expected_sectors(2, 24, 1) == pytest.approx(2)


def test_expected_sectors_are_those_of_random_channels():
    generator = torch.Generator().manual_seed(0)
    for channels, inner, n in ((64, 1, 6), (24, 49, 5), (96, 3, 7)):
        offsets = torch.arange(channels * inner).view(channels, inner) // 16
        drawn = [
            len(offsets[torch.randperm(channels, generator=generator)[:n]].unique())
            for _ in range(2000)
        ]
        assert sum(drawn) / 2000 == pytest.approx(expected_sectors(channels, inner, n), rel=0.02)


def test_needed_bytes():
    assert needed_bytes((7, 32), True, 32) == 7 * 64
    assert needed_bytes((3, 32, 5, 5), True, 1) == pytest.approx(3 * 25 * 32)
    assert needed_bytes((3, 32, 4, 4), False, 2) == pytest.approx(3 * 2 * 32)


def test_the_part_of_x_that_a_kernel_passes_over():
    assert needed_part(Problem((8, 16), (16, 16), None, False, BF16)) == 1
    assert needed_part(conv((1, 16, 8, 8), 16, 3)) == 1
    assert needed_part(conv((1, 16, 8, 8), 16, 1, stride=2)) == 1 / 4
    assert needed_part(conv((1, 16, 8, 8), 16, 1, stride=2, last=False)) == 1 / 2


def test_works_of_a_linear_layer():
    # T = 10, C = 8, K = 32, one active: dY 640 bytes, of it a sector a row; X 160, dW 512.
    found = roofline.works(Problem((10, 8), (32, 8), None, False, BF16), 1)
    assert found["dense"].parts == ((640 + 160 + 512, 2 * 10 * 8 * 32),)
    assert found["custom"].parts == ((pytest.approx(320 + 160 + 512), 2 * 10 * 8),)
    pack, product, scatter = found["packed"].parts
    assert pack == (pytest.approx(320 + 20), 0)
    assert product == (20 + 160 + 16, 160)
    assert scatter == (16 + 512, 0)
    assert roofline.works(Problem((10, 8), (32, 8), None, False, BF16), 32)["packed"].parts == (
        found["dense"].parts
    )


def test_works_of_a_depthwise_convolution():
    # 2 images of 16 planes of 16 pixels, 4 active, which are whole sectors of both operands.
    found = roofline.works(conv((2, 16, 4, 4), 16, 3, groups=16, last=False), 4)
    assert found["dense"].parts == ((2 * 1024 + 288, 2 * 32 * 9 * 16),)
    assert found["custom"].parts == ((pytest.approx(2 * 256 + 288), 2 * 32 * 9 * 4),)
    assert found["packed"].parts[0] == (pytest.approx(4 * 256), 0)
    assert found["packed"].parts[1] == (pytest.approx(2 * 256 + 72), 2 * 32 * 9 * 4)


def test_seconds_and_bounds():
    assert Work(((100, 500),)).seconds(SLOW, 10) == 100
    assert Work(((100, 500),)).bound(SLOW, 10) == "memory"
    assert Work(((100, 5000),)).seconds(SLOW, 10) == 500
    assert Work(((100, 5000),)).bound(SLOW, 10) == "compute"
    assert Work(((100, 1100),)).seconds(SLOW, 10, 1.2) == 120
    # One kernel after the other.
    assert Work(((100, 0), (20, 1000))).seconds(SLOW, 10) == 200


def case(operation, active, ratio, inputs=512, kernel=1, side=1, share=0.5):
    return {
        "operation": operation,
        "dtype": "bfloat16",
        "active": active,
        "share": share,
        "inputs": inputs,
        "kernel": kernel,
        "side": side,
        "ratio": ratio,
    }


def test_the_ratio_of_the_case_most_alike():
    traffic = [
        case("linear few rows", 4, 1.1),
        case("linear few rows", 16, 1.2),
        case("conv few rows", 8, 1.3, 256, 3, 28),
        case("depthwise nhwc", 32, 1.4, 1, 3, 28),
        case("depthwise nhwc", 32, 1.5, 1, 7, 28),
    ]
    linear = Problem((100, 512), (64, 512), None, False, BF16)
    assert counted_ratio(linear, 1, traffic) == 1.1
    assert counted_ratio(linear, 12, traffic) == 1.2
    assert counted_ratio(linear, 17, traffic) is None
    assert counted_ratio(linear, 1, []) is None
    assert counted_ratio(conv((2, 64, 14, 14), 64, 3), 8, traffic) == 1.3
    assert counted_ratio(conv((2, 3, 14, 14), 64, 3), 8, traffic) is None
    assert counted_ratio(conv((2, 64, 14, 14), 64, 3, last=False), 8, traffic) is None
    assert counted_ratio(conv((2, 64, 14, 14), 64, 3, stride=2), 8, traffic) is None
    assert counted_ratio(conv((2, 64, 14, 14), 64, 7, groups=64), 32, traffic) == 1.5
    assert counted_ratio(conv((2, 64, 14, 14), 64, 7, groups=64, last=False), 32, traffic) is None


def test_a_transformers_layer_on_an_h100():
    """T = 8192, C = 4096, K = 16384: 1.1 PFLOP at 989.4 TFLOP/s."""
    found = [r for r in roofline.rows(roofline.bfloat16_shapes()[:1], []) if r["gpu"] == "H100"]
    assert [row["active"] for row in found] == [16384, 8192, 4096, 1638, 328]
    dense = 2 * 8192 * 4096 * 16384 / 989.4e12
    assert found[0]["predicted_dense_seconds"] == pytest.approx(dense)
    assert found[1]["predicted_custom_seconds"] == pytest.approx(dense / 2)
    assert [row["predicted_custom_bound"] for row in found] == ["compute"] * 3 + ["memory"] * 2
    assert all(row["counted_ratio"] == "" for row in found)


def test_every_figure_of_time_is_said_to_be_predicted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "bfloat16_shapes", lambda: FIRST_SHAPES)
    assert roofline.main(["--out", str(tmp_path)]) == 0
    assert roofline.NOTICE in capsys.readouterr().out
    header = (tmp_path / "roofline.csv").read_text().splitlines()[1].split(",")
    figures = [name for name in header if "seconds" in name or "speedup" in name or "bound" in name]
    assert len(figures) == 9
    assert all(name.startswith("predicted_") for name in figures)


def test_the_page(tmp_path, monkeypatch):
    page, block = tmp_path / "page.md", roofline.BLOCK
    monkeypatch.setattr(roofline, "BLOCK", replace(block, page=page))
    monkeypatch.setattr(roofline, "TABLE", tmp_path / "results" / "roofline.csv")
    monkeypatch.setattr(roofline, "bfloat16_shapes", lambda: FIRST_SHAPES)
    page.write_text("before\n" + block.begin + "old\n" + block.end + "after\n")
    assert roofline.main(["--out", str(tmp_path), "--publish"]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| transformer mlp up | 1111.0 compute | 2.00" in text
    assert "predicted at r = 0.02" in text
    page.write_text("no place")
    assert roofline.main(["--out", str(tmp_path), "--publish"]) == 2
