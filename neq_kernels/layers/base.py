"""What all drop-in subclasses of torch.nn layers have in common: they own an
:class:`ActiveChannels`."""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from neq_kernels.autograd import arguments, functions
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.process_group import in_process_group


class NeuronLayer(nn.Module):
    """A layer whose output channels (neurons) can be frozen one by one.

    Constructed (:mod:`neq_kernels.nn`), or made of a torch.nn layer by
    :func:`neq_kernels.convert`, which changes its class: the result is the same.

    Attributes:
        channels: the active output channels. Layers that share a weight share this object.
        grad_input: ``"exact"`` or ``"active"`` (approximate), see :func:`neq_kernels.convert`.
        specialized: whether ``torch.compile`` may recompile when the layer stops or starts again.
        anchor: where parameters of wholly frozen layers wait for a data-parallel reducer: the
            model's, or the layer's own until ``convert`` adopts a constructed layer.
    """

    is_norm: ClassVar[bool] = False
    channels: ActiveChannels
    grad_input: arguments.GradInput
    specialized: bool = False
    anchor: ParameterAnchor

    # torch.nn declares these differently from class to class.
    weight: Any
    bias: Any

    def adopt(
        self, channels: ActiveChannels, grad_input: arguments.GradInput, anchor: ParameterAnchor
    ) -> None:
        """Give the layer its neurons."""
        channels.prepare(self.weight.device)
        self.channels, self.grad_input, self.anchor = channels, grad_input, anchor

    def release(self) -> None:
        """Undo :meth:`adopt`."""
        for name in ("channels", "grad_input", "specialized", "anchor"):
            self.__dict__.pop(name, None)

    @property
    def layout(self) -> NeuronLayout:
        """Where a neuron lies in ``weight``."""
        return NeuronLayout()

    def channel_dim(self, output: Tensor) -> int:
        """The dimension of ``output`` that enumerates the neurons."""
        raise NotImplementedError

    def neuron_parameters(self) -> list[tuple[Parameter, NeuronLayout]]:
        """The parameters the neurons own, with the layout of a neuron in each."""
        owned = []
        if isinstance(self.weight, Parameter):
            owned.append((self.weight, self.layout))
        if isinstance(self.bias, Parameter):
            owned.append((self.bias, NeuronLayout()))
        return owned

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active={self.channels.n_active}/{len(self.channels)}"

    def _stops(self) -> bool:
        """Under compile: whether this graph is one in which the layer is wholly frozen."""
        return self.specialized and self.channels.none_active and not in_process_group()

    def _learned(self) -> tuple[Any, Tensor | None]:
        """Weight and bias, as the graph being compiled must see them."""
        own = self._parameters
        if "weight" in own and "bias" in own:  # where Module.__getattr__, too, would find them
            weight, bias = own["weight"], own["bias"]
        else:
            weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling() and self._stops():
            return functions.detached(weight), functions.detached(bias)
        return weight, bias

    def _anchored(self, output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return output
        none_active = self.channels.none_active
        if not none_active and not self.anchor.waiting:
            return output
        if none_active and torch.is_grad_enabled():
            if in_process_group():
                self.anchor.add(p for p, _ in self.neuron_parameters())
            else:
                self.anchor.add_stand_ins(self.channels)
        return self.anchor.tie(output) if self.anchor.waiting else output

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter, _ in self.neuron_parameters():
            self.channels.prepare(parameter.device)
        return self


def reason_against(layer: nn.Module) -> str | None:
    """Why a layer of a supported torch.nn type has no neurons that can be frozen, else None."""
    is_layer_norm = isinstance(layer, nn.LayerNorm)
    weight = layer._parameters.get("weight")
    if not isinstance(weight, Parameter):
        if "weight" in layer._parameters:
            return f"it has no weight ({'elementwise_affine' if is_layer_norm else 'affine'}=False)"
        return "its weight is computed (weight norm, spectral norm, pruning)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return f"its weight is empty: {tuple(weight.shape)}"
    if is_layer_norm and weight.dim() != 1:
        return "it normalises over more than one dimension"
    return None


L = TypeVar("L", bound=NeuronLayer)


def constructible(kind: type[L]) -> type[L]:
    """Decorate a layer type: it is constructed as its torch.nn class is, with all neurons active.

    The constructor raises ValueError where :func:`neq_kernels.convert` would leave the layer alone.
    """
    stock = kind.__init__

    @wraps(stock)
    def construct(layer: L, /, *args: Any, **kwargs: Any) -> None:
        stock(layer, *args, **kwargs)
        reason = reason_against(layer)
        if reason is not None:
            name = kind.__name__
            raise ValueError(
                f"neq.nn.{name}: expected neurons that can be frozen, got none: {reason}; "
                f"use torch.nn.{name}"
            )
        channels = ActiveChannels(layer.layout.n_neurons(layer.weight))
        layer.adopt(channels, "exact", ParameterAnchor(shared=False))

    kind.__init__ = construct  # type: ignore[method-assign, assignment]
    return kind
