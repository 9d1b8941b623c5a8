"""Find, in the first backward, layers whose weight learns although they are not called."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.nn import Parameter

from neq_kernels.autograd.call_state import transformed
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import named_neuron_layers

SHOWN = 5
# A gradient of zeros (a projection that starts at zero hides it) tells nothing: look again.
_MOST_LOOKS = 10


def watch_for_bypass(model: nn.Module) -> None:
    """Warn once, at the end of the first backward, of every converted layer whose weight got a
    gradient though the layer was not called: ``torch.nn.functional.linear(x, layer.weight)``.

    The first gradient of each weight is looked at and no later one, so training pays nothing. The
    hooks are on the parameter objects: copies of the model are not watched.
    """
    stop_watching(model)
    watch = _Watch()
    sharing: dict[Parameter, list[NeuronLayer]] = {}
    names: dict[Parameter, str] = {}
    for name, layer in named_neuron_layers(model):
        owned = [p for p, _ in layer.neuron_parameters()]
        for parameter in [p for p in owned if p.dim() > 1] or owned[:1]:
            sharing.setdefault(parameter, []).append(layer)
            names.setdefault(parameter, name)
    for parameter, layers in sharing.items():
        if parameter.requires_grad:
            parameter.register_hook(_FirstGradient(watch, parameter, names[parameter], layers))


def stop_watching(model: nn.Module) -> None:
    """Remove what :func:`watch_for_bypass` has left."""
    for parameter in model.parameters():
        _remove(parameter)


def _remove(parameter: Tensor) -> None:
    hooks = parameter._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _FirstGradient)]:
        del hooks[key]


class _FirstGradient:
    """Looks at the gradient of one parameter until it has seen enough, and removes itself."""

    __torch_unserializable__ = True  # pickling the parameter needs no warning

    def __init__(
        self, watch: _Watch, parameter: Parameter, name: str, layers: list[NeuronLayer]
    ) -> None:
        self._watch, self._parameter, self._name, self._layers = watch, parameter, name, layers
        self._looks = 0

    def __call__(self, grad: Tensor | None) -> None:
        if grad is None or torch.compiler.is_compiling():
            return
        owners = [
            (channels, layout)
            for layer in self._layers
            if isinstance(layer, NeuronLayer)
            for parameter, channels, layout in layer.owners()
            if parameter is self._parameter
        ]
        called = any(channels.called for channels, _ in owners)
        if owners and not called and _all_active(owners) and _was_compiled():
            return  # compiled code calls layers without a trace: wait until neurons are frozen
        self._looks += 1
        if not owners or called or self._looks > _MOST_LOOKS:
            _remove(self._parameter)
        elif _tells(grad, owners):
            _remove(self._parameter)
            self._watch.report(self._name)


def _tells(grad: Tensor, owners: list[tuple[ActiveChannels, NeuronLayout]]) -> bool:
    """Whether this gradient shows that the layers that own it were bypassed."""
    if (
        type(grad) is not Tensor
        or grad.layout != torch.strided
        or grad.is_meta
        or transformed()
        or _len_torch_dispatch_stack() > 0
        or (grad.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return False
    if _all_active(owners):
        return bool(grad.ne(0).any())
    frozen = torch.ones(grad.shape, dtype=torch.bool, device=grad.device)
    for channels, layout in owners:
        layout.fill_(frozen, channels.active.to(grad.device), False)
    return bool(grad.ne(0).logical_and_(frozen).any())


def _all_active(owners: list[tuple[ActiveChannels, NeuronLayout]]) -> bool:
    return all(channels.n_active == len(channels) for channels, _ in owners)


def _was_compiled() -> bool:
    """Whether anything was, in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0


class _Watch:
    """What the hooks of one model have found in the present backward."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def report(self, name: str) -> None:
        if not self._found:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._warn)
        if name not in self._found:
            self._found.append(name)

    def _warn(self) -> None:
        found, self._found = self._found, []
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        what = "layer was" if len(found) == 1 else "layers were"
        warnings.warn(
            f"{', '.join(found[:SHOWN])}{more}: the weight got a gradient though the {what} not "
            "called: the model uses the weight itself, so the gradient is computed dense and "
            "freezing neurons there saves nothing (neq.flops counts it so, neq.verify lists every "
            "such parameter). Call the layer, or leave it out by convert(model, filter=...)",
            stacklevel=2,
        )
