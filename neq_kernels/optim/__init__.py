"""Optimizers that leave frozen neurons alone."""

from neq_kernels.optim.attach import AttachedOptimizer, ParameterUpdate, attach

__all__ = ["AttachedOptimizer", "ParameterUpdate", "attach"]
