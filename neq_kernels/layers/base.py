"""Drop-in subclasses of torch.nn layers that own an :class:`ActiveChannels`.

They are not constructed: :func:`neq_kernels.convert` changes the class of an existing layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from neq_kernels.autograd import arguments, functions
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.process_group import in_process_group


class NeuronLayer(nn.Module):
    """A layer whose output channels (neurons) can be frozen one by one.

    Attributes:
        channels: the active output channels. Layers that share a weight share this object.
        grad_input: ``"exact"`` or ``"active"`` (approximate), see :func:`neq_kernels.convert`.
        specialized: whether ``torch.compile`` may recompile when the layer stops or starts again.
        anchor: where parameters of wholly frozen layers wait for a data-parallel reducer.
    """

    is_norm: ClassVar[bool] = False
    channels: ActiveChannels
    grad_input: arguments.GradInput
    specialized: bool
    anchor: ParameterAnchor

    # torch.nn declares these differently from class to class.
    weight: Any
    bias: Any

    @property
    def layout(self) -> NeuronLayout:
        """Where a neuron lies in ``weight``."""
        return NeuronLayout()

    def channel_dim(self, output: Tensor) -> int:
        """The dimension of ``output`` that enumerates the neurons."""
        raise NotImplementedError

    def neuron_parameters(self) -> list[tuple[Parameter, NeuronLayout]]:
        """The parameters the neurons own, with the place of a neuron in each."""
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
        """Weight and bias, as the graph being compiled is to see them."""
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
        if none_active and torch.is_grad_enabled() and in_process_group():
            self.anchor.add(p for p, _ in self.neuron_parameters())
        return self.anchor.tie(output) if self.anchor.waiting else output

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter, _ in self.neuron_parameters():
            self.channels.prepare(parameter.device)
        return self
