"""Put right what other tools did to a converted model: layers built anew around the parameters of
converted ones, and layers with fewer neurons than before."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn import Parameter

from neq_kernels.channels import ActiveChannels
from neq_kernels.conversion.neuron_classes import neuron_class
from neq_kernels.layers.base import NeuronLayer, become
from neq_kernels.layers.traversal import named_neuron_layers, unwrap


def repair(model: nn.Module) -> None:
    """Give layers that were built anew the neurons, and the masks, of those they replace.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` and the like make a new layer and hand it the
    old one's parameters: these say which channels were theirs. Says so in one warning. Does nothing
    to a model that convert has not seen.
    """
    model = unwrap(model)
    layers = [layer for _, layer in named_neuron_layers(model)]
    anchor = next((layer.anchor for layer in layers if layer.anchor.shared), None)
    if anchor is None:
        return
    owned = {id(p) for layer in layers for p, _ in layer.neuron_parameters()}
    back, gone = [], []
    for name, module in list(model.named_modules()):
        orphans = [p for p in module._parameters.values() if p is not None and id(p) not in owned]
        channels = next((anchor.channels_of[p] for p in orphans if p in anchor.channels_of), None)
        if channels is None or isinstance(module, NeuronLayer):
            continue
        ours = neuron_class(type(module))
        if ours is None or ours.reason_against(module) is not None:
            gone.append(name)
            continue
        become(module, ours)
        assert isinstance(module, NeuronLayer)
        if module.n_neurons != len(channels):
            channels = ActiveChannels(module.n_neurons)
        module.adopt(channels, "exact", anchor)
        back.append(name)
    remember(model)
    if back:
        warnings.warn(
            f"layers were built anew after convert around the parameters of converted ones; they "
            f"have their neurons and masks back: {', '.join(back)}",
            stacklevel=3,
        )
    if gone:
        warnings.warn(
            "layers were built anew after convert, of types that have no neurons: all of their "
            f"channels train on: {', '.join(gone)}",
            stacklevel=3,
        )


def remember(model: nn.Module) -> None:
    """Note, with the model's anchor, which channels belong to which parameter."""
    for _, layer in named_neuron_layers(model):
        for parameter, _ in layer.neuron_parameters():
            layer.anchor.channels_of[parameter] = layer.channels


def resize(name: str, layer: NeuronLayer) -> ActiveChannels:
    """The layer's channels, or new ones, all active, where it has another number of neurons now."""
    owned: list[tuple[Parameter, object]] = list(layer.neuron_parameters())
    if not owned or layer.n_neurons == len(layer.channels):
        return layer.channels
    k = layer.n_neurons
    warnings.warn(
        f"{name or 'the model'}: it had {len(layer.channels)} neurons and has {k} now; all of them "
        "are active again",
        stacklevel=4,
    )
    return ActiveChannels(k)
