"""Where gradients are computed, and by whom."""

from __future__ import annotations

from typing import NamedTuple

from neq_kernels.backends.problem import KernelChoice, Strategy
from neq_kernels.dispatch import tuning_table


class ExecutionContext(NamedTuple):
    """Where gradients are computed, and by whom.

    Attributes:
        backends: names, the default one first.
        device_type: of the tensors.
        threads: of the CPU; 0 on a GPU.
        measures: whether kernels may be measured while a model trains, and what earlier processes
            measured is read; else the package's own tables decide, and what this process was told.
    """

    backends: tuple[str, ...]
    device_type: str
    threads: int
    measures: bool = True

    def choice(
        self, strategy: Strategy, backend: str, settings: tuple[int, ...] = ()
    ) -> KernelChoice:
        """One of a backend's kernels. On a GPU, where another backend may be the default tomorrow,
        it is named; PyTorch's kernel belongs to none."""
        is_named = self.device_type == "cuda" and strategy != Strategy.DENSE
        return KernelChoice(strategy, settings, backend if is_named else "")

    @property
    def place(self) -> ExecutionContext:
        """What measurements hold for, whether or not they may be made."""
        return self._replace(measures=True)

    @property
    def is_by_cpu_kernels(self) -> bool:
        """Whether the C++ extension serves CPU tensors: the cost model knows its kernels."""
        return self.device_type == "cpu" and self.backends == ("cpu",)

    @property
    def measures_all(self) -> bool:
        """Whether every layer is measured when it is met first."""
        return self.measures and tuning_table.tuning_mode() == "always"
