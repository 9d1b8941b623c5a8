"""Who computes a gradient, and how: the choice of backend and of wgrad strategy."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neq_kernels import contest, heuristics, proofs, tuning
from neq_kernels.backends import aten, cpu, cuda, reference, triton
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.machine import machine
from neq_kernels.problem import Choice, ConvGeometry, Problem, Strategy
from neq_kernels.version import __version__

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "NEQ_KERNELS_BACKEND"
_BACKENDS: dict[str, ModuleType] = {
    "triton": triton,
    "cuda": cuda,
    "cpu": cpu,
    "aten": aten,
    "reference": reference,
}
# They read counts on the device, and serve by themselves where they were proved right. The one that
# is preferred where nothing was measured comes first.
FOR_GPUS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton}

_forced: Strategy | None = None
_rehearsing = False
# Grows when what was chosen no longer holds.
revision = 0

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def backends() -> list[tuple[str, str | None]]:
    """Every backend with None when it can be used, else the reason why not."""
    return [(name, module.unavailable()) for name, module in _BACKENDS.items()]


@functools.cache
def backends_for(device_type: str) -> tuple[str, ...]:
    """The backends that serve tensors of this device type, the preferred one first: one for the
    CPU, or by name; for a GPU those that were proved right on it, and ``aten``.

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
        reason = why_not(forced, device_type)
        if reason is not None:
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={forced}: {reason}")
        return (forced,)
    if device_type == "cpu":
        reason = cpu.unavailable()
        if reason is None:
            return ("cpu",)
        logger.warning("backend cpu is not used for cpu tensors: %s", reason)
        return ("aten",)
    proved = proofs.proved() or () if device_type == "cuda" else ()
    able = [name for name in FOR_GPUS if name in proved and why_not(name, device_type) is None]
    return (*able, "aten")


def why_not(backend: str, device_type: str) -> str | None:
    """None where a backend can serve tensors of this device type, else the reason why not."""
    reason: str | None = _BACKENDS[backend].unavailable()
    if reason is None and backend == "cpu" and device_type != "cpu":
        reason = f"it serves CPU tensors, got {device_type}"
    kernels = FOR_GPUS.get(backend)
    if reason is None and kernels is not None and not kernels.serves(device_type):
        reason = f"it serves GPU tensors, got {device_type}"
    return reason


def backend_for(device_type: str) -> str:
    """The first of :func:`backends_for`."""
    return backends_for(device_type)[0]


def module_of(backend: str) -> ModuleType:
    """The module of a backend."""
    return _BACKENDS[backend]


def candidates(problem: Problem, backend: str) -> tuple[Strategy, ...]:
    """The strategies among which this backend has a choice."""
    if backend == "reference":
        return (Strategy.DENSE,)
    usable: tuple[Strategy, ...] = _BACKENDS[backend].strategies(problem)
    return usable


class Place(NamedTuple):
    """Where and by whom something is computed: ``backends`` as :func:`backends_for` names them;
    ``threads`` are 0 on a GPU."""

    backends: tuple[str, ...]
    device_type: str
    threads: int

    def choice(self, strategy: Strategy, backend: str, settings: tuple[int, ...] = ()) -> Choice:
        """Of one of the backends. On a GPU, where others may serve tomorrow, it says which;
        PyTorch's own kernel is nobody's."""
        is_named = self.device_type == "cuda" and strategy != Strategy.DENSE
        return Choice(strategy, settings, backend if is_named else "")

    def module(self, choice: Choice) -> ModuleType:
        """That of the backend which serves."""
        return _BACKENDS[choice.backend or self.backends[0]]

    def strategies(self, problem: Problem) -> dict[str, tuple[Strategy, ...]]:
        """Those of each backend. How many channels each group has to pack would have to be asked of
        the GPU."""
        packs = (
            self.device_type == "cpu" or problem.geometry is None or problem.geometry.groups == 1
        )
        return {
            backend: tuple(s for s in candidates(problem, backend) if packs or s != Strategy.PACK)
            for backend in self.backends
        }


def place_of(device_type: str) -> Place:
    """Where tensors of this device type are worked on now."""
    threads = torch.get_num_threads() if device_type == "cpu" else 0
    return Place(backends_for(device_type), device_type, threads)


def contestants(problem: Problem, n: int, place: Place) -> Mapping[Choice, ModuleType]:
    """Every way of computing a weight gradient there, and by whom; PyTorch's own kernel once."""
    found: dict[Choice, ModuleType] = {}
    for backend, usable in place.strategies(problem).items():
        for strategy in usable:
            settings: tuple[tuple[int, ...], ...] = ((),)
            if strategy == Strategy.FUSED and backend == "triton":
                settings = triton.settings(problem, n)
            for each in settings:
                found.setdefault(place.choice(strategy, backend, each), _BACKENDS[backend])
    return found


