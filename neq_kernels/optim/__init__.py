"""Optimizers that leave frozen neurons alone."""

from neq_kernels.optim.attached import AttachedOptimizer, ParameterUpdate
from neq_kernels.optim.attaching import attach, is_attached

__all__ = ["AttachedOptimizer", "ParameterUpdate", "attach", "is_attached"]
