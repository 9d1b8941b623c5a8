"""The cost model: the strategy with the lowest predicted time, from the shape alone.

For CPU tensors a linear model of the time of each strategy decides. Its coefficients (seconds per
million elements read or written, and per billion products) are in ``costs/``; they were fitted
by ``python -m benchmarks.kernels.fit_cost_model`` to the measurements in
``benchmarks/results/fit.csv``.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from neq_kernels.backends.problem import Problem, Strategy

COSTS = Path(__file__).parent / "costs" / "x86-avx2.json"

# Without a model: above this share of active channels gathering costs more than it saves.
_DENSE_SHARE = 0.85
# Floating-point operations in the time that a GPU takes to move a byte (an H100 in half precision,
# at the rates that products and copies reach). An expectation: nothing was measured.
_FLOPS_PER_BYTE = 180
# Rows of the smallest product of matrices that a tensor core makes.
_ROWS_OF_A_TILE = 16
# How much faster than PyTorch's kernel another strategy has to promise to be; with every channel
# active it replaces a call that the user knows.
_PROMISE, _PROMISE_ALL = 0.97, 0.8
# What the copies that packing makes cost the operations after it, which find less in the cache.
_COPIES = 1.05

# oneDNN computes channels in blocks of this many.
_BLOCK = 8


def strategy(problem: Problem, n: int, usable: Collection[Strategy]) -> Strategy:
    """Return the ``usable`` strategy with the lowest predicted time for ``n`` active channels."""
    if Strategy.CUSTOM not in usable:
        return _without_costs(problem, n, usable)
    k = problem.neurons
    expected: dict[Strategy, float] = {}
    for each in usable:
        time = seconds(problem, n, each)
        if time is not None and (each != Strategy.PACK or n < k):
            expected[each] = time * (_COPIES if each == Strategy.PACK else 1.0)
    if Strategy.DENSE in expected:
        expected[Strategy.DENSE] *= _PROMISE_ALL if n == k else _PROMISE
    return min(expected, key=lambda s: expected[s], default=Strategy.DENSE)


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
    return _without_costs(problem, n, usable)


def _without_costs(problem: Problem, n: int, usable: Collection[Strategy]) -> Strategy:
    few = n <= _DENSE_SHARE * problem.neurons
    return Strategy.PACK if few and Strategy.PACK in usable else Strategy.DENSE


def seconds(problem: Problem, n: int, strategy: Strategy) -> float | None:
    """What the model expects, or None where it knows nothing of such a problem."""
    costs = _costs().get(group(problem, strategy))
    if costs is None:
        return None
    return sum(costs[name] * value for name, value in features(problem, n).items())


def group(problem: Problem, strategy: Strategy) -> str:
    """Problems that share coefficients."""
    layout = "nhwc" if problem.channels_last else "nchw"
    if problem.geometry is None:
        kind, layout = "linear", "rows"
    elif problem.is_depthwise:
        kind = "depthwise"
    elif math.prod(problem.weight_size[2:]) == 1:
        kind = "pointwise"
    else:
        kind = "few inputs" if problem.input_size[1] < _BLOCK else "conv"
    return f"{strategy.name.lower()} {kind} {layout}"


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


def _costs() -> Mapping[str, Mapping[str, float]]:
    return _read(COSTS, COSTS.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read(path: Path, modified: int) -> Mapping[str, Mapping[str, float]]:
    """``modified``: when the file was written; one that was fitted again is read again."""
    costs: Mapping[str, Mapping[str, float]] = json.loads(path.read_text())["costs"]
    return costs
