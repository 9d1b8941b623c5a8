"""Find the neuron layers of a model, and the owners of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn
from torch.nn import Parameter

from neq_kernels.channels import WHOLE_PARAMETER, ActiveChannels, NeuronLayout
from neq_kernels.layers.base import NeuronLayer, restorable, restore
from neq_kernels.layers.following import followers


def neuron_layers(model: nn.Module) -> list[NeuronLayer]:
    """The neuron layers of ``model``; raises ValueError if there are none."""
    found = [layer for _, layer in named_neuron_layers(model)]
    if not found:
        raise ValueError("model: expected a converted model, got no neuron layers; call convert")
    return found


Owners = dict[Parameter, list[tuple[ActiveChannels, NeuronLayout]]]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of DistributedDataParallel, DataParallel, ``torch.compile``
    and Lightning Fabric."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif {"_forward_module", "_original_module"} <= model._modules.keys():
            model = model._modules["_original_module"]  # type: ignore[assignment]
        else:
            return model


def named_neuron_layers(model: nn.Module) -> Iterator[tuple[str, NeuronLayer]]:
    """The neuron layers of ``model`` (wrappers seen through), in ``named_modules`` order.

    A layer whose neurons can be held no longer gets its stock class back, with a warning: somebody
    has put a parametrization on it in which they depend on one another.
    """
    for name, module in unwrap(model).named_modules():
        if not isinstance(module, NeuronLayer):
            continue
        computed = module.computed()
        if computed is None or not restorable(module):
            yield name, module
            continue
        restore(module)
        warnings.warn(
            f"{name or 'the model'}: its {computed} was parametrized after convert, in such a way "
            "that neurons depend on one another (spectral norm, orthogonal, ...): it has no "
            "neurons that can be frozen any more, and trains on; to freeze them, remove the "
            "parametrization and call convert again",
            stacklevel=3,
        )


def neuron_owners(model: nn.Module, following: bool = True) -> Owners:
    """Every parameter that neurons own: who decides about it, and where each neuron lies in it.
    With ``following``, those that follow too, as one neuron each."""
    owners: Owners = {}
    for _, layer in named_neuron_layers(model):
        for parameter, channels, layout in layer.owners():
            owner = (channels, layout)
            known = owners.setdefault(parameter, [])
            if owner not in known:
                known.append(owner)
    for follower in followers(unwrap(model)) if following else ():
        owners.setdefault(follower.parameter, []).append((follower.channels, WHOLE_PARAMETER))
    return owners
