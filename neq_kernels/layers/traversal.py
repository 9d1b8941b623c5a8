"""Find the neuron layers of a model, and the owners of its parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn import Parameter

from neq_kernels.channels import WHOLE_PARAMETER, ActiveChannels, NeuronLayout
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.following import followers


def neuron_layers(model: nn.Module) -> list[NeuronLayer]:
    """The neuron layers of ``model``; raises ValueError if there are none."""
    found = [layer for _, layer in named_neuron_layers(model)]
    if not found:
        raise ValueError("model: expected a converted model, got no neuron layers; call convert")
    return found


Owners = dict[Parameter, list[tuple[ActiveChannels, NeuronLayout]]]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def named_neuron_layers(model: nn.Module) -> Iterator[tuple[str, NeuronLayer]]:
    """The neuron layers of ``model`` (wrappers seen through), in ``named_modules`` order."""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, NeuronLayer):
            yield name, module


def neuron_owners(model: nn.Module) -> Owners:
    """Every parameter that neurons own: who decides about it, and where each neuron lies in it."""
    owners: Owners = {}
    for _, layer in named_neuron_layers(model):
        for parameter, channels, layout in layer.owners():
            owner = (channels, layout)
            known = owners.setdefault(parameter, [])
            if owner not in known:
                known.append(owner)
    for follower in followers(unwrap(model)):
        owners.setdefault(follower.parameter, []).append((follower.channels, WHOLE_PARAMETER))
    return owners
