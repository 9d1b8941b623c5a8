"""Optimizers that leave frozen neurons alone."""

from neq_kernels.optim.attached import AttachedOptimizer, ParameterUpdate, attach, is_attached

__all__ = ["AttachedOptimizer", "ParameterUpdate", "attach", "is_attached"]
