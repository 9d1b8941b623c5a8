"""Controllers decide, once per epoch, which neurons are updated in the next."""

from neq_kernels.controllers.base import Controller
from neq_kernels.controllers.fixed import FixedController
from neq_kernels.controllers.neq import NEqController
from neq_kernels.controllers.stochastic import StochasticController

__all__ = ["Controller", "FixedController", "NEqController", "StochasticController"]
