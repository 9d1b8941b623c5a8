"""Decide which parameters that no neuron owns follow, and which layers decide about them."""

from __future__ import annotations

import torch
from torch import nn

from neq_kernels.layers import traversal
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.layers.following import (
    Follower,
    Following,
    followers,
    following_class,
    original_class,
)
from neq_kernels.layers.traversal import named_neuron_layers


def follow(model: nn.Module, anchor: ParameterAnchor, before: list[Follower]) -> None:
    """Let every parameter that learns and has no neurons follow the neuron layers.

    Args:
        model: a converted model, in which nothing follows.
        anchor: shared by its layers.
        before: what has followed before. What forwards have shown of it is kept if the layers are
            still the same.
    """
    layers = [layer for _, layer in named_neuron_layers(model)]
    following = Following(list(dict.fromkeys(layer.channels for layer in layers)), anchor)
    following.specialized = any(layer.specialized for layer in layers)
    everything = following.layers_in(model)
    owners = traversal.neuron_owners(model)
    parents = {child: module for module in model.modules() for child in module.children()}
    found: dict[nn.Parameter, Follower] = {}
    watched: dict[nn.Module, None] = {}
    for module in list(model.modules()):
        names = [
            name
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad and parameter not in owners
        ]
        if not names or isinstance(module, torch.jit.ScriptModule):
            continue
        block = module
        while block in parents and not following.layers_in(block):
            block = parents[block]
        decides = following.layers_in(block)
        if block is model:
            decides &= ~following.layers_in(layers[-1])
        module.neq_following = {}  # type: ignore[assignment]
        for name in names:
            parameter = module._parameters[name]
            assert parameter is not None
            follower = found.setdefault(parameter, Follower(module, name, following))
            follower.belongs_to(decides, outermost=block is model)
            module.__dict__["neq_following"][name] = follower
        module.__class__ = following_class(type(module), tuple(names))
        watched[module] = None
        while module in parents:
            module = parents[module]
            watched[module] = None
    for module in watched:
        hooks = following.watch(module, whole=following.layers_in(module) == everything)
        module.neq_following_hooks = hooks  # type: ignore[assignment]
    known = {follower.parameter: follower for follower in before}
    if before and found.keys() == known.keys() and following.same_layers(before[0].following):
        following.keep(before[0].following)
        for parameter, follower in found.items():
            follower.keep(known[parameter])


def unfollow(model: nn.Module) -> list[Follower]:
    """Undo :func:`follow`. Returns what has followed."""
    found = followers(model)
    for module in model.modules():
        for hook in module.__dict__.pop("neq_following_hooks", ()):
            hook.remove()
        # Under a class that was put on top, a parametrization for example, ours does nothing more.
        if module.__dict__.pop("neq_following", None) is not None:
            module.__class__ = original_class(module)
    return found