@functools.lru_cache(maxsize=8192)
def choice_for(problem: Problem, n: int, place: Place) -> Choice:
    """How the weight gradient of ``n`` active channels is computed."""
    usable = place.strategies(problem)
    every = tuple(dict.fromkeys(strategy for some in usable.values() for strategy in some))

    def by_rule(strategy: Strategy) -> Choice:
        return place.choice(strategy, next(b for b, some in usable.items() if strategy in some))

    if _forced is not None:
        return by_rule(_forced if _forced in every else every[0])
    if len(every) == 1 or n == 0:
        return by_rule(every[0])
    table = table_for(place)
    winner = table.get(problem, n)
    if winner is not None and winner.strategy in every:
        possible = contestants(problem, n, place)
        if winner in (*possible, by_rule(winner.strategy)):
            return winner
    if tuning.measures_on_the_fly():
        possible = contestants(problem, n, place)
        winner = contest.fastest(problem, n, possible, place.device_type)
        table.put(problem, n, winner)
        table.save()
        return winner
    on_gpu = place.device_type == "cuda" or not FOR_GPUS.keys().isdisjoint(place.backends)
    rule = heuristics.strategy_on_gpu if on_gpu else heuristics.strategy
    return by_rule(rule(problem, n, every))


@functools.cache
def table_for(place: Place) -> tuning.TuningTable:
    """The table of winners measured in such a place."""
    about = machine()
    measured_with: dict[str, Any] = {
        "backend": " ".join(place.backends),
        "torch": about.torch,
        "neq_kernels": __version__,
    }
    if place.device_type == "cpu":
        measured_with |= {
            "cpu": about.cpu,
            "instructions": about.instructions,
            "kernels": cpu.capability() if "cpu" in place.backends else None,
            "threads": place.threads,
        }
    else:
        measured_with["accelerator"] = about.accelerator
    if "triton" in place.backends:
        measured_with["triton"] = triton.version()
    return tuning.TuningTable(tuning.directory(), measured_with)


def forget_choices() -> None:
    """Strategies are chosen anew from now on."""
    global revision
    revision += 1
    choice_for.cache_clear()


# What a captured graph may use: the kernels are loaded.
_rehearsed: dict[tuple[Problem, Place, bool], Choice] = {}


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
    return choice_for(problem, problem.neurons, place_of("cpu")).strategy != Strategy.DENSE


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    n: int,
    start: int,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """Gradients of input, weight and bias, None where ``output_mask`` is False.

    Args:
        order: int64[K], the active features first.
        count: int32[1] on the same device, how many are active.
        n: the same number; not looked at while a CUDA graph is captured.
        start: the first of them when they are neighbours, else -1.
        active_dgrad: only active features propagate to the input gradient.
        The others are those of ``torch.ops.neq_kernels.linear_backward``.

    Raises:
        RuntimeError: ``active_dgrad`` while a CUDA graph is captured.
    """
    k = weight.shape[0]
    place = place_of(weight.device.type)
    if place.backends == ("reference",):
        return reference.linear_backward(
            grad_output, input, input_size, weight, order, n, output_mask, active_dgrad
        )
    choice, replayed = Choice(Strategy.DENSE), captured(weight)
    if replayed or (0 < n < k and (output_mask[1] or output_mask[2])):
        problem = Problem.linear(grad_output.numel() // max(1, k), weight)
        if replayed:
            choice = _replayed_choice(problem, place, output_mask, active_dgrad)
            n, start = k, -1
        else:
            choice = choice_for(problem, n, place)
    module = place.module(choice)
    more: dict[str, Any] = {"count": count} if module in FOR_GPUS.values() else {}
    if choice.settings:
        more["settings"] = choice.settings
    wanted = output_mask
    grad_input = None
    if active_dgrad and output_mask[0] and n < k:
        grad_input = aten.linear_active_dgrad(grad_output, weight, input_size, order, n, module)
        wanted = (False, *output_mask[1:])
    grads: Grads = module.linear_backward(
        grad_output, input, input_size, weight, order, n, start, wanted, choice.strategy, **more
    )
    if replayed and choice.strategy == Strategy.DENSE:
        _clear_frozen(grads, NeuronLayout(), order, count)
    return grads if grad_input is None else (grad_input, *grads[1:])


def conv_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    geometry: ConvGeometry,
    order: Tensor,
    count: Tensor,
    n: int,
    output_mask: Sequence[bool],
    active_dgrad: bool,
) -> Grads:
    """Gradients of input, weight and bias, None where ``output_mask`` is False.

    Args:
        order: int64[K], the active channels first.
        count: int32[1] on the same device, how many are active.
        n: the same number; not looked at while a CUDA graph is captured.
        active_dgrad: only active channels propagate to the input gradient.
        The others are those of ``torch.ops.neq_kernels.conv_backward``.

    Raises:
        RuntimeError: ``active_dgrad`` while a CUDA graph is captured.
    """
    k = grad_output.shape[1]
    place = place_of(weight.device.type)
    if place.backends == ("reference",):
        return reference.conv_backward(
            grad_output, input, input_size, weight, geometry, order, n, output_mask, active_dgrad
        )
    # Where only the input's shape matters (dgrad alone), nothing is allocated for it.
    x = grad_output.new_empty(1).expand(input_size) if input is None else input
    choice, replayed = Choice(Strategy.DENSE), captured(weight)
    if replayed or (n > 0 and output_mask[1]):
        problem = Problem.conv(x, weight, geometry)
        if replayed:
            choice = _replayed_choice(problem, place, output_mask, active_dgrad)
            n = k
        else:
            choice = choice_for(problem, n, place)
    module = place.module(choice)
    more: dict[str, Any] = {"count": count} if module in FOR_GPUS.values() else {}
    if choice.settings:
        more["settings"] = choice.settings
    wanted = output_mask
    grad_input = None
    if active_dgrad and output_mask[0] and n < k:
        grad_input = aten.conv_active_dgrad(grad_output, x, weight, geometry, order, n)
        wanted = (False, *output_mask[1:])
    grads: Grads = module.conv_backward(
        grad_output, x, weight, geometry, order, n, wanted, choice.strategy, **more
    )
    if replayed and choice.strategy == Strategy.DENSE:
        _clear_frozen(grads, geometry.layout, order, count)
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
        strategy = choice_for(problem, n, place_of("cpu")).strategy
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
        strategy = choice_for(problem, n, place_of("cpu")).strategy
    return cpu.conv_call(input.shape, weight, geometry, channels.order(), n, strategy)


