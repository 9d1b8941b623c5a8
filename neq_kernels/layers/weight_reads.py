"""Layers whose weight is read by the module around them, which does not call them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._pytree import tree_map_only

from neq_kernels.autograd.call_state import learns, transformed
from neq_kernels.channels import NeuronLayout
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.linear import Linear
from neq_kernels.layers.masked import held
from neq_kernels.process_group import in_process_group

# The parameters that readers see neurons in.
READ = {"weight", "bias", "in_proj_weight", "in_proj_bias"}
# Asked of a tensor without looking at its values.
_ABOUT: set[Callable[..., Any]] = {Tensor.dim, Tensor.numel, Tensor.size, Tensor.stride}
_ABOUT |= {getattr(Tensor, name).__get__ for name in ("data", "device", "dtype", "ndim", "shape")}


class WeightReads:
    """For the length of a module's forward, neurons in the weights that it reads of its layers.

    ``F.linear(x, self.qkv.weight, bias)`` becomes a call of ``self.qkv`` with that bias. Whatever
    else is computed from a weight or bias is computed from a tensor of the same values in which
    frozen neurons are constants: exact gradients, at the dense cost.

    Args:
        reader: the module.
        paths: the neuron layers whose weight it reads, by name.
        arguments: those of its forward that may be such layers, by position.
    """

    def __init__(
        self, reader: nn.Module, paths: Iterable[str], arguments: Mapping[str, int]
    ) -> None:
        self._arguments = arguments
        self._layers = [(path, _owned_names(reader.get_submodule(path))) for path in paths]
        self._hooks = [
            reader.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            reader.register_forward_hook(self._after_forward, always_call=True),
        ]
        # By this torch.fx knows modules that stay modules in a graph, which would else hold the
        # weights without their layers.
        reader.__dict__["__module__"] = "torch.nn"

    def remove(self, reader: nn.Module) -> None:
        """The module reads the parameters themselves again."""
        reader.__dict__.pop("__module__", None)
        for hook in self._hooks:
            hook.remove()

    def _before_forward(
        self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        for path, names in self._layers:
            layer = reader.get_submodule(path)
            if isinstance(layer, NeuronLayer):
                replaced += _replace(reader, layer, names)
        for name, position in self._arguments.items():
            given = args[position] if position < len(args) else kwargs.get(name)
            if isinstance(given, NeuronLayer):
                replaced += _replace(reader, given, _owned_names(given))
        reader.__dict__.setdefault("neq_replaced", []).append(replaced)

    def _after_forward(self, reader: nn.Module, args: object, output: object) -> None:
        waiting = reader.__dict__.get("neq_replaced")
        if waiting is None:  # a hook that ran before ours has failed
            return
        replaced = waiting.pop()
        if not waiting:
            del reader.__dict__["neq_replaced"]
        for place, name, before in reversed(replaced):
            if before is None:
                del place[name]
            else:
                place[name] = before


def _owned_names(layer: nn.Module) -> list[tuple[str, NeuronLayout]]:
    assert isinstance(layer, NeuronLayer)
    layouts = {parameter: layout for parameter, _, layout in layer.owners()}
    return [(n, layouts[p]) for n, p in layer._parameters.items() if n in READ and p in layouts]


def _replace(
    reader: nn.Module, layer: NeuronLayer, names: list[tuple[str, NeuronLayout]]
) -> list[tuple[dict[str, Any], str, Any]]:
    """Put what the reader is to see in place; returns (dictionary, name, what was there)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        layer.channels.called = True
        if layer.channels.none_active:
            parameters = [p for p, _ in layer.neuron_parameters()]
            add = layer.anchor.add if in_process_group() else layer.anchor.add_stand_ins
            add(parameters)
    watched = bool(layer._forward_hooks or layer._forward_pre_hooks)
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for name, layout in names:
        # Plain attributes in DataParallel's replicas.
        own: dict[str, Any] = layer._parameters
        place = own if name in own else layer.__dict__
        parameter = place.get(name)
        if not isinstance(parameter, Tensor):
            continue
        learning = learns(parameter, None)
        if torch.compiler.is_compiling() or place is layer.__dict__:
            if learning:
                replaced.append((place, name, parameter))
                place[name] = held(layer, parameter, layout)
        elif learning or watched:
            # An attribute hides the parameter from readers, and from nobody else.
            replaced.append((layer.__dict__, name, layer.__dict__.get(name)))
            layer.__dict__[name] = _Read.of(reader if learning else None, layer, parameter, layout)
    return replaced


