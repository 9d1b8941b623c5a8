"""Layers that run their own forward on parameters whose frozen neurons are constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from neq_kernels import functional
from neq_kernels.autograd.arguments import GradInput
from neq_kernels.autograd.call_state import learns, recorded, transformed, watched
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.layers.base import NeuronLayer, constructible, reason_against_parameter
from neq_kernels.layers.computed_weights import is_computed, sources


@dataclass(frozen=True)
class Owned:
    """A parameter, by name, and where its neurons lie (:class:`neq_kernels.channels.NeuronLayout`).

    Attributes:
        name: the parameter's name in the layer; a layer may lack it, or hold None.
        axis: the dimension that enumerates the neurons.
        groups: parts that dimension 0 is cut into; None: each of its entries is one, as in a stack
            of experts.
    """

    name: str
    axis: int = 0
    groups: int | None = 1

    def layout(self, parameter: Tensor) -> NeuronLayout:
        if self.axis == 0:
            return NeuronLayout()
        return NeuronLayout(len(parameter) if self.groups is None else self.groups, self.axis)


_AFFINE = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
WEIGHT_AND_BIAS = (Owned("weight"), Owned("bias"))


class Masked(NeuronLayer):
    """A layer that runs the forward of its stock class, while its parameters are replaced by
    tensors of the same values in which frozen neurons are constants.

    Gradients of every order are those of the dense layer with frozen neurons held; they cost what
    the dense ones cost. Wholly frozen, the layer asks for no gradient and saves nothing for one.

    Attributes:
        owned: the parameters of its neurons; the first that is there says how many they are.
        further: more sets of neurons, each with parameters of its own. They are no features of the
            output, and each has a parameterless child for its channels.
        output_dim: the dimension of the output that enumerates the neurons; None: none does. Of
            several outputs, the first.
    """

    owned: ClassVar[tuple[Owned, ...]] = WEIGHT_AND_BIAS
    further: ClassVar[tuple[tuple[Owned, ...], ...]] = ()
    output_dim: ClassVar[int | None] = -1

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        for group in (cls.owned, *cls.further):
            counts = {}
            for owned in group:
                parameter = layer._parameters.get(owned.name)
                if parameter is None:
                    if owned is group[0]:
                        return _without(layer, owned.name)
                    continue
                reason = reason_against_parameter(owned.name, parameter)
                if reason is not None:
                    return reason
                if parameter.dim() <= owned.axis:
                    return f"its {owned.name} has no dimension {owned.axis}"
                counts[owned.name] = owned.layout(parameter).n_neurons(parameter)
            if len(set(counts.values())) > 1:
                return f"its parameters hold different numbers of neurons: {counts}"
        return None

    @classmethod
    def layout_in(cls, layer: nn.Module) -> NeuronLayout:
        name = cls.owned[0].name
        return cls.owned[0].layout(layer._parameters.get(name, getattr(layer, name)))

    @classmethod
    def parameters_in(cls, layer: nn.Module) -> list[tuple[Parameter, NeuronLayout]]:
        return _parameters_of(layer, cls.owned)

    @classmethod
    def further_parameters_in(cls, layer: nn.Module) -> list[tuple[Parameter, NeuronLayout]]:
        return [found for group in cls.further for found in _parameters_of(layer, group)]

    @property
    def shows_neurons(self) -> bool:
        return self.output_dim is not None

    def channel_dim(self, output: Tensor) -> int:
        if self.output_dim is None:
            raise ValueError(f"{type(self).__name__}: no dimension of its output holds its neurons")
        return self.output_dim % output.dim()

    def adopt(
        self, channels: ActiveChannels, grad_input: GradInput, anchor: ParameterAnchor
    ) -> None:
        super().adopt(channels, grad_input, anchor)
        for group in self.further:
            name = _child_name(group)
            if name not in self._modules:
                self._modules[name] = FurtherNeurons(self, group)
                child = self._modules[name]
                assert isinstance(child, FurtherNeurons)
                child.adopt(ActiveChannels(child.n_neurons), grad_input, anchor)

    def computed(self) -> str | None:
        for group in (self.owned, *self.further):
            for owned in group:
                if is_computed(self, owned.name) and not _parameters_of(self, (owned,)):
                    return owned.name
        return None

    def release(self) -> None:
        super().release()
        for group in self.further:
            self._modules.pop(_child_name(group), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            return self._traced(*args, **kwargs)
        replaced: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        learning: dict[NeuronLayer, None] = {}
        try:
            for layer, owned in self._neurons():
                # DataParallel's replicas and computed weights are plain attributes.
                own: dict[str, Any] = self._parameters
                place = own if owned.name in own else self.__dict__
                parameter = place.get(owned.name)
                if isinstance(parameter, Tensor) and learns(parameter, None):
                    learning[layer] = None
                    stands_in = held(layer, parameter, owned.layout(parameter))
                    if stands_in is not parameter:
                        replaced.append((place, owned.name, parameter, stands_in))
                        place[owned.name] = stands_in
            output = super().forward(*args, **kwargs)
        finally:
            for place, name, parameter, stands_in in replaced:
                if place.get(name) is stands_in:
                    place[name] = parameter

        def finished(tensor: Tensor) -> Tensor:
            for layer in learning:
                if not layer.channels.none_active and not recorded(tensor) and not transformed():
                    tensor = watched(tensor, layer.channels)
            for layer in (self, *self._further()):
                tensor = layer._anchored(tensor)
            return tensor

        return tree_map_only(Tensor, finished, output)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        for child in self._further():  # whose own turn was before the parameters'
            child._apply(fn, recurse)
        return self

    def _further(self) -> list[FurtherNeurons]:
        return [self._modules[_child_name(group)] for group in self.further]  # type: ignore[misc]

    def _neurons(self) -> Iterator[tuple[NeuronLayer, Owned]]:
        for owned in self.owned:
            yield self, owned
        for child in self._further():
            for owned in child.owned:
                yield child, owned


class FurtherNeurons(NeuronLayer):
    """More neurons of a :class:`Masked` layer, in parameters that stay where they are. No output
    shows them one by one, so that controllers that watch outputs leave them active."""

    def __init__(self, layer: Masked, owned: tuple[Owned, ...]) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # as a child it would be its own ancestor
        self.owned = owned

    def neuron_parameters(self) -> list[tuple[Parameter, NeuronLayout]]:
        return _parameters_of(self.__dict__["_layer"], self.owned)

    def computed(self) -> str | None:
        return None  # its layer says so

    @property
    def shows_neurons(self) -> bool:
        return False

    def channel_dim(self, output: Tensor) -> int:
        raise ValueError("no dimension of the output holds these neurons")


def _without(layer: nn.Module, name: str) -> str:
    if name in layer._parameters:
        return f"it has no {name}" + (" (affine=False)" if isinstance(layer, _AFFINE) else "")
    if isinstance(getattr(layer, name, None), Tensor):
        return f"its {name} is computed (weight norm, spectral norm, pruning), or a buffer"
    return f"it has no parameter {name}"


def _child_name(group: tuple[Owned, ...]) -> str:
    return f"{group[0].name}_neurons"


def _parameters_of(
    layer: nn.Module, group: tuple[Owned, ...]
) -> list[tuple[Parameter, NeuronLayout]]:
    found: list[tuple[Parameter, NeuronLayout]] = []
    for owned in group:
        parameter = layer._parameters.get(owned.name)
        if isinstance(parameter, Parameter):
            found.append((parameter, owned.layout(parameter)))
        elif is_computed(layer, owned.name) and owned.name in layer.__dict__:
            computed: Tensor = layer.__dict__[owned.name]
            found += sources(layer, owned.name, owned.layout(computed)) or []
    return found


def held(layer: NeuronLayer, parameter: Tensor, layout: NeuronLayout) -> Tensor:
    """``parameter`` with its frozen neurons as constants."""
    if torch.compiler.is_compiling() and layer._stops():
        return parameter.detach()
    return functional.masked(parameter, layer.channels, layout)


@constructible
class Bilinear(Masked, nn.Bilinear):
    """``torch.nn.Bilinear`` with neurons that can be frozen: one per output feature."""
