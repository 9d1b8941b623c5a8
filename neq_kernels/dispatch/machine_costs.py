"""The costs of the machine at hand: the table of its class, and the calibration that scales it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch._C import _len_torch_dispatch_stack

from neq_kernels.backends.base import Backend
from neq_kernels.dispatch import calibration, cost_model
from neq_kernels.dispatch.calibration import Calibration, CalibrationFile
from neq_kernels.dispatch.cost_model import CostModel
from neq_kernels.dispatch.execution_context import ExecutionContext
from neq_kernels.machine import cpu_class


class MachineCosts:
    """What kernels are chosen by, where nothing was measured.

    Args:
        cpu: the backend whose kernels a calibration times.
        measured_with: what a calibration holds for.
        changed: is called where choices made before may no longer hold.
    """

    def __init__(
        self,
        cpu: Backend,
        measured_with: Callable[[ExecutionContext], Mapping[str, Any]],
        changed: Callable[[], None],
    ) -> None:
        self._cpu, self._measured_with, self._changed = cpu, measured_with, changed
        self._known: dict[ExecutionContext, Calibration] = {}
        self._models: dict[ExecutionContext, CostModel] = {}
        self._files: dict[ExecutionContext, CalibrationFile] = {}
        self._tried: set[ExecutionContext] = set()

    def model(self, context: ExecutionContext) -> CostModel:
        """The cost model; an empty one where the kernels that it knows are not in use."""
        model = self._models.get(context.place)
        if model is None:
            model = self._models[context.place] = self.calibration(context).model()
        return model

    def calibration(self, context: ExecutionContext) -> Calibration:
        """What is known of this machine, maybe by an earlier process."""
        known = self._known.get(context.place)
        if known is None:
            if context.is_by_cpu_kernels and context.measures and calibration.is_asked_for():
                known = self._file(context).read()
            if known is None:
                known = self.uncalibrated(context)
            self._known[context.place] = known
        return known

    def uncalibrated(self, context: ExecutionContext) -> Calibration:
        """What is known of this machine when nothing was measured."""
        if not context.is_by_cpu_kernels:
            return Calibration(None, {})
        return Calibration(CostModel.of_class(cpu_class()).name, {})

    def use(self, context: ExecutionContext, known: Calibration) -> None:
        """Choose by this calibration from now on."""
        self._known[context.place] = known
        self._models.pop(context.place, None)
        self._changed()

    def calibrate(self, context: ExecutionContext) -> None:
        """Measure this machine, where that was never done and may be done now: at most once in a
        process, in one process at a time, not while the machine is busy."""
        if context in self._tried or _len_torch_dispatch_stack() > 0:
            return
        self._tried.add(context)
        if not (context.is_by_cpu_kernels and context.measures and calibration.is_asked_for()):
            return
        if self.calibration(context).misfit is not None or calibration.is_busy():
            return
        file = self._file(context)
        with file.alone() as is_alone:
            if not is_alone:
                return
            known = file.read()
            if known is None:
                times = calibration.measure(self._cpu)
                if not times:
                    return
                known = calibration.fitted(times, cost_model.tables(), own=cpu_class())
                file.write(known)
        self.use(context, known)

    def _file(self, context: ExecutionContext) -> CalibrationFile:
        file = self._files.get(context)
        if file is None:
            file = self._files[context] = CalibrationFile(self._measured_with(context))
        return file
