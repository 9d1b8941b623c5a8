"""Who computes a gradient, and how: the choice of backend and of wgrad strategy."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neq_kernels.backends import aten, cpu, cuda, reference
from neq_kernels.backends.problem import KernelChoice, Problem, Strategy
from neq_kernels.backends.triton import backend as triton
from neq_kernels.dispatch import autotune, cost_model, tuning_table, verified_backends
from neq_kernels.machine import machine
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
    proved = verified_backends.proved() or () if device_type == "cuda" else ()
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


class ExecutionContext(NamedTuple):
    """Where and by whom something is computed: ``backends`` as :func:`backends_for` names them;
    ``threads`` are 0 on a GPU."""

    backends: tuple[str, ...]
    device_type: str
    threads: int

    def choice(
        self, strategy: Strategy, backend: str, settings: tuple[int, ...] = ()
    ) -> KernelChoice:
        """Of one of the backends. On a GPU, where others may serve tomorrow, it says which;
        PyTorch's own kernel is nobody's."""
        is_named = self.device_type == "cuda" and strategy != Strategy.DENSE
        return KernelChoice(strategy, settings, backend if is_named else "")

    def module(self, choice: KernelChoice) -> ModuleType:
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


def place_of(device_type: str) -> ExecutionContext:
    """Where tensors of this device type are worked on now."""
    threads = torch.get_num_threads() if device_type == "cpu" else 0
    return ExecutionContext(backends_for(device_type), device_type, threads)


def contestants(
    problem: Problem, n: int, place: ExecutionContext
) -> Mapping[KernelChoice, ModuleType]:
    """Every way of computing a weight gradient there, and by whom; PyTorch's own kernel once."""
    found: dict[KernelChoice, ModuleType] = {}
    for backend, usable in place.strategies(problem).items():
        for strategy in usable:
            settings: tuple[tuple[int, ...], ...] = ((),)
            if strategy == Strategy.CUSTOM and backend == "triton":
                settings = triton.settings(problem, n)
            for each in settings:
                found.setdefault(place.choice(strategy, backend, each), _BACKENDS[backend])
    return found


@functools.lru_cache(maxsize=8192)
def choice_for(problem: Problem, n: int, place: ExecutionContext) -> KernelChoice:
    """How the weight gradient of ``n`` active channels is computed."""
    usable = place.strategies(problem)
    every = tuple(dict.fromkeys(strategy for some in usable.values() for strategy in some))

    def by_rule(strategy: Strategy) -> KernelChoice:
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
    if tuning_table.measures_on_the_fly():
        possible = contestants(problem, n, place)
        winner = autotune.fastest(problem, n, possible, place.device_type)
        table.put(problem, n, winner)
        table.save()
        return winner
    on_gpu = place.device_type == "cuda" or not FOR_GPUS.keys().isdisjoint(place.backends)
    rule = cost_model.strategy_on_gpu if on_gpu else cost_model.strategy
    return by_rule(rule(problem, n, every))


@functools.cache
def table_for(place: ExecutionContext) -> tuning_table.TuningTable:
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
    return tuning_table.TuningTable(tuning_table.directory(), measured_with)


def forget_choices() -> None:
    """Strategies are chosen anew from now on."""
    global revision
    revision += 1
    choice_for.cache_clear()


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
