"""The tables of costs that are shipped, on the measurements that are committed."""

from __future__ import annotations

import pytest

from benchmarks.kernels import fit_cost_model, regret, wgrad_times
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.cost_model import CostModel


@pytest.mark.parametrize("name", fit_cost_model.classes())
def test_the_shipped_costs_choose_what_was_measured_to_be_good(name):
    model = CostModel.of_class(name)
    assert model.name == name
    every = wgrad_times.typical(wgrad_times.read(fit_cost_model.path_of(name)))
    for dtype in {cell.dtype for cell in every}:
        cells = {cell: times for cell, times in every.items() if cell.dtype == dtype}
        judged = regret.judge(cells, regret.by_model(model))
        assert judged.cells > 1000
        assert judged.meets(regret.IN_SAMPLE)
        # PyTorch's kernel alone would be far worse: the costs do choose.
        dense = regret.judge(cells, lambda cell, problem, usable: Strategy.DENSE)
        assert dense.regret > 1.5 * judged.regret


@pytest.mark.parametrize("name", fit_cost_model.classes())
def test_no_table_has_more_coefficients_than_it_may(name):
    for table in CostModel.of_class(name).coefficients.values():
        for strategy in Strategy:
            own = [
                costs
                for group, costs in table.items()
                if group.startswith(f"{strategy.name.lower()} ")
            ]
            assert own
            assert sum(map(len, own)) <= fit_cost_model.MOST
            assert all(value > 0 for costs in own for value in costs.values())
