"""Backend and wgrad-strategy selection."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from neq_kernels.backends.aten import Aten
from neq_kernels.backends.base import Backend
from neq_kernels.backends.cpu import Cpu
from neq_kernels.backends.cuda import Cuda
from neq_kernels.backends.problem import KernelChoice, Problem, Strategy
from neq_kernels.backends.reference import Reference
from neq_kernels.backends.triton.backend import Triton
from neq_kernels.dispatch import autotune, cost_model, tuning_table
from neq_kernels.dispatch.contests import Contest, Contests
from neq_kernels.dispatch.cuda_graphs import Rehearsal
from neq_kernels.dispatch.execution_context import ExecutionContext
from neq_kernels.dispatch.machine_costs import MachineCosts
from neq_kernels.dispatch.tuning_table import TuningTable
from neq_kernels.dispatch.verified_backends import VerifiedBackends
from neq_kernels.machine import machine
from neq_kernels.version import __version__

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "NEQ_KERNELS_BACKEND"
_MOST_CHOICES = 8192


class Selector:
    """Selects the backend, and among its kernels the one for each weight gradient.

    Everything that changes about this is kept here.

    Attributes:
        backends: by name; on a GPU the first one that can run a problem is its default.
        costs: what kernels are chosen by on the CPU, where nothing was measured.
        contests: what is measured now.
        rehearsal: of CUDA graphs.
        verified: which backends were found right on the GPU at hand.
        revision: grows whenever a selection made before may no longer hold.
    """

    def __init__(self) -> None:
        every: tuple[Backend, ...] = (Cuda(), Triton(), Cpu(), Aten(), Reference())
        self.backends: dict[str, Backend] = {backend.name: backend for backend in every}
        self.rehearsal = Rehearsal()
        self.verified = VerifiedBackends(self.backends)
        self.revision = 0
        self._forced_backend: str | None = None
        self._forced_strategy: Strategy | None = None
        self._by_device_type: dict[str, tuple[str, ...]] = {}
        self._choices: dict[tuple[Problem, int, ExecutionContext], KernelChoice] = {}
        self._tables: dict[ExecutionContext, TuningTable] = {}
        self.costs = self._costs_of_this_machine()
        self.contests = Contests()
        self._is_restored = False

    # --- backends --------------------------------------------------------------------------------

    def availability(self) -> list[tuple[str, str | None]]:
        """Every backend with None when it can be used, else the reason why not."""
        return [(name, backend.unavailable()) for name, backend in self.backends.items()]

    def backends_for(self, device_type: str) -> tuple[str, ...]:
        """The backends in use for tensors of this device type, the default one first: one for the
        CPU, or by name; for a GPU those that were found right on it, and ``aten``.

        Raises:
            ValueError: ``NEQ_KERNELS_BACKEND`` names no backend.
            RuntimeError: it names one that cannot be used here.
        """
        names = self._by_device_type.get(device_type)
        if names is None:
            names = self._by_device_type[device_type] = self._find_backends(device_type)
        return names

    def _find_backends(self, device_type: str) -> tuple[str, ...]:
        forced = self._forced_backend or os.environ.get(ENVIRONMENT_VARIABLE)
        if forced:
            if forced not in self.backends:
                raise ValueError(
                    f"{ENVIRONMENT_VARIABLE}: expected one of {sorted(self.backends)}, "
                    f"got {forced!r}"
                )
            reason = self.why_not(forced, device_type)
            if reason is not None:
                raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={forced}: {reason}")
            return (forced,)
        if device_type == "cpu":
            reason = self.backends["cpu"].unavailable()
            if reason is None:
                return ("cpu",)
            logger.warning("backend cpu is not used for cpu tensors: %s", reason)
            return ("aten",)
        right = self.verified.names() or () if device_type == "cuda" else ()
        able = [
            name
            for name in self.for_gpus()
            if name in right and self.why_not(name, device_type) is None
        ]
        return (*able, "aten")

    def for_gpus(self) -> tuple[str, ...]:
        """The backends with custom kernels for GPUs, the default one first."""
        return tuple(name for name, backend in self.backends.items() if backend.for_gpus)

    def why_not(self, name: str, device_type: str) -> str | None:
        """None if a backend can be used for tensors of this device type, else the reason."""
        backend = self.backends[name]
        reason = backend.unavailable()
        if reason is None and not backend.supports(device_type):
            kind = "GPU" if backend.for_gpus else "CPU"
            reason = f"it supports {kind} tensors, got {device_type}"
        return reason

    def context(self, device_type: str) -> ExecutionContext:
        """Where tensors of this device type are worked on now."""
        threads = torch.get_num_threads() if device_type == "cpu" else 0
        measures = not (
            self._is_restored
            or torch.are_deterministic_algorithms_enabled()
            or tuning_table.tuning_mode() == "never"
        )
        return ExecutionContext(self.backends_for(device_type), device_type, threads, measures)

    def on_gpu(self, context: ExecutionContext) -> bool:
        """Whether work is done as on a GPU there, be it an emulated one."""
        by_gpu_kernels = any(self.backends[name].for_gpus for name in context.backends)
        return by_gpu_kernels or context.device_type == "cuda"

    def backend_of(self, choice: KernelChoice, context: ExecutionContext) -> Backend:
        """The one that runs this kernel there."""
        return self.backends[choice.backend or context.backends[0]]

    # --- strategies ------------------------------------------------------------------------------

    def strategies(
        self, problem: Problem, context: ExecutionContext
    ) -> dict[str, tuple[Strategy, ...]]:
        """The strategies of each backend. How many channels each group has to pack would have to be
        asked of the GPU."""
        packs = (
            context.device_type == "cpu" or problem.geometry is None or problem.geometry.groups == 1
        )
        return {
            name: tuple(
                strategy
                for strategy in self.backends[name].strategies(problem)
                if packs or strategy != Strategy.PACK
            )
            for name in context.backends
        }

    def candidates(
        self, problem: Problem, n: int, context: ExecutionContext
    ) -> Mapping[KernelChoice, Backend]:
        """Every way of computing a weight gradient of ``n`` active channels there, and by whom;
        PyTorch's kernel once."""
        found: dict[KernelChoice, Backend] = {}
        for name, usable in self.strategies(problem, context).items():
            backend = self.backends[name]
            for strategy in usable:
                is_custom = strategy == Strategy.CUSTOM
                for settings in backend.settings(problem, n) if is_custom else ((),):
                    found.setdefault(context.choice(strategy, name, settings), backend)
        return found

    def choice(self, problem: Problem, n: int, context: ExecutionContext) -> KernelChoice:
        """How the weight gradient of ``n`` active channels is computed there."""
        key = (problem, n, context)
        choice = self._choices.get(key)
        if choice is None:
            if len(self._choices) >= _MOST_CHOICES:
                self._choices.clear()
            choice = self._choices[key] = self._choose(problem, n, context)
        return choice

    def _choose(self, problem: Problem, n: int, context: ExecutionContext) -> KernelChoice:
        usable = self.strategies(problem, context)
        every = tuple(dict.fromkeys(strategy for some in usable.values() for strategy in some))

        def default(strategy: Strategy) -> KernelChoice:
            first = next(name for name, some in usable.items() if strategy in some)
            return context.choice(strategy, first)

        if self._forced_strategy is not None:
            return default(self._forced_strategy if self._forced_strategy in every else every[0])
        if len(every) == 1 or n == 0:
            return default(every[0])
        winner = self._winner(problem, n, context, every)
        if winner is not None:
            possible = self.candidates(problem, n, context)
            if winner in (*possible, default(winner.strategy)):
                return winner
        if context.measures_all:
            possible = self.candidates(problem, n, context)
            winner = autotune.fastest(problem, n, possible, context.device_type)
            self._keep(problem, n, context, winner)
            return winner
        if self.on_gpu(context):
            return default(cost_model.strategy_on_gpu(problem, n, every))
        return default(self.costs.model(context).strategy(problem, n, every))

    def _winner(
        self, problem: Problem, n: int, context: ExecutionContext, usable: Collection[Strategy]
    ) -> KernelChoice | None:
        """What was measured for ``n`` active channels, or for another number where, by the cost
        model, its lead cannot have shrunk by more than a contest's doubt."""
        table, costs = self.table(context), self.costs.model(context)
        winner = table.get(problem, n)
        if winner is not None or context.measures_all:
            return winner if winner is not None and winner.strategy in usable else None
        for count, other in table.others(problem, n).items():
            if other.strategy in usable and costs.still_leads(
                problem, other.strategy, count, n, usable
            ):
                return other
        return None

    def decide(
        self, problem: Problem, n: int, context: ExecutionContext
    ) -> tuple[KernelChoice, Contest | None]:
        """:meth:`choice` in a backward that it is made for, where the machine may be calibrated
        first, and where a contest may be held: then it has the choice of its first call."""
        if n < problem.neurons:
            self.costs.calibrate(context)
        choice = self.choice(problem, n, context)
        return choice, self._contest(problem, n, context, choice)

    def _contest(
        self, problem: Problem, n: int, context: ExecutionContext, predicted: KernelChoice
    ) -> Contest | None:
        if not (context.measures and context.is_by_cpu_kernels) or self._forced_strategy:
            return None
        name = context, tuning_table.key(problem, n)
        contest = self.contests.get(name)
        if contest is None:
            (usable,) = self.strategies(problem, context).values()
            if self._winner(problem, n, context, usable) is not None:
                return None
            rivals = self.costs.model(context).in_doubt(problem, n, usable)
            if not rivals or predicted != KernelChoice(rivals[0]):
                return None

            def settle(winner: KernelChoice) -> None:
                self._keep(problem, n, context, winner)
                self._choices.clear()

            contest = self.contests.open(name, [KernelChoice(s) for s in rivals], settle)
        return contest

    def choice_in_graph(
        self, problem: Problem, context: ExecutionContext, output_mask: Sequence[bool]
    ) -> KernelChoice:
        """How it is computed in a CUDA graph: by a custom kernel that reads the number of active
        channels on the device, or densely."""
        able = [
            name
            for name, usable in self.strategies(problem, context).items()
            if self.backends[name].for_gpus and Strategy.CUSTOM in usable
        ]
        if not output_mask[1] or not able:
            return KernelChoice(Strategy.DENSE)

        def choose() -> KernelChoice:
            choice = self.choice(problem, problem.neurons, context)
            is_custom = choice.strategy == Strategy.CUSTOM
            return choice if is_custom else context.choice(Strategy.CUSTOM, able[0])

        about = tuning_table.key(problem, problem.neurons)
        return self.rehearsal.choice((problem, context, bool(output_mask[2])), choose, about)

    # --- what was measured -----------------------------------------------------------------------

    def table(self, context: ExecutionContext) -> TuningTable:
        """The winners measured in such a context."""
        table = self._tables.get(context.place)
        if table is None:
            measured_with = self._measured_with(context)
            table = TuningTable(tuning_table.directory(), measured_with, context.measures)
            self._tables[context.place] = table
        return table

    def _keep(
        self, problem: Problem, n: int, context: ExecutionContext, winner: KernelChoice
    ) -> None:
        table = self.table(context)
        table.put(problem, n, winner)
        table.save()

    def _costs_of_this_machine(self) -> MachineCosts:
        return MachineCosts(self.backends["cpu"], self._measured_with, self.forget_choices)

    def _measured_with(self, context: ExecutionContext) -> dict[str, Any]:
        about = machine()
        measured_with: dict[str, Any] = {
            "backend": " ".join(context.backends),
            "torch": about.torch,
            "neq_kernels": __version__,
        }
        if context.device_type == "cpu":
            measured_with |= {
                "cpu": about.cpu,
                "instructions": about.instructions,
                "kernels": None,
                "threads": context.threads,
            }
        else:
            measured_with["accelerator"] = about.accelerator
        for name in context.backends:
            measured_with |= self.backends[name].built_with()
        return measured_with

    # --- changes ---------------------------------------------------------------------------------

    def restored(self) -> None:
        """Measure nothing more: a checkpoint has brought what was measured."""
        self._is_restored = True
        self.contests = Contests()
        self.forget_choices()

    def forget_choices(self) -> None:
        """Choose kernels anew from now on."""
        self.revision += 1
        self._choices.clear()

    def forget_backends(self) -> None:
        """Select backends anew from now on; what was measured is kept."""
        self._by_device_type.clear()
        self.revision += 1

    def forget(self) -> None:
        """Select everything anew, and read the environment and the tables' files again."""
        self._tables.clear()
        self.costs = self._costs_of_this_machine()
        self.contests = Contests()
        self._is_restored = False
        self.forget_choices()
        self.forget_backends()

    @contextmanager
    def forced_backend(self, name: str) -> Iterator[None]:
        """Within it, ``name`` is used for everything, as ``NEQ_KERNELS_BACKEND`` would say."""
        before, self._forced_backend = self._forced_backend, name
        self.forget_backends()
        try:
            yield
        finally:
            self._forced_backend = before
            self.forget_backends()

    @contextmanager
    def forced_strategy(self, strategy: Strategy) -> Iterator[None]:
        """Within it, ``strategy`` is used wherever it can be, else ``DENSE``."""
        before, self._forced_strategy = self._forced_strategy, strategy
        self.forget_choices()
        try:
            yield
        finally:
            self._forced_strategy = before
            self.forget_choices()


selector = Selector()


def capturable() -> AbstractContextManager[None]:
    """Within it, gradients are computed as in a CUDA graph: wrap the warm-up in it, or both.

    A captured graph reads the number of active channels on the device, with kernels that eager
    steps may not have used; loading a kernel is forbidden while a graph is captured. What was not
    warmed up here is captured densely: correct with every mask, and no faster for any.

    >>> with neq.capturable():
    ...     step = torch.cuda.make_graphed_callables(model, (example,))
    """
    return selector.rehearsal.running()
