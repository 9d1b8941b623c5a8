"""Who computes a gradient, and how: the choice of backend and of wgrad strategy."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from neq_kernels import contest, heuristics, tuning
from neq_kernels.backends import aten, cpu, reference
from neq_kernels.channels import ActiveChannels
from neq_kernels.machine import machine
from neq_kernels.problem import ConvGeometry, Problem, Strategy
from neq_kernels.version import __version__

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "NEQ_KERNELS_BACKEND"
_BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "aten": aten, "reference": reference}
_AUTOMATIC = {"cpu": ("cpu", "aten")}

_forced: Strategy | None = None
# Grows when what was chosen no longer holds.
revision = 0

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def backends() -> list[tuple[str, str | None]]:
    """Every backend with None when it can be used, else the reason why not."""
    return [(name, module.unavailable()) for name, module in _BACKENDS.items()]


@functools.cache
def backend_for(device_type: str) -> str:
    """The backend that serves tensors of this device type.

    Raises:
        ValueError: ``NEQ_KERNELS_BACKEND`` names no backend.
        RuntimeError: it names one that cannot be used here.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        if forced not in _BACKENDS:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: expected one of {sorted(_BACKENDS)}, got {forced!r}"
            )
        reason = _BACKENDS[forced].unavailable()
        if reason is None and forced == "cpu" and device_type != "cpu":
            reason = f"it serves CPU tensors, got {device_type}"
        if reason is not None:
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={forced}: {reason}")
        return forced
    for name in _AUTOMATIC.get(device_type, ("aten",)):
        reason = _BACKENDS[name].unavailable()
        if reason is None:
            return name
        logger.warning("backend %s is not used for %s tensors: %s", name, device_type, reason)
    raise AssertionError("aten is always available")


def module_of(backend: str) -> ModuleType:
    """The module of a backend."""
    return _BACKENDS[backend]


def candidates(problem: Problem, backend: str) -> tuple[Strategy, ...]:
    """The strategies among which this backend has a choice."""
    if backend == "reference":
        return (Strategy.DENSE,)
    usable: tuple[Strategy, ...] = _BACKENDS[backend].strategies(problem)
    return usable


@functools.lru_cache(maxsize=8192)
def strategy_for(problem: Problem, n: int, backend: str, threads: int) -> Strategy:
    """How the weight gradient of ``n`` active channels is computed."""
    usable = candidates(problem, backend)
    if _forced is not None:
        return _forced if _forced in usable else usable[0]
    if len(usable) == 1 or n == 0:
        return usable[0]
    table = table_for(threads)
    winner = table.get(problem, n)
    if winner in usable:
        assert winner is not None
        return winner
    if tuning.measures_on_the_fly():
        winner = contest.fastest(problem, n, _BACKENDS[backend], usable)
        table.put(problem, n, winner)
        table.save()
        return winner
    return heuristics.strategy(problem, n, usable)


@functools.cache
def table_for(threads: int) -> tuning.TuningTable:
    """The table of winners measured on this machine with so many threads."""
    about = machine()
    return tuning.TuningTable(
        tuning.directory(),
        {
            "cpu": about.cpu,
            "accelerator": about.accelerator,
            "instructions": about.instructions,
            "kernels": cpu.capability() if cpu.unavailable() is None else None,
            "threads": threads,
            "torch": about.torch,
            "neq_kernels": __version__,
        },
    )


def forget_choices() -> None:
    """Strategies are chosen anew from now on."""
    global revision
    revision += 1
    strategy_for.cache_clear()


@contextmanager
def forced_strategy(strategy: Strategy) -> Iterator[None]:
    """Within it ``strategy`` is used wherever it can serve, else ``DENSE``: for tests and
    measurements."""
    global _forced
    before, _forced = _forced, strategy
    forget_choices()
    try:
        yield
    finally:
        _forced = before
        forget_choices()


