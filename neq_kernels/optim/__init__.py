"""Optimizers that leave frozen neurons alone."""

from neq_kernels.optim.attached import AttachedOptimizer, ParameterUpdate, attach

__all__ = ["AttachedOptimizer", "ParameterUpdate", "attach"]