def _calls_its_layer(weight: Tensor | None) -> bool:
    """Whether ``F.linear`` with this weight is a call of the layer that it was read of."""
    return isinstance(weight, _Read) and isinstance(weight.layer, Linear)


def read_parameter(tensor: Tensor | None) -> Tensor | None:
    """The parameter, where ``tensor`` is what a reader sees of one; else ``tensor`` itself."""
    return tensor.parameter if isinstance(tensor, _Read) else tensor


class _Read(Tensor):
    """A weight or bias of a neuron layer, as a module reads it (None: nothing learns)."""

    reader: nn.Module | None
    layer: NeuronLayer
    parameter: Tensor
    neuron_layout: NeuronLayout
    stand_in: Tensor | None

    @staticmethod
    def of(
        reader: nn.Module | None, layer: NeuronLayer, parameter: Tensor, layout: NeuronLayout
    ) -> _Read:
        read = parameter.detach().as_subclass(_Read)
        read.reader, read.layer, read.parameter = reader, layer, parameter
        read.neuron_layout, read.stand_in = layout, None
        return read

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            called = _call(*args, **kwargs)
            if called is not None:
                return called
        args, kwargs = tree_map_only(_Read, partial(_seen, func), (args, kwargs))
        return func(*args, **kwargs)


def _call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The call of the layer that this product of its weight is; None if it is none."""
    if not _calls_its_layer(weight) or transformed():
        return None
    assert isinstance(weight, _Read)
    _refuse_inner_checkpoint(weight.reader)
    layer = weight.layer
    own = layer._parameters
    if isinstance(input, _Read):
        input = _seen(F.linear, input)
    if isinstance(bias, _Read):
        bias = bias.parameter if bias.parameter is own["bias"] else _seen(F.linear, bias)
    # The layer would compute the gradient of active rows only, which a bias of others need not be.
    of_others = (
        bias is not None
        and bias is not own["bias"]
        and bias.requires_grad
        and torch.is_grad_enabled()
        and layer.channels.n_active < len(layer.channels)
    )
    kept = own["bias"]
    own["bias"] = bias.detach() if of_others else bias  # type: ignore[union-attr, assignment]
    try:
        output: Tensor = layer(input)
    finally:
        own["bias"] = kept
    if of_others:
        output = _Added.apply(output, bias)
    return output


class _Added(torch.autograd.Function):
    """An output to which a bias has been added already: the gradient of that bias."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        ctx.dtype = bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, grad_output.reshape(-1, grad_output.shape[-1]).sum(0).to(ctx.dtype)


def _seen(func: Callable[..., Any], read: _Read) -> Tensor:
    """What a function gets that is called with a weight."""
    if func in _ABOUT:
        return read.parameter
    _refuse_inner_checkpoint(read.reader)
    if not learns(read.parameter, None):
        return read.parameter
    if read.stand_in is None:
        read.stand_in = held(read.layer, read.parameter, read.neuron_layout)
    return read.stand_in


def _refuse_inner_checkpoint(reader: nn.Module | None) -> None:
    """Raise if the weight is read in a checkpoint inside the reader's forward: the recomputation
    runs without it, would see the parameters themselves, and give frozen neurons gradients."""
    frame = None if reader is None else sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == checkpoint.__file__:
            raise RuntimeError(
                f"{type(reader).__name__} reads the weight of a converted layer inside a "
                "checkpoint in its own forward, where frozen neurons cannot be held: expected it "
                "to call the layer, or a checkpoint around the whole module; or leave the layer "
                "out: convert(model, filter=...)"
            )
        own = code.co_varnames[:1]
        if code.co_name == "forward" and own and frame.f_locals.get(own[0]) is reader:
            return
        frame = frame.f_back
