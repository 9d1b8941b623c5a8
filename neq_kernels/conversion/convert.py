"""Convert the layers of a model into neuron layers, in place, and back."""

from __future__ import annotations

from typing import Literal

from torch import nn

from neq_kernels.autograd.arguments import GradInput
from neq_kernels.channels import ActiveChannels
from neq_kernels.conversion.bypass import stop_watching, watch_for_bypass
from neq_kernels.conversion.eligibility import (
    Filter,
    reasons_against,
)
from neq_kernels.conversion.followers import follow, unfollow
from neq_kernels.conversion.neuron_classes import neuron_class
from neq_kernels.conversion.repair import remember, repair, resize
from neq_kernels.conversion.report import conversion_report, warn_of_little
from neq_kernels.conversion.weight_readers import prepare_readers, remove_reads
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.layers.base import (
    NeuronLayer,
    convert_in_place,
    restorable,
    restore,
    unparametrized,
)
from neq_kernels.layers.following import followers
from neq_kernels.layers.masked import FurtherNeurons
from neq_kernels.layers.replaced_forward import calls_its_class, replaced_forward
from neq_kernels.layers.ties import share_channels
from neq_kernels.layers.traversal import named_neuron_layers, neuron_layers, unwrap


def convert(
    model: nn.Module,
    *,
    filter: Filter | None = None,
    grad_input: GradInput = "exact",
    norms: bool = True,
    others: Literal["train", "follow"] = "train",
    frozen_statistics: Literal["update", "hold"] = "update",
) -> nn.Module:
    """Give the layers of ``model`` neurons that can be frozen.

    The class of each layer of an exact torch.nn type changes in place: the objects, their
    parameters, hooks, ``state_dict`` and every reference to them stay. All channels start active,
    and the model computes what it did. Convert before wrapping in DistributedDataParallel, FSDP or
    ``torch.compile``. Converting again does nothing to what is converted.

    Layers constructed from :mod:`neq_kernels.nn` have neurons already. They are adopted whatever
    ``filter`` and ``norms`` say: they get the other options, and keep their channels and masks.
    Layers that share a parameter (an embedding and the head tied to it), and see the same neurons
    in it, share one ``ActiveChannels``: a channel is active if it was active in any of them. Where
    layers were tied, or a tie was broken, since, converting again puts that right.

    Args:
        model: any module.
        filter: ``filter(name, module) -> bool``, False leaves a layer alone.
        grad_input: ``"exact"``: input gradients are the dense ones. ``"active"``: the approximation
            that only active channels propagate.
        norms: convert norm layers too (their neurons are channel-wise scales and shifts).
        others: parameters no neuron owns (class tokens, layer scales, position tables) ``"train"``
            on, or ``"follow"``: each stops while the first neuron layer that it feeds, and every
            layer below that, are wholly frozen, or while all layers of the module around it are.
            The first eager forward of the model shows who feeds whom; until then all layers but
            the last decide about the parameters of the outermost module.
        frozen_statistics: batch norm none of whose channels is active goes on to normalise by the
            batch and to ``"update"`` its running statistics, as in torch.nn, or does neither
            (``"hold"``): it behaves as in evaluation until a channel is active again.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an unknown option, or no layer can be converted; the message says why not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if grad_input not in ("exact", "active"):
        raise ValueError(f"grad_input: expected 'exact' or 'active', got {grad_input!r}")
    if others not in ("train", "follow"):
        raise ValueError(f"others: expected 'train' or 'follow', got {others!r}")
    if frozen_statistics not in ("update", "hold"):
        raise ValueError(
            f"frozen_statistics: expected 'update' or 'hold', got {frozen_statistics!r}"
        )
    inner = unwrap(model)
    repair(inner)
    followed = unfollow(inner)
    reasons = reasons_against(inner, filter, norms)
    anchor = _adopt_known(inner, grad_input, frozen_statistics == "hold")
    new = set()
    for name, layer in list(inner.named_modules()):
        if isinstance(layer, NeuronLayer) or reasons[name] is not None:
            continue
        ours = neuron_class(unparametrized(layer))
        assert ours is not None
        layer = convert_in_place(layer, ours)
        channels = ActiveChannels(layer.n_neurons)
        layer.adopt(channels, grad_input, anchor)
        if frozen_statistics == "hold":
            layer.hold_statistics = True
        new.add(channels)
    share_channels(inner, new)
    if next(named_neuron_layers(inner), None) is None:
        raise ValueError(
            "model: expected at least one layer that can be converted, got none:\n"
            f"{conversion_report(inner)}"
        )
    remember(inner)
    warn_of_little(inner, filter, norms)
    prepare_readers(inner)
    if others == "follow" or followed:
        follow(inner, anchor, followed)
    watch_for_bypass(inner)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: every layer has its own class back, under hooks and parametrizations
    that were put on it since. Returns ``model``.

    Raises:
        ValueError: a layer's class was changed again since, or its ``forward`` was wrapped.
    """
    inner = unwrap(model)
    for name, layer in named_neuron_layers(inner):
        if isinstance(layer, FurtherNeurons):
            continue
        if not restorable(layer):
            raise ValueError(
                f"{name}: expected the class that convert gave it, got {type(layer).__name__}; "
                "remove what was put on top first"
            )
        if replaced_forward(layer) and calls_its_class(layer):
            raise ValueError(
                f"{name}: expected the forward of its class, got one that was put on the layer "
                f"after convert and calls it: {layer.forward}; delete it first: del layer.forward"
            )
    stop_watching(inner)
    unfollow(inner)
    for module in inner.modules():
        if isinstance(module, NeuronLayer):
            restore(module)
        remove_reads(module)
    return model


def specialize(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let ``torch.compile`` recompile when a layer stops or starts again.

    By default one compiled graph serves all masks, so a wholly frozen layer still saves its input,
    keeps backprop alive and gets a gradient of zeros. Specialised, each change of the set of wholly
    frozen layers costs one recompilation and wholly frozen layers cost nothing, as in eager. Raise
    ``torch._dynamo.config.recompile_limit`` to the number of changes you expect. Without effect
    under a process group, where the reducer must see every parameter.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``model`` has no neuron layers.
    """
    for layer in neuron_layers(model):
        layer.specialized = enabled
    for follower in followers(unwrap(model)):
        follower.following.specialized = enabled
    return model


def _adopt_known(model: nn.Module, grad_input: GradInput, hold: bool) -> ParameterAnchor:
    """Let the neuron layers that ``model`` has share one anchor, and return it."""
    known = [layer for _, layer in named_neuron_layers(model)]
    for name, layer in named_neuron_layers(model):
        layer.channels = resize(name, layer)
    anchors = [layer.anchor for layer in known if layer.anchor.shared]
    anchor = anchors[0] if anchors else ParameterAnchor(shared=True)
    for layer in known:
        if not layer.anchor.shared:
            layer.grad_input = grad_input
            if hold:
                layer.hold_statistics = True
        layer.adopt(layer.channels, layer.grad_input, anchor)
    return anchor
