"""Decide which modules can be converted, to what, and why not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from neq_kernels.channels import NeuronLayout
from neq_kernels.layers import conv, embedding, linear, norm
from neq_kernels.layers.base import NeuronLayer, reason_against

Filter = Callable[[str, nn.Module], bool]

NEURON_CLASSES: dict[type[nn.Module], type[NeuronLayer]] = {
    nn.Linear: linear.Linear,
    nn.Embedding: embedding.Embedding,
    nn.Conv1d: conv.Conv1d,
    nn.Conv2d: conv.Conv2d,
    nn.Conv3d: conv.Conv3d,
    nn.ConvTranspose1d: conv.ConvTranspose1d,
    nn.ConvTranspose2d: conv.ConvTranspose2d,
    nn.ConvTranspose3d: conv.ConvTranspose3d,
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.BatchNorm3d: norm.BatchNorm3d,
    nn.GroupNorm: norm.GroupNorm,
    nn.LayerNorm: norm.LayerNorm,
}


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The torch.nn class of a neuron layer."""
    return next(stock for stock, ours in NEURON_CLASSES.items() if isinstance(module, ours))


def _torchvision() -> Any:
    """The module for torchvision's Swin; returns None if its models were not imported."""
    if "torchvision.models.swin_transformer" not in sys.modules:
        return None
    from neq_kernels.conversion import torchvision_swin

    return torchvision_swin


def replacements() -> dict[type[nn.Module], type[nn.Module]]:
    support = _torchvision()
    return support.REPLACEMENTS if support else {}


def replaced_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    table = replacements()
    for module in model.modules():
        if type(module) in table:
            yield module, table[type(module)]


def reasons_against(model: nn.Module, filter: Filter | None, norms: bool) -> dict[str, str | None]:
    """For each module, why it is not converted; None if it can be."""
    support = _torchvision()
    bypassing: tuple[type, ...] = (nn.MultiheadAttention, *(support.BYPASSING if support else ()))
    bypassed = {
        child: type(module).__name__
        for module in model.modules()
        if isinstance(module, bypassing)
        for child in module.modules()
        if child is not module
    }
    reasons: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if module in bypassed:
            reasons[name] = f"{bypassed[module]} uses its weight without calling it"
        else:
            reasons[name] = _own_reason(name, module, filter, norms)
    candidates = {
        id(m) for n, m in model.named_modules() if reasons[n] is None or isinstance(m, NeuronLayer)
    }
    elsewhere = {
        id(p): name
        for name, module in model.named_modules()
        if id(module) not in candidates
        for p in module.parameters(recurse=False)
    }
    neurons: dict[int, set[NeuronLayout]] = {}
    for module in model.modules():
        if id(module) in candidates:
            neurons.setdefault(id(module.weight), set()).add(_layout(module))
    for name, module in model.named_modules():
        if reasons[name] is not None or isinstance(module, NeuronLayer):
            continue
        weight = module.weight
        if id(weight) in elsewhere:
            reasons[name] = f"its weight is shared with {elsewhere[id(weight)] or 'the model'}"
        elif len(neurons[id(weight)]) > 1:
            reasons[name] = "its weight is shared with a layer that sees other neurons in it"
    return reasons


def _layout(module: nn.Module) -> NeuronLayout:
    """Where a neuron lies in the weight of a layer, converted or not."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return NeuronLayout(module.groups, axis=1)
    return NeuronLayout()


def _own_reason(name: str, module: nn.Module, filter: Filter | None, norms: bool) -> str | None:
    if isinstance(module, NeuronLayer):
        return None
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "parametrized"
    if kind not in NEURON_CLASSES:
        base = next((c.__name__ for c in NEURON_CLASSES if isinstance(module, c)), None)
        return f"a subclass of {base}" if base else "not a supported layer type"
    unsupported = reason_against(module)
    if unsupported is not None:
        return unsupported
    if issubclass(NEURON_CLASSES[kind], norm._Norm) and not norms:
        return "norms=False"
    if filter is not None and not filter(name, module):
        return "left out by filter"
    return None
