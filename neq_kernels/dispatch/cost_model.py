"""The cost model: the strategy with the lowest predicted time, from the shape alone.

For CPU tensors a linear model of the time of each strategy decides. Its coefficients (seconds per
million elements read or written, and per billion products) are in ``costs/``, one table for each
class of machine that was measured; they were fitted by
``python -m benchmarks.kernels.fit_cost_model`` to the measurements in ``benchmarks/results/costs``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from neq_kernels.backends.problem import Problem, Strategy

COSTS = Path(__file__).parent / "costs"

# By dtype, then by group: the coefficients of its features.
Coefficients = Mapping[str, Mapping[str, Mapping[str, float]]]
Times = dict[Strategy, float]

# Without a model: above this share of active channels gathering costs more than it saves.
_DENSE_SHARE = 0.85
# Floating-point operations in the time that a GPU takes to move a byte (an H100 in half precision,
# at the rates that products and copies reach). An expectation: nothing was measured.
_FLOPS_PER_BYTE = 180
# Rows of the smallest product of matrices that a tensor core makes.
_ROWS_OF_A_TILE = 16
# How much faster than PyTorch's kernel another strategy has to promise to be; with every channel
# active it replaces a call that the user knows, and of layers with few inputs, the first ones of
# networks, few shapes were measured.
_PROMISE, _PROMISE_ALL, _PROMISE_FEW = 0.9, 0.8, 0.6
_FEW = "few inputs"
# Times that lie as close together are worth a measurement.
_DOUBT = 1.15

# oneDNN computes channels in blocks of this many.
_BLOCK = 8
# Whose coefficients hold for a dtype; double precision takes twice as long whatever the strategy.
_TABLE_OF = {torch.float64: "float32"}


@dataclass(frozen=True)
class CostModel:
    """Predicted times of the strategies for CPU tensors.

    Attributes:
        name: of the table of costs, a class of machine; None without a table.
        coefficients: of that table.
        scales: by group, how much longer this machine takes than the one of the table.
    """

    name: str | None = None
    coefficients: Coefficients = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_class(cls, name: str) -> CostModel:
        """The table of a class of machine; the empty model where there is none."""
        path = COSTS / f"{name}.json"
        if not path.exists():
            return cls()
        return cls(name, json.loads(path.read_text())["costs"])

    def scaled(self, scales: Mapping[str, float]) -> CostModel:
        """The model of a machine that differs from the table's by these factors."""
        return replace(self, scales=dict(scales))

    def seconds(self, problem: Problem, n: int, strategy: Strategy) -> float | None:
        """What the model expects, or None where it knows nothing of such a problem."""
        name = group(problem, strategy)
        costs = self._costs_of(problem.dtype).get(name)
        if costs is None:
            return None
        return linear(costs, features(problem, n)) * self.scales.get(name, 1.0)

    def strategy(self, problem: Problem, n: int, usable: Collection[Strategy]) -> Strategy:
        """The ``usable`` strategy with the lowest predicted time for ``n`` active channels. Where
        nothing is known of custom kernels, one of PyTorch's."""
        expected = self._compared(problem, n, usable)
        if not expected:
            return without_costs(problem, n, usable)
        return min(expected, key=lambda s: expected[s])

    def in_doubt(self, problem: Problem, n: int, usable: Collection[Strategy]) -> list[Strategy]:
        """The strategies that only a measurement tells apart, the predicted one first; empty where
        the model is sure."""
        predicted = self.strategy(problem, n, usable)
        expected = self._compared(problem, n, usable)
        others = [s for s in usable if s != predicted]
        if expected:
            least = expected[predicted]
            whole = n == problem.neurons
            others = [
                s
                for s in others
                if s in expected
                and (expected[s] <= _DOUBT * least or (whole and s == Strategy.DENSE))
            ]
        elif n == problem.neurons:
            others = [s for s in others if s != Strategy.PACK]
        return [predicted, *others] if others else []

    def still_leads(
        self,
        problem: Problem,
        winner: Strategy,
        measured: int,
        n: int,
        usable: Collection[Strategy],
    ) -> bool:
        """Whether the winner of a measurement with ``measured`` active channels leads with ``n``
        too: by these costs, no lead of its shrinks by more than what leaves a doubt."""
        then, now = (self._compared(problem, count, usable) for count in (measured, n))
        return winner in now and all(
            now[rival] / now[winner] * _DOUBT >= then[rival] / then[winner] for rival in now
        )

    def _compared(self, problem: Problem, n: int, usable: Collection[Strategy]) -> Times:
        """Times as they are compared; none where a strategy cannot be compared."""
        expected: Times = {}
        for each in usable:
            time = self.seconds(problem, n, each)
            if time is None:
                return {}
            expected[each] = time
        return handicapped(problem, n, expected)

    def _costs_of(self, dtype: torch.dtype) -> Mapping[str, Mapping[str, float]]:
        name = _TABLE_OF.get(dtype, str(dtype).removeprefix("torch."))
        return self.coefficients.get(name, {})


