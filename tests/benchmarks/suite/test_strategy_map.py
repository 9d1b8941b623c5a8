"""What each strategy is chosen for, from the committed cost data."""

from __future__ import annotations

import pytest

from benchmarks.suite import cost_data, strategy_map, summary
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.cost_model import CostModel

LINES = """network,layer,layout,active,dense,pack,custom
resnet32,layer1.0.conv1,nchw,16,100,120,200
resnet32,layer1.0.conv1,nchw,8,100,60,80
resnet32,layer1.0.conv1,nchw,1,100,60,30
resnet32,layer1.0.conv1,nhwc,1,100,,30
tiny,"linear 16",rows,1,1,1,1
gone,conv,nchw,1,1,1,1
"""


@pytest.fixture
def costs(tmp_path, monkeypatch):
    """Tables that choose to pack what can be packed."""
    monkeypatch.setattr(cost_data, "COSTS", tmp_path)
    (tmp_path / "x86-avx512.csv").write_text(LINES)

    def pack(self, problem, n, usable):
        return Strategy.PACK if Strategy.PACK in usable else Strategy.DENSE

    monkeypatch.setattr(CostModel, "strategy", pack)
    return tmp_path


def test_cells_of_real_networks(costs):
    cells = list(cost_data.cells("x86-avx512"))
    assert [(cell.active, cell.fastest, cell.chosen) for cell in cells] == [
        (16, Strategy.DENSE, Strategy.PACK),
        (8, Strategy.PACK, Strategy.PACK),
        (1, Strategy.CUSTOM, Strategy.PACK),
        (1, Strategy.CUSTOM, Strategy.DENSE),
    ]
    assert [cell.regret for cell in cells] == pytest.approx([1.2, 1.0, 2.0, 100 / 30])
    assert list(cost_data.cells("x86-avx2")) == []
    mean = (1.0 * 2.0 * 100 / 30) ** (1 / 3)
    assert summary.regret("x86-avx512") == f"{mean:.3f} over 3 cells"


def test_shares_of_the_strategies(costs):
    cells = list(cost_data.cells("x86-avx512"))
    fastest = strategy_map.shares([*cells, cells[1]], lambda cell: cell.fastest)
    assert fastest == {
        ("conv nchw", "all"): {"dense": 1.0},
        ("conv nchw", "≥ ½"): {"pack": 1.0},
        ("conv nchw", "fewer"): {"custom": 1.0},
        ("conv nhwc", "fewer"): {"custom": 1.0},
    }
    both = strategy_map.shares(cells[1:3], lambda cell: cell.fastest)
    assert set(both) == {("conv nchw", "≥ ½"), ("conv nchw", "fewer")}
    mixed = [cells[2], cost_data.Cell(cells[2].problem, 1, {}, Strategy.DENSE)]
    assert strategy_map.shares(mixed, lambda cell: cell.chosen) == {
        ("conv nchw", "fewer"): {"pack": 0.5, "dense": 0.5}
    }


def test_the_picture(costs, monkeypatch, capsys):
    assert strategy_map.main(["--out", str(costs)]) == 0
    assert (costs / strategy_map.PICTURE).stat().st_size > 1000
    monkeypatch.setattr(cost_data, "COSTS", costs / "none")
    assert strategy_map.main(["--out", str(costs)]) == 2
    assert "no cost data" in capsys.readouterr().err
