"""Weight gradients for the neurons that still learn.

>>> import neq_kernels as neq
>>> model = neq.convert(model)
>>> neq.attach(optimizer, model)
>>> controller = neq.NEqController(model, probe)
"""

from neq_kernels import functional
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.convert import (
    conversion_report,
    convert,
    revert,
    specialize,
    verify,
)

__version__ = "0.1.0"

__all__ = [
    "ActiveChannels",
    "NeuronLayout",
    "conversion_report",
    "convert",
    "functional",
    "revert",
    "specialize",
    "verify",
]
