"""What each strategy is chosen for, from the committed cost data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.kernels import wgrad_times
from benchmarks.suite import cost_data, strategy_map, summary
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.cost_model import CostModel

LINES = """run,dtype,network,layer,layout,active,dense,pack,custom
0,float32,resnet32,layer1.0.conv1,nchw,16,100,120,200
1,float32,resnet32,layer1.0.conv1,nchw,16,110,130,190
0,float32,resnet32,layer1.0.conv1,nchw,8,100,60,80
0,float32,resnet32,layer1.0.conv1,nchw,1,100,60,30
0,bfloat16,resnet32,layer1.0.conv1,nhwc,1,100,,30
0,float32,tiny,linear 16,rows,1,1,1,1
"""


@pytest.fixture
def costs(tmp_path, monkeypatch):
    """Tables that choose to pack what can be packed."""
    monkeypatch.setattr(wgrad_times, "DATA", tmp_path)
    (tmp_path / "x86-avx512.csv").write_text(LINES)

    def pack(self, problem, n, usable):
        return Strategy.PACK if Strategy.PACK in usable else Strategy.DENSE

    monkeypatch.setattr(CostModel, "strategy", pack)
    return tmp_path


def test_cells_of_real_networks(costs):
    cells = list(cost_data.choices("x86-avx512"))
    assert [(cell.active, cell.fastest, cell.chosen) for cell in cells] == [
        (16, Strategy.DENSE, Strategy.PACK),
        (8, Strategy.PACK, Strategy.PACK),
        (1, Strategy.CUSTOM, Strategy.PACK),
        (1, Strategy.CUSTOM, Strategy.DENSE),
    ]
    assert [cell.regret for cell in cells] == pytest.approx(
        [(1.2 * 130 / 110) ** 0.5, 1.0, 2.0, 100 / 30]
    )
    assert list(cost_data.choices("x86-avx2")) == []
    assert [cell.dtype for cell in cells] == [*["float32"] * 3, "bfloat16"]
    said = "float32: 1.414 over 2 cells; bfloat16: 3.333 over 1 cells"
    assert summary.regret("x86-avx512") == said


def test_shares_of_the_strategies(costs):
    cells = list(cost_data.choices("x86-avx512"))
    fastest = strategy_map.shares([*cells, cells[1]], lambda cell: cell.fastest)
    assert fastest == {
        ("conv nchw", "all"): {"dense": 1.0},
        ("conv nchw", "≥ ½"): {"pack": 1.0},
        ("conv nchw", "fewer"): {"custom": 1.0},
        ("conv nhwc", "fewer"): {"custom": 1.0},
    }
    both = strategy_map.shares(cells[1:3], lambda cell: cell.fastest)
    assert set(both) == {("conv nchw", "≥ ½"), ("conv nchw", "fewer")}
    mixed = [cells[2], replace(cells[2], chosen=Strategy.DENSE)]
    assert strategy_map.shares(mixed, lambda cell: cell.chosen) == {
        ("conv nchw", "fewer"): {"pack": 0.5, "dense": 0.5}
    }


def test_the_picture(costs, monkeypatch, capsys):
    assert strategy_map.main(["--out", str(costs)]) == 0
    assert (costs / strategy_map.PICTURE).stat().st_size > 1000
    monkeypatch.setattr(wgrad_times, "DATA", costs / "none")
    assert strategy_map.main(["--out", str(costs)]) == 2
    assert "no cost data" in capsys.readouterr().err
