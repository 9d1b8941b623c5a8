"""What is known of other libraries' modules. A library is asked about only once its user has
imported it; nothing of it is imported for that."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Protocol

from torch import nn

from neq_kernels.conversion.recipe import Recipe

# Each is a library, and neq_kernels.conversion.third_party.NAME what is known of it.
FAMILIES = ("timm", "transformers")


class Family(Protocol):
    def recipe(self, kind: type[nn.Module]) -> Recipe | None:
        """How the neuron class of a layer type of this library is made, if it is known."""


def recipe_for(kind: type[nn.Module]) -> Recipe | None:
    """The recipe that the library of this class has for it."""
    name = kind.__module__.partition(".")[0]
    return _family(name).recipe(kind) if name in FAMILIES and name in sys.modules else None


def _family(name: str) -> Family:
    return import_module(f"neq_kernels.conversion.third_party.{name}")
