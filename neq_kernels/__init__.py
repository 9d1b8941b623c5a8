"""Weight gradients for the neurons that still learn.

>>> import neq_kernels as neq
>>> model = neq.convert(model)
>>> neq.attach(optimizer, model)
>>> controller = neq.NEqController(model, probe)
"""

from neq_kernels import functional, measure, nn
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.controllers import Controller, FixedController, NEqController, StochasticController
from neq_kernels.conversion.convert import convert, revert, specialize
from neq_kernels.conversion.registration import register
from neq_kernels.conversion.report import conversion_report
from neq_kernels.conversion.verify import verify
from neq_kernels.dispatch.selection import capturable
from neq_kernels.measure import flops
from neq_kernels.measure.explain import explain
from neq_kernels.model_tuning import load_tuning_state_dict, tune, tuning_state_dict
from neq_kernels.optim import attach
from neq_kernels.version import __version__

__all__ = [
    "ActiveChannels",
    "Controller",
    "FixedController",
    "NEqController",
    "NeuronLayout",
    "StochasticController",
    "__version__",
    "attach",
    "capturable",
    "conversion_report",
    "convert",
    "explain",
    "flops",
    "functional",
    "load_tuning_state_dict",
    "measure",
    "nn",
    "register",
    "revert",
    "specialize",
    "tune",
    "tuning_state_dict",
    "verify",
]
