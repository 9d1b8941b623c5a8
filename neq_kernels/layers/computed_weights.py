"""Layers whose weight is computed anew in every forward: weight norm, pruning, and others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from neq_kernels.channels import NeuronLayout


def is_computed(layer: nn.Module, name: str) -> bool:
    """Whether a parameter of this name has been replaced by what it is computed from."""
    if name in layer._parameters or getattr(layer, "_is_replica", False):
        return False
    return parametrize.is_parametrized(layer, name) or isinstance(layer.__dict__.get(name), Tensor)


def sources(
    layer: nn.Module, name: str, layout: NeuronLayout
) -> list[tuple[Parameter, NeuronLayout]] | None:
    """The parameters that ``name`` is computed from, neuron by neuron, with the neurons' layout;
    None where several neurons are computed from one another."""
    if parametrize.is_parametrized(layer, name):
        found: Any = layer.parametrizations[name]  # type: ignore[index]
        if len(found) > 1 or not isinstance(found[0], _WeightNorm):
            return None
        originals = (found.original0, found.original1)
        return [(p, layout) for p in originals] if _counts_neurons(found[0].dim, layout) else None
    own = layer._parameters
    if f"{name}_orig" in own and f"{name}_mask" in layer._buffers:
        return [(own[f"{name}_orig"], layout)]  # type: ignore[list-item]
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            if not _counts_neurons(hook.dim, layout):
                return None
            return [(own[f"{name}_{part}"], layout) for part in "gv"]  # type: ignore[misc]
    return None


def _counts_neurons(dim: int | None, layout: NeuronLayout) -> bool:
    return dim is not None and dim == layout.axis and layout.groups == 1
