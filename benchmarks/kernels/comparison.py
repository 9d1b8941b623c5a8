"""Comparing gradients of several providers: errors, their unit, and rows of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks.common.records import Row
from benchmarks.kernels import peers
from neq_kernels.backends.problem import Problem
from neq_kernels.channels import ActiveChannels
from neq_kernels.measure.timing import Quantiles

DENSE, PEER, OURS, TUNED = "dense", "index_select", "neq", "neq tuned"


# BLAS itself is inexact with few rows, and a peer that uses it so is no less a peer.
MOST_ERROR, MOST_ERROR_OF_PEERS = 4.0, 100.0


def peer_call(
    provider: peers.Provider,
    problem: Problem,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    active: Tensor,
) -> Callable[[], Tensor]:
    """The weight gradient by a peer."""
    return lambda: provider.wgrad(problem.geometry, grad_output, input, weight, active, False)[0]


def exact_gradient(problem: Problem, grad_output: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """Of every row, in float64."""
    tensors = (t.double() for t in (grad_output, input, weight))
    everything = torch.arange(problem.neurons)
    return peers.dense(problem.geometry, *tensors, everything, False)[0]


def errors_over_dense(
    calls: Mapping[str, Callable[[], Tensor]], exact: Tensor, channels: ActiveChannels
) -> dict[str, float]:
    """Largest error of each provider, in multiples of the dense one's (and at least a rounding)."""
    dense = calls[DENSE]()
    unit = unit_of_error(dense, exact, torch.finfo(dense.dtype).eps)
    return {
        name: largest_error(name, call(), exact, channels) / unit for name, call in calls.items()
    }


def unit_of_error(
    dense: Tensor, exact: Tensor, rounding: float = torch.finfo(torch.float32).eps
) -> float:
    """The dense gradient's largest error, but at least a rounding of its largest value."""
    return max(float((dense.double() - exact).abs().max()), float(exact.abs().max()) * rounding)


def largest_error(name: str, gradient: Tensor, exact: Tensor, channels: ActiveChannels) -> float:
    """Of what the provider of this name computed."""
    rows = peers.PROVIDERS[name].rows if name in peers.PROVIDERS else "masked"
    if rows == "active":
        exact = exact[channels.active]
    elif rows == "masked":
        exact = exact.clone()
        exact[channels.frozen] = 0
    return float((gradient.double() - exact).abs().max())


def description(problem: Problem) -> Row:
    """What kind of layer it is, and how large."""
    kind = "depthwise" if problem.is_depthwise else "conv"
    return {
        "kind": "linear" if problem.geometry is None else kind,
        "input": "x".join(map(str, problem.input_size)),
        "weight": "x".join(map(str, problem.weight_size)),
    }


def quantiles(name: str, samples: Mapping[str, Sequence[float]]) -> Row:
    """Of a provider's seconds, and of how many times faster it is than dense and the peer."""
    figures = {"seconds": samples[name]}
    for other in (DENSE, PEER):
        if other in samples and name != other:
            pairs = zip(samples[other], samples[name], strict=True)
            figures[f"over_{other}"] = [a / b for a, b in pairs]
    return {
        f"{figure}_{level}": value
        for figure, values in figures.items()
        for level, value in asdict(Quantiles.of(values)).items()
    }
