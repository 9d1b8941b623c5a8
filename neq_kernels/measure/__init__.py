"""What training costs: FLOPs by a stated convention, seconds by phase, joules by counter."""

from neq_kernels.measure import flops
from neq_kernels.measure.energy import EnergyMeter, EnergyReading
from neq_kernels.measure.explain import Backprop, Explanation
from neq_kernels.measure.shares import StepShares, backward_shares, bound, frozen_parameter_fraction
from neq_kernels.measure.timing import PhaseClock, Variant, step_time

__all__ = [
    "Backprop",
    "EnergyMeter",
    "EnergyReading",
    "Explanation",
    "PhaseClock",
    "StepShares",
    "Variant",
    "backward_shares",
    "bound",
    "flops",
    "frozen_parameter_fraction",
    "step_time",
]
