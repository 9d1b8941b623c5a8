"""Layers that share parameters have their neurons in common."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn
from torch.nn import Parameter

from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import named_neuron_layers

Group = dict[str, NeuronLayer]


def tied_groups(model: nn.Module) -> list[Group]:
    """The neuron layers of ``model`` by name; those that see the same neurons in a parameter they
    share stand together."""
    groups: dict[int, Group] = {}
    group_of: dict[tuple[Parameter, NeuronLayout], Group] = {}
    for name, layer in named_neuron_layers(model):
        found = [group_of[key] for key in _keys(layer) if key in group_of]
        group = found[0] if found else {}
        for other in found:
            if other is not group:
                group.update(other)
                groups.pop(id(other), None)
        group[name] = layer
        groups[id(group)] = group
        for member in group.values():
            group_of.update(dict.fromkeys(_keys(member), group))
    return list(groups.values())


def _keys(layer: NeuronLayer) -> list[tuple[Parameter, NeuronLayout]]:
    """Where all neurons of a layer lie."""
    return [(p, layout) for p, channels, layout in layer.owners() if channels is layer.channels]


def share_channels(model: nn.Module, new: Collection[ActiveChannels] = ()) -> None:
    """Give each group of tied layers one ``ActiveChannels`` of its own: a channel is active if it
    was active in any of them. Those of ``new`` layers count where there are no others; those of
    layers that have another number of neurons by now do not."""
    taken: set[ActiveChannels] = set()
    for group in tied_groups(model):
        every = list(dict.fromkeys(layer.channels for layer in group.values()))
        k = next(
            (layer.n_neurons for layer in group.values() if layer.neuron_parameters()),
            len(every[0]),
        )
        every = [channels for channels in every if len(channels) == k] or [ActiveChannels(k)]
        known = [channels for channels in every if channels not in new] or every
        channels = next((c for c in known if c not in taken), None) or copy.deepcopy(known[0])
        if len(known) > 1:
            channels.set(torch.stack([c.mask for c in known]).any(0))
        taken.add(channels)
        for layer in group.values():
            if layer.channels is not channels:
                layer.adopt(channels, layer.grad_input, layer.anchor)


def check_ties(model: nn.Module) -> None:
    """Raise ValueError where layers that share a parameter do not share their channels, or the
    other way round: they were tied, or a tie was broken, after ``convert``."""
    owner: dict[ActiveChannels, str] = {}
    for group in tied_groups(model):
        first, *others = group
        channels = group[first].channels
        for name in others:
            if group[name].channels is not channels:
                raise ValueError(
                    f"model: expected one ActiveChannels for {first} and {name}, which share a "
                    "parameter, got two; call neq.convert(model), again if they were tied since"
                )
        other = owner.setdefault(channels, first)
        if other != first:
            raise ValueError(
                f"model: expected an ActiveChannels each for {other} and {first}, which share no "
                "parameter any more, got one; call neq.convert(model) again"
            )