def linear(costs: Mapping[str, float], values: Mapping[str, float]) -> float:
    """Seconds, by a group's coefficients and a problem's features."""
    return sum(cost * values[name] for name, cost in costs.items())


def handicapped(problem: Problem, n: int, times: Times) -> Times:
    """Times as strategies compete: in PyTorch's favour, and without packing all channels."""
    whole = n == problem.neurons
    compared = {s: time for s, time in times.items() if not (whole and s == Strategy.PACK)}
    if Strategy.DENSE in compared:
        promise = _PROMISE_ALL if whole else _PROMISE
        compared[Strategy.DENSE] *= _PROMISE_FEW if kind(problem).startswith(_FEW) else promise
    return compared


def tables() -> list[CostModel]:
    """Every class of machine that was measured."""
    return [CostModel.of_class(path.stem) for path in sorted(COSTS.glob("*.json"))]


def strategy_on_gpu(problem: Problem, n: int, usable: Collection[Strategy]) -> Strategy:
    """The same for a GPU, where nothing was measured yet: custom kernels for what fills one tile of
    rows, and for groups, which PyTorch would have to be given padded; its kernels for the rest,
    packed where the products spared take longer than writing and reading the packed channels."""
    is_grouped = problem.geometry is not None and problem.geometry.groups > 1
    if Strategy.CUSTOM in usable and (is_grouped or n <= _ROWS_OF_A_TILE):
        return Strategy.CUSTOM
    weights = math.prod(problem.weight_size) / max(1, problem.neurons)
    if (problem.neurons - n) * weights < 2 * n * _FLOPS_PER_BYTE:
        return Strategy.DENSE
    return without_costs(problem, n, usable)


def without_costs(problem: Problem, n: int, usable: Collection[Strategy]) -> Strategy:
    """PyTorch's kernel on the active channels where they are few, else on all."""
    few = n <= _DENSE_SHARE * problem.neurons
    return Strategy.PACK if few and Strategy.PACK in usable else Strategy.DENSE


def group(problem: Problem, strategy: Strategy) -> str:
    """Problems that share coefficients."""
    return f"{strategy.name.lower()} {kind(problem)}"


def kind(problem: Problem) -> str:
    """Of layer, and its layout."""
    layout = "nhwc" if problem.channels_last else "nchw"
    if problem.geometry is None:
        name, layout = "linear", "rows"
    elif problem.is_depthwise:
        name = "depthwise"
    elif not problem.is_plain_conv2d:
        name = "other"  # was not measured
    elif math.prod(problem.weight_size[2:]) == 1:
        name = "pointwise"
    else:
        name = _FEW if problem.input_size[1] < _BLOCK else "conv"
    return f"{name} {layout}"


def features(problem: Problem, n: int) -> dict[str, float]:
    """What the time is linear in."""
    t, c, k = problem.output_positions, problem.row_size, problem.neurons
    blocks = min(k, -(-n // _BLOCK) * _BLOCK)
    return {
        "calls": 1.0,
        "input": math.prod(problem.input_size) / 1e6,
        "active output": t * n / 1e6,
        "output": t * k / 1e6,
        "active weight": n * c / 1e6,
        "weight": k * c / 1e6,
        "products": t * c * n / 1e9,
        "blocked products": t * c * blocks / 1e9,
        "all products": t * c * k / 1e9,
    }