def channel_similarity(a: Tensor, b: Tensor, dim: int) -> Tensor:
    result: Tensor = _BACKENDS[backend_for(a.device.type)].channel_similarity(a, b, dim)
    return result


@contextmanager
def capturable() -> Iterator[None]:
    """Within it gradients are computed as in a CUDA graph: wrap the warm-up in it, or both.

    A captured graph reads the number of active channels on the device, with kernels that eager
    steps may not have used; loading a kernel is forbidden while a graph is captured. What was not
    warmed up here is captured densely: correct with every mask, and no faster for any.

    >>> with neq.capturable():
    ...     step = torch.cuda.make_graphed_callables(model, (example,))
    """
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


def captured(tensor: Tensor) -> bool:
    """Whether what runs now is captured into a CUDA graph, or rehearsed. When that is replayed
    other channels may be active: their number is then read on the device, or everything is
    computed."""
    if _rehearsing:
        return True
    if not tensor.is_cuda or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def _replayed_choice(
    problem: Problem, place: Place, output_mask: Sequence[bool], active_dgrad: bool
) -> Choice:
    if active_dgrad and output_mask[0]:
        raise RuntimeError(
            'grad_input: expected "exact" while a CUDA graph is captured, got "active", which '
            "would go on propagating from the channels that are active now"
        )
    with_own = [b for b in place.backends if Strategy.FUSED in candidates(problem, b)]
    if not output_mask[1] or not with_own:
        return Choice(Strategy.DENSE)
    key = problem, place, bool(output_mask[2])
    if _rehearsing:
        choice = choice_for(problem, problem.neurons, place)
        if choice.strategy != Strategy.FUSED:
            choice = place.choice(Strategy.FUSED, with_own[0])
        _rehearsed[key] = choice
    elif key not in _rehearsed:
        logger.warning(
            "a CUDA graph is captured densely for %s: its kernels were not loaded; warm up within "
            "neq_kernels.capturable()",
            tuning.key(problem, problem.neurons),
        )
        return Choice(Strategy.DENSE)
    return _rehearsed[key]


def _clear_frozen(grads: Grads, layout: NeuronLayout, order: Tensor, count: Tensor) -> None:
    """Zeros for the neurons ``order[count:]``, in place, with the count read on the device."""
    places = torch.arange(len(order), device=order.device)
    frozen = torch.empty_like(order).scatter_(0, order, places) >= count
    for grad, where in ((grads[1], layout), (grads[2], NeuronLayout())):
        if grad is not None:
            rows = where.rows(grad)
            leading = rows.shape[: 2 if where.groups > 1 else 1]
            rows.masked_fill_(frozen.view(*leading, *[1] * (rows.dim() - len(leading))), 0)
