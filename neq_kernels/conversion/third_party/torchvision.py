"""torchvision: window attention that reads its layers' weights without calling the layers."""

from __future__ import annotations

import sys

from torch import nn

from neq_kernels.conversion.recipe import Recipe


def recipe(kind: type[nn.Module]) -> Recipe | None:
    return None  # its layers are subclasses that inherit their forward


def replacements() -> dict[type[nn.Module], type[nn.Module]]:
    if "torchvision.models.swin_transformer" not in sys.modules:
        return {}
    from neq_kernels.conversion.third_party import torchvision_swin

    return torchvision_swin.REPLACEMENTS


def bypassing() -> dict[type[nn.Module], str]:
    if "torchvision.models.swin_transformer" not in sys.modules:
        return {}
    from neq_kernels.conversion.third_party import torchvision_swin

    return torchvision_swin.BYPASSING