def replaces_library(input: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a convolution with every channel active is faster by other means than by
    ``aten.convolution_backward``."""
    if weight.device.type != "cpu" or backend_for("cpu") != "cpu":
        return False
    problem = Problem.conv(input, weight, geometry)
    strategy = strategy_for(problem, problem.neurons, "cpu", torch.get_num_threads())
    return strategy != Strategy.DENSE


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    n: int,
    start: int,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """Gradients of input, weight and bias, None where ``output_mask`` is False.

    Args:
        order: int64[K], the active features first.
        n: how many are active.
        start: the first of them when they are neighbours, else -1.
        active_dgrad: only active features propagate to the input gradient.
        The others are those of ``torch.ops.neq_kernels.linear_backward``.
    """
    k = weight.shape[0]
    backend = backend_for(weight.device.type)
    if backend == "reference":
        return reference.linear_backward(
            grad_output, input, input_size, weight, order, n, output_mask, active_dgrad
        )
    strategy = Strategy.DENSE
    if 0 < n < k and (output_mask[1] or output_mask[2]):
        _refuse_capture(weight, "linear_backward")
        rows = grad_output.numel() // k
        problem = Problem.linear(rows, weight)
        strategy = strategy_for(problem, n, backend, torch.get_num_threads())
    module = _BACKENDS[backend]
    wanted = output_mask
    grad_input = None
    if active_dgrad and output_mask[0] and n < k:
        grad_input = aten.linear_active_dgrad(grad_output, weight, input_size, order, n, module)
        wanted = (False, *output_mask[1:])
    grads: Grads = module.linear_backward(
        grad_output, input, input_size, weight, order, n, start, wanted, strategy
    )
    return grads if grad_input is None else (grad_input, *grads[1:])


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    n: int,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """Gradients of input, weight and bias, None where ``output_mask`` is False.

    Args:
        order: int64[K], the active channels first.
        n: how many are active.
        active_dgrad: only active channels propagate to the input gradient.
        The others are those of ``torch.ops.neq_kernels.conv_backward``.
    """
    k = grad_output.shape[1]
    backend = backend_for(weight.device.type)
    if backend == "reference":
        return reference.conv_backward(
            grad_output, input, input_size, weight, geometry, order, n, output_mask, active_dgrad
        )
    # Where only the input's shape matters (dgrad alone), nothing is allocated for it.
    x = grad_output.new_empty(1).expand(input_size) if input is None else input
    strategy = Strategy.DENSE
    # The ragged selection of a group's channels is made on the host.
    if n > 0 and output_mask[1] and (geometry.groups == 1 or weight.is_cpu):
        if n < k:
            _refuse_capture(weight, "conv_backward")
        problem = Problem.conv(x, weight, geometry)
        strategy = strategy_for(problem, n, backend, torch.get_num_threads())
    module = _BACKENDS[backend]
    wanted = output_mask
    grad_input = None
    if active_dgrad and output_mask[0] and n < k:
        grad_input = aten.conv_active_dgrad(grad_output, x, weight, geometry, order, n)
        wanted = (False, *output_mask[1:])
    grads: Grads = module.conv_backward(
        grad_output, x, weight, geometry, order, n, wanted, strategy
    )
    return grads if grad_input is None else (grad_input, *grads[1:])


def linear_call(input: Tensor, weight: Tensor, channels: ActiveChannels) -> cpu.Call | None:
    """Computes the gradients of a linear layer on the CPU in one call, while ``channels`` does not
    change; None where the extension cannot."""
    backend, n = backend_for("cpu"), channels.n_active
    if backend != "cpu":
        return None
    strategy = Strategy.DENSE
    if n > 0:
        problem = Problem.linear(input.numel() // max(1, weight.shape[1]), weight)
        strategy = strategy_for(problem, n, backend, torch.get_num_threads())
    return cpu.linear_call(weight, channels.order(), n, channels.start, strategy)


def conv_call(
    input: Tensor, weight: Tensor, geometry: ConvGeometry, channels: ActiveChannels
) -> cpu.Call | None:
    """As :func:`linear_call`, for a convolution."""
    backend, n = backend_for("cpu"), channels.n_active
    if backend != "cpu":
        return None
    strategy = Strategy.DENSE
    if n > 0:
        problem = Problem.conv(input, weight, geometry)
        strategy = strategy_for(problem, n, backend, torch.get_num_threads())
    return cpu.conv_call(input.shape, weight, geometry, channels.order(), n, strategy)


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    result: Tensor = _BACKENDS[backend_for(a.device.type)].channel_similarity(a, b, dim)
    return result


def _refuse_capture(weight: Tensor, op: str) -> None:
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: this backend cannot be captured in a CUDA graph while channels are frozen: "
            "the number of active channels would be baked into the graph"
        )
