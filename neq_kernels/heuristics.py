"""The strategy to expect most of, from the shape alone."""

from __future__ import annotations

from collections.abc import Collection

from neq_kernels.problem import Problem, Strategy

# Above this share of active channels gathering costs more than the rows it saves.
_DENSE_SHARE = 0.85


def strategy(problem: Problem, n: int, usable: Collection[Strategy]) -> Strategy:
    """The one of the ``usable`` strategies that is expected to be fastest for ``n`` channels."""
    if problem.is_depthwise and Strategy.FUSED in usable:
        return Strategy.FUSED
    if n > _DENSE_SHARE * problem.neurons or Strategy.PACK not in usable:
        return Strategy.DENSE
    if Strategy.FUSED in usable and n <= 8:
        return Strategy.FUSED
    return Strategy.PACK
