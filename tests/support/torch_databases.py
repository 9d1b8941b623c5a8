"""PyTorch's databases of modules and optimizers, which it tests itself with."""

from __future__ import annotations

from hypothesis import settings
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.testing._internal.common_optimizers import (
    _get_optim_inputs_including_global_cliquey_kwargs as optimizer_inputs,
)
from torch.testing._internal.common_optimizers import optim_db

settings.load_profile("neq")  # importing them has loaded one of PyTorch's

__all__ = ["ModuleInfo", "module_db", "optim_db", "optimizer_inputs"]
