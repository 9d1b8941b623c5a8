"""Freezing a network wholly from its input up to the end of a residual block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import neq_kernels as neq
from benchmarks.common.workloads import Workload, output_layer
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners
from neq_kernels.measure import flops

BLOCKS = ("BasicBlock", "Bottleneck", "EncoderBlock")
# Tokens and positions enter at the bottom: left to learn, they would keep backprop alive to there.
AT_THE_INPUT = ("class_token", "encoder.pos_embedding")


@dataclass(frozen=True)
class Prefix:
    """The layers from the input on.

    Attributes:
        end: the module whose output is the first that may need a gradient; empty: none frozen.
        layers: names of the frozen layers.
        of: how many layers the network has.
    """

    end: str
    layers: tuple[str, ...]
    of: int


def prefixes(workload: Workload, fractions: Sequence[float]) -> list[Prefix]:
    """For each fraction the block whose end is nearest to that share of the layers; 0 is nothing,
    1 everything but the output layer."""
    model = neq.convert(workload.model("nchw"))
    learns = {name for name, _ in named_neuron_layers(model)}
    order = [
        layer.name for layer in flops.count(model, workload.batches("nchw", 1)[0][0][:1]).layers
    ]
    order = [name for name in order if name in learns]
    head = output_layer(model)
    ends = {
        name: 1 + max(i for i, layer in enumerate(order) if layer.startswith(f"{name}."))
        for name, module in model.named_modules()
        if type(module).__name__ in BLOCKS
    }
    found = []
    for fraction in fractions:
        if fraction == 0:
            end, n = "", 0
        elif fraction == 1:
            end, n = _before(model, head), len(order) - 1
        else:
            end, n = min(ends.items(), key=lambda item: abs(item[1] / len(order) - fraction))
        layers = [name for name in order if name != head]
        found.append(Prefix(end, tuple(layers[:n]), len(order)))
    return found


def freeze_neurons(model: nn.Module, prefix: Prefix) -> None:
    """Freeze the prefix of a converted model (``others="follow"``)."""
    for name, layer in named_neuron_layers(model):
        layer.channels.set(torch.full((len(layer.channels),), name not in prefix.layers))
    _freeze_input_parameters(model, prefix)


def freeze_parameters(model: nn.Module, prefix: Prefix) -> None:
    """``requires_grad_(False)`` for the parameters of a plain model that freezing the neurons of
    the prefix would stop."""
    converted = neq.convert(model, others="follow")
    freeze_neurons(converted, prefix)
    stopped = [
        parameter
        for parameter, owners in neuron_owners(converted).items()
        if all(channels.none_active for channels, _ in owners)
    ]
    neq.revert(model)
    for parameter in stopped:
        parameter.requires_grad_(False)


def run_without_grad(model: nn.Module, prefix: Prefix) -> None:
    """Make a plain model run its prefix under ``torch.no_grad``."""
    if not prefix.end:
        return

    def off(module: nn.Module, args: object) -> None:
        torch.set_grad_enabled(False)

    def on(module: nn.Module, args: object, output: object) -> None:
        torch.set_grad_enabled(True)

    model.register_forward_pre_hook(off)
    model.get_submodule(prefix.end).register_forward_hook(on, always_call=True)


def _freeze_input_parameters(model: nn.Module, prefix: Prefix) -> None:
    for name, parameter in model.named_parameters():
        if name in AT_THE_INPUT and prefix.layers:
            parameter.requires_grad_(False)


def _before(model: nn.Module, head: str) -> str:
    """The child of the network that runs before the one that holds the head."""
    children = [name for name, _ in model.named_children()]
    return children[children.index(head.partition(".")[0]) - 1]
