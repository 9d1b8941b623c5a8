"""How the neuron class of a layer type is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from neq_kernels.layers.base import NeuronLayer


@dataclass(frozen=True)
class Recipe:
    """A neuron class has the bases ``(ours, the type)``, and these class attributes.

    Attributes:
        around: the bases are ``(the type, ours)``: its forward calls ``super().forward``, ours.
    """

    ours: type[NeuronLayer]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    around: bool = False


# By the user: neq_kernels.conversion.registration.register.
REGISTERED: dict[type[nn.Module], Recipe] = {}
